"""The facts of a volume, what is wanted of it, and the plan that follows: plain values, no behaviour.

Sizes and offsets are bytes everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

USE, INITIALISE, GROW, STOP = "use", "initialise", "grow", "stop"
WHEN_BLANK, NEVER = "when_blank", "never"
LAYOUT_VERSION = 1
MARKER_PATH = ".labctl/volume.json"


@dataclass(frozen=True)
class Content:
    """What reading a device's bytes showed: `proven_zero` only if every one of them was read."""

    proven_zero: bool = False
    data_at: int | None = None  # the first byte found that isn't zero
    bytes_read: int = 0
    seconds: float = 0.0
    unfinished: bool = False  # not zero, but all of it belongs to our table, or to the filesystem that it announces


@dataclass(frozen=True)
class Area:
    """A block device, whole disk or partition, as the tools describe it."""

    path: str
    size: int
    kind: str = ""  # libblkid's TYPE
    usage: str = ""  # libblkid's USAGE: filesystem, raid, crypto, other
    uuid: str = ""
    table: str = ""  # libblkid's PTTYPE
    signatures: tuple[tuple[int, str], ...] = ()  # wipefs: (offset, type)
    ambivalent: bool = False
    holders: tuple[str, ...] = ()
    mounted_at: tuple[str, ...] = ()
    swap: bool = False
    busy: bool = False  # O_EXCL was refused
    read_only: bool = False
    content: Content = Content()
    filesystem_size: int = 0  # by its superblock; 0: not known
    unknown: tuple[str, ...] = ()  # tools that failed or are missing, in their own words


@dataclass(frozen=True)
class Extent:
    """Where a partition lies: by the table on the disk or by the kernel."""

    number: int
    start: int
    size: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.start + self.size


@dataclass(frozen=True)
class Partition:
    """A partition that the kernel knows."""

    extent: Extent
    area: Area


@dataclass(frozen=True)
class Table:
    """The partition table on the disk; `guid` is a GPT's disk GUID, lower case."""

    kind: str = ""
    guid: str = ""
    sector: int = 512
    extents: tuple[Extent, ...] = ()
    names: Mapping[int, str] = field(default_factory=dict)
    uuids: Mapping[int, str] = field(default_factory=dict)  # PARTUUIDs, lower case
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class MountPoint:
    """The state of the mount point; `fstab_claim` is another volume's line in /etc/fstab."""

    source: str = ""  # the device mounted there, "" if none
    ours: bool = False  # ... and it is (a partition of) this disk
    read_only: bool = False
    entries: tuple[str, ...] = ()  # what lies in the directory while nothing is mounted
    not_directory: bool = False
    symlink: bool = False
    fstab_claim: str = ""


@dataclass(frozen=True)
class Marker:
    """The marker found on the volume. `problem` says why it couldn't be read."""

    values: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    stale: bool = False  # read past a journal that may hold a newer one: compared again once it is mounted


@dataclass(frozen=True)
class Facts:
    """One snapshot of everything a decision needs."""

    disk: Area
    serial: str = ""
    root_disk: bool = False
    whole_disk: bool = True
    table: Table = Table()
    partitions: tuple[Partition, ...] = ()
    mount_point: MountPoint = MountPoint()
    marker: Marker = Marker()
    same_uuid: tuple[str, ...] = ()  # other devices that hold a filesystem of the same UUID
    behind: Content = Content()  # what lies behind the partition (or the filesystem), but for backups of its own GPT
    missing_tool: str = ""  # the program that would grow the filesystem, where it isn't installed


@dataclass(frozen=True)
class Wanted:
    """What the role was asked for."""

    mount_point: str
    volume_id: str = ""
    lab: str = ""
    format: str = WHEN_BLANK
    accept_marker: str = ""
    grow: bool = False


@dataclass(frozen=True)
class Plan:
    """What to do, and why. `device` is what gets mounted, or the disk to initialise.

    `number` is the partition's number, 0 for a filesystem on the whole disk. `resume`: the table is there already.
    `adopt`: the filesystem has no marker yet. `accepted`: the marker of another identity is replaced on purpose.
    `grow_table`, `tell_kernel`, `grow_filesystem`: the steps of a `grow`, in that order; an interrupted one has
    fewer left. `note`: what a person may want to know of a plan that goes on.
    """

    action: str
    reason: str
    device: str = ""
    number: int = 0
    filesystem: str = ""
    uuid: str = ""
    resume: bool = False
    adopt: bool = False
    accepted: bool = False
    grow_table: bool = False
    tell_kernel: bool = False
    grow_filesystem: bool = False
    note: str = ""
    expected: str = ""
    found: str = ""
    next_step: str = ""

    @property
    def usable(self) -> bool:
        """Whether there is a filesystem to mount as it is."""
        return self.action in (USE, GROW)


def stop(reason: str, expected: str = "", found: str = "", next_step: str = "") -> Plan:
    """The plan that writes nothing."""
    return Plan(STOP, reason, expected=expected, found=found, next_step=next_step)
