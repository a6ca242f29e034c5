"""What a filesystem says of itself in its superblock."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct

EXT_MAGIC, EXT_NEEDS_RECOVERY, EXT_ERRORS, EXT_64BIT = 0xEF53, 0x4, 0x2, 0x80  # linux/fs/ext4/ext4.h
XFS_FSGEOMETRY = 0x80705864  # XFS_IOC_FSGEOMETRY_V1, linux/fs/xfs/libxfs/xfs_fs.h


def filesystem_size(path: str, kind: str, mounted_at: str) -> int:
    """Bytes that a filesystem spans by its own account; 0 if that isn't known."""
    if kind == "xfs":
        return _mounted_xfs(mounted_at) if mounted_at else _xfs(_block(path, 0))
    if kind == "btrfs":
        return _btrfs(_block(path, 65536))
    return _ext(_block(path, 1024)) if kind in ("ext2", "ext3", "ext4") else 0


def ext_state(path: str) -> tuple[bool, bool]:
    """(journal needs replay, errors were recorded) of an ext2/3/4 superblock."""
    block = _block(path, 1024)
    magic, state = struct.unpack_from("<HH", block, 56)
    (incompat,) = struct.unpack_from("<I", block, 96)
    return magic == EXT_MAGIC and bool(incompat & EXT_NEEDS_RECOVERY), magic == EXT_MAGIC and bool(state & EXT_ERRORS)


def _block(path: str, offset: int) -> bytes:
    with open(path, "rb") as device:
        device.seek(offset)
        return device.read(4096).ljust(4096, b"\0")


def _ext(block: bytes) -> int:
    """ext4_super_block: s_blocks_count_lo and _hi, s_log_block_size, s_magic."""
    blocks, scale = struct.unpack_from("<I", block, 4)[0], struct.unpack_from("<I", block, 24)[0]
    if struct.unpack_from("<I", block, 96)[0] & EXT_64BIT:
        blocks |= struct.unpack_from("<I", block, 0x150)[0] << 32
    known = struct.unpack_from("<H", block, 56)[0] == EXT_MAGIC and scale <= 6
    return int(blocks) << (10 + scale) if known else 0


def _xfs(block: bytes) -> int:
    """xfs_dsb: sb_blocksize, sb_dblocks."""
    size, blocks = struct.unpack_from(">IQ", block, 4)
    return int(size * blocks) if block.startswith(b"XFSB") else 0


def _mounted_xfs(mount_point: str) -> int:
    """xfs_fsop_geom_v1: block size, seven more words, data blocks. On the disk the superblock lags behind."""
    geometry = bytearray(112)
    with contextlib.suppress(OSError):
        fd = os.open(mount_point, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, XFS_FSGEOMETRY, geometry)
        finally:
            os.close(fd)
    return int(struct.unpack_from("<I", geometry)[0] * struct.unpack_from("<Q", geometry, 32)[0])


def _btrfs(block: bytes) -> int:
    """btrfs_super_block: total_bytes, num_devices. Of several devices none is all of it."""
    total, devices = struct.unpack_from("<Q", block, 0x70)[0], struct.unpack_from("<Q", block, 0x88)[0]
    return int(total) if block[64:72] == b"_BHRfS_M" and devices == 1 else 0
