"""Partition tables: made by sfdisk in a sparse file, looked at there, and only then copied to the disk.

The backup of a GPT goes first and the primary with its MBR in one write, so a run that is cut off leaves either the
old table or the new one, and at most a backup that the next run recognises.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ansible.module_utils.block_bytes import device_size, read_content, uuid_seconds
from ansible.module_utils.block_host import Answer, ask, sector_size
from ansible.module_utils.block_model import Extent, Facts, Table, Wanted
from ansible.module_utils.block_plan import is_uuid, partition_name
from ansible.module_utils.block_room import GPT_ENTRIES

SECTOR = 512  # what sfdisk takes a file for
HEAD = 2 * SECTOR + GPT_ENTRIES  # protective MBR, header, entries
TAIL = GPT_ENTRIES + SECTOR  # entries, header
LINUX_DATA = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"  # the GPT type that parted and sfdisk give an ext4 partition
OPTIONS = ("--quiet", "--wipe", "never", "--wipe-partitions", "never", "--no-reread", "--no-tell-kernel")


class Failed(Exception):
    """A tool failed; the message has its words."""


def must(answer: Answer, what: str) -> str:
    """The output of a tool that has to succeed."""
    if answer.rc:
        raise Failed(f"{what} failed: {answer.words}")
    return str(answer.out)


def script(wanted: Wanted, partition_uuid: str) -> str:
    """Our table for sfdisk: a GPT with one partition from the first aligned sector to the last.

    It announces the filesystem to come: the disk GUID is the volume's id, the partition's name says whose it is, its
    UUID is the filesystem's. If a run is cut off, the next one can prove that what is there is ours, and finish it.
    """
    lines = ["label: gpt"]
    if is_uuid(wanted.volume_id):
        lines.append(f"label-id: {wanted.volume_id.upper()}")
    lines.append(f'type={LINUX_DATA}, uuid={partition_uuid.upper()}, name="{partition_name(wanted)}"')
    return "\n".join(lines) + "\n"


def write_new(fd: int, disk: str, wanted: Wanted, partition_uuid: str) -> None:
    """Our table on a disk that is held and was found blank. The kernel is told afterwards."""
    if sector_size(disk) != SECTOR:
        must(ask("sfdisk", *OPTIONS, disk, data=script(wanted, partition_uuid), detached=True), f"sfdisk {disk}")
        return
    with made(device_size(disk), b"", script(wanted, partition_uuid)) as image:
        _copy(image, fd, gpt=True)


def half_written(disk: str, wanted: Wanted, limit: int) -> str:
    """The partition's UUID where a disk holds nothing but parts of our table for this volume, else ""."""
    size = device_size(disk)
    if sector_size(disk) != SECTOR or size < HEAD + TAIL:
        return ""
    with open(disk, "rb") as device:
        head = device.read(HEAD)
        device.seek(size - TAIL)
        tail = device.read(TAIL)
    name = str(uuid.UUID(bytes_le=tail[16:32]))  # the backup's entries were the first to be written
    try:
        uuid_seconds(name)
    except ValueError:
        return ""
    with made(size, b"", script(wanted, name)) as image, open(image, "rb") as file:
        ours = _part_of(head, file.read(HEAD))
        file.seek(size - TAIL)
        ours = ours and _part_of(tail, file.read(TAIL))
    return name if ours and read_content(disk, size - TAIL, limit, HEAD).proven_zero else ""


def write_grown(fd: int, facts: Facts, first_write: Callable[[], None]) -> None:
    """Enlarge the only partition; its start, type, UUID and name stay, and a GPT's backup moves to the disk's end.

    Raises Failed, with nothing written, if that isn't what sfdisk makes of it.
    """
    gpt, only = facts.table.kind == "gpt", facts.table.extents[0]
    with made(facts.disk.size, os.pread(fd, HEAD if gpt else SECTOR, 0), ",+\n", "-N", str(only.number)) as image:
        now = read_table(image)
        larger = len(now.extents) == 1 and now.extents[0].start == only.start and now.extents[0].size > only.size
        if not larger or now != replace(facts.table, extents=now.extents, warnings=now.warnings):
            raise Failed(f"sfdisk makes {now} of {facts.table} instead of a larger partition {only.number}")
        first_write()
        _copy(image, fd, gpt)


@contextlib.contextmanager
def made(size: int, head: bytes, data: str, *options: str) -> Iterator[str]:
    """A sparse file with what sfdisk makes of a disk of that size that begins with `head`."""
    with tempfile.TemporaryDirectory(prefix="labctl-table-", dir="/var/tmp") as place:
        image = os.path.join(place, "image")
        with open(image, "wb") as file:
            file.write(head)
            file.truncate(size)
        must(ask("sfdisk", *OPTIONS, *options, image, data=data), "sfdisk")
        yield image


def _copy(image: str, fd: int, gpt: bool) -> None:
    with open(image, "rb") as file:
        head = file.read(HEAD if gpt else SECTOR)
        if gpt:
            at = file.seek(-TAIL, os.SEEK_END)
            write_all(fd, file.read(TAIL), at)
            os.fsync(fd)
    write_all(fd, head, 0)
    os.fsync(fd)


def write_all(fd: int, data: bytes, offset: int) -> None:
    """Write all of `data`; the kernel may take it in pieces."""
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def _part_of(found: bytes, whole: bytes) -> bool:
    """Whether each sector is zero or the one that belongs there."""
    return all(
        found[at : at + SECTOR] == whole[at : at + SECTOR] or not found[at : at + SECTOR].strip(b"\0")
        for at in range(0, len(found), SECTOR)
    )


def read_table(path: str) -> Table:
    """The partition table as it is on the disk; an empty one if sfdisk can't read it."""
    answer = ask("sfdisk", "--json", path)
    try:
        table: dict[str, Any] = json.loads(answer.out)["partitiontable"] if answer.rc == 0 else {}
    except (ValueError, KeyError):
        table = {}
    unit, extents, names, uuids = int(table.get("sectorsize", 512)), [], {}, {}
    for row in table.get("partitions", []):
        digits = re.search(r"(\d+)$", str(row["node"]))
        number = int(digits.group(1)) if digits else 0
        extents.append(Extent(number, int(row["start"]) * unit, int(row["size"]) * unit))
        names[number] = str(row.get("name", ""))
        uuids[number] = str(row.get("uuid", "")).lower()
    return Table(
        kind=str(table.get("label", "")),
        guid=str(table.get("id", "")).lower(),
        sector=unit,
        extents=tuple(sorted(extents, key=lambda e: e.number)),
        names=names,
        uuids=uuids,
        warnings=tuple(line.strip() for line in answer.err.splitlines() if line.strip()),
    )
