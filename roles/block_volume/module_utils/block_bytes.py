"""Reads a device's own bytes: is it zero, is it what a mkfs left behind, what does its superblock say."""

from __future__ import annotations

import errno
import mmap
import os
import struct
import tempfile
import time

from ansible.module_utils.block_host import ask
from ansible.module_utils.block_model import Content

BLOCK = 4096
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


def remains_of_mkfs(partition: str, size: int) -> bool:
    """Whether all that isn't zero on a partition lies where mkfs.ext4 writes on one of this size.

    That, on a partition whose table is ours, is a mkfs that was cut off: its superblock, written last, is missing.
    """
    with tempfile.TemporaryDirectory(prefix="labctl-mkfs-", dir="/var/tmp") as place:
        image = os.path.join(place, "image")
        with open(image, "wb") as file:
            file.truncate(size)
        if ask("mkfs.ext4", "-q", "-F", image).rc:  # a file of our own, just made
            return False
        with open(image, "rb") as expected, open(partition, "rb") as found:
            for offset in range(0, size, CHUNK):
                found.seek(offset)
                data = found.read(CHUNK)
                if not data.strip(b"\0"):
                    continue
                expected.seek(offset)
                reference = expected.read(CHUNK)
                for at in range(0, len(data), BLOCK):
                    if data[at : at + BLOCK].strip(b"\0") and not reference[at : at + BLOCK].strip(b"\0"):
                        return False
    return True


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
