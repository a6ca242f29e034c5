"""Reads a device's own bytes: is it zero, is it what a mkfs left behind."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
import struct
import tempfile
import time
import uuid as uuid_module
import zlib
from collections.abc import Iterator
from dataclasses import replace

from ansible.module_utils.block_host import ask, sector_size
from ansible.module_utils.block_model import Content, Table
from ansible.module_utils.block_room import GPT_ENTRIES

KIB = 1024
SUPERBLOCK_END = 2048  # the primary superblock of ext4 is the second KiB, whatever the block size
CHUNK = 4 << 20  # bytes per read: large enough for full speed, and a multiple of every sector size
SAMPLES = 64
GPT_ENTRY = 128  # bytes of one entry of a GPT


def read_content(path: str, size: int, limit: int, start: int = 0) -> Content:
    """Whether a device is zero from `start` to `size`: its ends, samples, then all of it, to the first byte found.

    More than `limit` bytes aren't read whole. `start` is a multiple of the sector size. Raises OSError if the device
    can't be read.
    """
    started, length = time.monotonic(), max(0, size - start)
    step = max(CHUNK, length // SAMPLES // CHUNK * CHUNK)
    last = start + max(0, (length - 1) // CHUNK * CHUNK)
    first = sorted({start, max(start, last - CHUNK), last, *range(start, size, step)}) if length else []
    read, zeros = 0, bytes(CHUNK)
    fd = _open_direct(path)
    try:
        with mmap.mmap(-1, CHUNK) as buffer:  # page-aligned, as O_DIRECT wants it
            rest = range(start, size, CHUNK) if length <= limit else ()
            for offset in (*first, *rest):
                count = os.preadv(fd, [buffer], offset)
                wanted = min(CHUNK, size - offset)
                if count < wanted:
                    raise OSError(errno.EIO, f"only {count} bytes could be read at {offset}", path)
                read += wanted
                data = buffer[:wanted]
                if data != zeros[:wanted]:
                    at = offset + wanted - len(data.lstrip(b"\0"))
                    return Content(data_at=at, bytes_read=read, seconds=time.monotonic() - started)
    finally:
        os.close(fd)
    return Content(proven_zero=0 < length <= limit, bytes_read=read, seconds=time.monotonic() - started)


def read_behind(path: str, start: int, size: int, limit: int, table: Table) -> Content:
    """Whether a disk is zero from `start` to its end but for backups of its own GPT.

    Extending a volume leaves one in the middle of it, and a run that was cut off may have written one at the new end.
    """
    at, read = start, 0
    while at < size:
        content = read_content(path, size, limit, at)
        read += content.bytes_read
        if content.data_at is None:
            return replace(content, bytes_read=read)
        copy = content.data_at // table.sector * table.sector
        end = end_of_backup(path, copy, table)
        if not end:
            return replace(content, bytes_read=read)
        between = read_content(path, copy, limit, at) if copy > at else Content(proven_zero=True)
        if not between.proven_zero:  # samples are read out of order: something may lie before what they found
            return between
        at = end
    return Content(proven_zero=True, bytes_read=read)


def end_of_backup(path: str, start: int, table: Table) -> int:
    """Where a backup of this very GPT ends that begins at `start` (an array of entries, then the header); else 0."""
    if table.kind != "gpt" or len(table.extents) != 1:
        return 0
    end, only = start + GPT_ENTRIES + table.sector, table.extents[0]
    with open(path, "rb") as device:
        device.seek(start)
        entries, header = device.read(GPT_ENTRIES), device.read(table.sector)
    if len(header) < table.sector:
        return 0
    ours = (
        str(uuid_module.UUID(bytes_le=entries[16:32])) == table.uuids.get(only.number)
        and struct.unpack_from("<Q", entries, 32)[0] * table.sector == only.start
        and not entries[GPT_ENTRY:].strip(b"\0")
    )
    # a run that is cut off at this moment leaves the array at the disk's end, and no header yet
    begun = end == device_size(path) and not header.strip(b"\0")
    return end if ours and (begun or _is_header_of(header, entries, start, table)) else 0


def _is_header_of(header: bytes, entries: bytes, start: int, table: Table) -> bool:
    """Whether a sector is the intact header of the array before it, and of this GPT (UEFI 2.10, 5.3.2)."""
    size, checksum = struct.unpack_from("<II", header, 12)
    own, guid = struct.unpack_from("<Q", header, 24)[0], header[56:72]
    array, count, entry_size, array_sum = struct.unpack_from("<QIII", header, 72)
    return (
        header.startswith(b"EFI PART")
        and 92 <= size <= table.sector
        and zlib.crc32(header[:16] + bytes(4) + header[20:size]) == checksum
        and zlib.crc32(entries) == array_sum
        and (array * table.sector, own * table.sector) == (start, start + GPT_ENTRIES)
        and count * entry_size == GPT_ENTRIES
        and str(uuid_module.UUID(bytes_le=guid)) == table.guid
    )


@contextlib.contextmanager
def new_filesystem(partition: str, uuid: str) -> Iterator[str]:
    """An image of the ext4 filesystem that belongs on a partition, made by mkfs.ext4 in a sparse file.

    Size, UUID and the time in the UUID decide every byte of it, so a run that was cut off can be told from data.
    Raises OSError if mkfs fails.
    """
    blocks = ["-b", "4096"] if sector_size(partition) > 1024 else []
    with tempfile.TemporaryDirectory(prefix="labctl-mkfs-", dir="/var/tmp") as place:
        image = os.path.join(place, "image")
        with open(image, "wb") as file:
            file.truncate(device_size(partition))
        answer = ask(
            "mkfs.ext4", "-q", "-U", uuid, "-E", f"hash_seed={uuid}", *blocks, image,
            env={"E2FSPROGS_FAKE_TIME": str(uuid_seconds(uuid))},
        )  # fmt: skip
        if answer.rc:
            raise OSError(errno.EIO, f"mkfs.ext4: {answer.words}", partition)
        yield image


def time_uuid() -> str:
    """A UUID of version 7 (RFC 9562): its first 48 bits are the time in milliseconds."""
    value = int(time.time() * 1000) << 80 | 0x7 << 76 | secrets.randbits(12) << 64 | 0b10 << 62 | secrets.randbits(62)
    return str(uuid_module.UUID(int=value))


def uuid_seconds(text: str) -> int:
    """The time in such a UUID, in seconds since 1970; ValueError if it is of another kind."""
    value = uuid_module.UUID(text)
    if value.version != 7:
        raise ValueError(f"{text} isn't a UUID of version 7")
    return (value.int >> 80) // 1000


def unfinished(partition: str, uuid: str) -> bool:
    """Whether a partition holds nothing but parts of the filesystem that belongs on it.

    Each KiB must be zero or the very one of the image; the superblock, which is written last, must be missing.
    """
    try:
        uuid_seconds(uuid)
    except ValueError:
        return False
    with new_filesystem(partition, uuid) as image, open(image, "rb") as expected, open(partition, "rb") as found:
        if found.read(SUPERBLOCK_END).strip(b"\0"):
            return False
        for offset in range(0, device_size(partition), CHUNK):
            found.seek(offset)
            data = found.read(CHUNK)
            if not data.strip(b"\0"):
                continue
            expected.seek(offset)
            wanted = expected.read(CHUNK)
            for at in range(0, len(data), KIB):
                if data[at : at + KIB] != wanted[at : at + KIB] and data[at : at + KIB].strip(b"\0"):
                    return False
    return True


def device_size(path: str) -> int:
    """Bytes of a block device."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def _open_direct(path: str) -> int:
    """Past the page cache: the device's own bytes, and the machine's memory stays as it is."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
