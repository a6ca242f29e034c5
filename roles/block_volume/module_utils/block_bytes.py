"""Reads a device's own bytes: is it zero, is it what a mkfs left behind, what does its superblock say."""

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
from collections.abc import Iterator

from ansible.module_utils.block_host import ask, device_number, read_text, sysfs
from ansible.module_utils.block_model import Content

KIB = 1024
SUPERBLOCK_END = 2048  # the primary superblock of ext4 is the second KiB, whatever the block size
CHUNK = 4 << 20  # bytes per read: large enough for full speed, and a multiple of every sector size
SAMPLES = 64
EXT_MAGIC, EXT_NEEDS_RECOVERY, EXT_ERRORS = 0xEF53, 0x4, 0x2  # linux/fs/ext4/ext4.h


def read_content(path: str, size: int, limit: int) -> Content:
    """Whether a device is zero: its ends, samples, then (up to `limit` bytes) all of it, to the first byte found.

    Raises OSError if it can't be read.
    """
    started, step = time.monotonic(), max(CHUNK, size // SAMPLES // CHUNK * CHUNK)
    last = max(0, (size - 1) // CHUNK * CHUNK)
    first = sorted({0, max(0, last - CHUNK), last, *range(0, size, step)})
    read, zeros = 0, bytes(CHUNK)
    fd = _open_direct(path)
    try:
        with mmap.mmap(-1, CHUNK) as buffer:  # page-aligned, as O_DIRECT wants it
            rest = range(0, size, CHUNK) if size <= limit else ()
            for offset in (*first, *rest):
                count = os.preadv(fd, [buffer], offset)
                if count != min(CHUNK, size - offset):
                    raise OSError(errno.EIO, f"only {count} bytes could be read at {offset}", path)
                read += count
                data = buffer[:count]
                if data != zeros[:count]:
                    at = offset + len(data) - len(data.lstrip(b"\0"))
                    return Content(data_at=at, bytes_read=read, seconds=time.monotonic() - started)
    finally:
        os.close(fd)
    return Content(proven_zero=size <= limit and size > 0, bytes_read=read, seconds=time.monotonic() - started)


@contextlib.contextmanager
def new_filesystem(partition: str, uuid: str) -> Iterator[str]:
    """An image of the ext4 filesystem that belongs on a partition, made by mkfs.ext4 in a sparse file.

    Size, UUID and the time in the UUID decide every byte of it, so a run that was cut off can be told from data.
    Raises OSError if mkfs fails.
    """
    home = sysfs(device_number(partition))
    sector = read_text(f"{home}/../queue/logical_block_size") or read_text(f"{home}/queue/logical_block_size")
    blocks = ["-b", "4096"] if int(sector or 512) > 1024 else []
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


def ext_state(path: str) -> tuple[bool, bool]:
    """(journal needs replay, errors were recorded) of an ext2/3/4 superblock."""
    with open(path, "rb") as device:
        device.seek(1024)
        block = device.read(1024)
    magic, state = struct.unpack_from("<HH", block, 56)
    (incompat,) = struct.unpack_from("<I", block, 96)
    return magic == EXT_MAGIC and bool(incompat & EXT_NEEDS_RECOVERY), magic == EXT_MAGIC and bool(state & EXT_ERRORS)
