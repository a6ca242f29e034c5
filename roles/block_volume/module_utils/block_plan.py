"""What may be done to a volume: a pure function over a snapshot of facts.

`decide` touches nothing and knows no tool. It returns the one plan that the facts allow:

- use         the volume holds one filesystem that is ours, or nobody's yet: mount it as it is
- initialise  every byte was read and is zero (or all that isn't is the table that an earlier run of ours
              wrote before it was cut off): partition it, make a filesystem, mount
- stop        anything else; nothing may be written. Unknown counts as data.

Sizes and offsets are bytes everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

USE, INITIALISE, STOP = "use", "initialise", "stop"
WHEN_BLANK, NEVER = "when_blank", "never"
LAYOUT_VERSION = 1
MARKER_PATH = ".labctl/volume.json"
ADVICE = "see what it is with `lsblk -f`, `wipefs -n` and `sfdisk -l`; labctl never erases a volume, so empty it by hand if its content isn't needed"

# libblkid says USAGE=filesystem of some things that can't be mounted by themselves or never written to.
NOT_VOLUMES = {
    "zfs_member": "a member of a ZFS pool",
    "ceph_bluestore": "a Ceph OSD",
    "VMFS": "a VMware datastore",
    "VMFS_volume_member": "a VMware datastore",
    "LVM2_member": "an LVM physical volume",
    "LVM1_member": "an LVM physical volume",
    "crypto_LUKS": "LUKS encryption",
    "BitLocker": "BitLocker encryption",
    "linux_raid_member": "a member of a Linux software RAID",
    "ddf_raid_member": "a member of a hardware RAID",
    "isw_raid_member": "a member of a hardware RAID",
    "bcache": "a bcache device",
    "drbd": "a DRBD device",
    "swap": "swap space",
    "swsuspend": "a suspended system's memory",
    "jbd": "another filesystem's journal",
    "iso9660": "a read-only disc image",
    "udf": "a disc image",
    "squashfs": "a read-only image",
    "erofs": "a read-only image",
    "cramfs": "a read-only image",
    "romfs": "a read-only image",
}
SYSTEM_PATHS = (
    "bin",
    "boot",
    "dev",
    "etc",
    "lib",
    "lib32",
    "lib64",
    "libx32",
    "proc",
    "run",
    "sbin",
    "sys",
    "tmp",
    "usr",
)
SYSTEM_ROOTS = (
    "home",
    "media",
    "mnt",
    "opt",
    "root",
    "srv",
    "var",
    "var/lib",
    "var/log",
    "var/lib/docker",
    "lost+found",
)


@dataclass(frozen=True)
class Content:
    """What reading a device's bytes showed: `proven_zero` only if every one of them was read."""

    proven_zero: bool = False
    data_at: int | None = None  # the first byte found that isn't zero
    bytes_read: int = 0
    seconds: float = 0.0
    remains_of_mkfs: bool = False  # not zero, but only where mkfs with the planned arguments writes


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
    unknown: tuple[str, ...] = ()  # tools that failed or are missing, in their own words


@dataclass(frozen=True)
class Extent:
    """Where a partition lies: by the table on the disk or by the kernel."""

    number: int
    start: int
    size: int


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
    extents: tuple[Extent, ...] = ()
    names: Mapping[int, str] = field(default_factory=dict)
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


@dataclass(frozen=True)
class Wanted:
    """What the role was asked for."""

    mount_point: str
    volume_id: str = ""
    lab: str = ""
    format: str = WHEN_BLANK
    accept_marker: str = ""


@dataclass(frozen=True)
class Plan:
    """What to do, and why. `device` is what gets mounted, or the disk to initialise.

    `number` is the partition's number, 0 for a filesystem on the whole disk. `resume`: the table is there already.
    `adopt`: the filesystem has no marker yet. `accepted`: the marker of another identity is replaced on purpose.
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
    expected: str = ""
    found: str = ""
    next_step: str = ""


def stop(reason: str, expected: str = "", found: str = "", next_step: str = "") -> Plan:
    """The plan that writes nothing."""
    return Plan(STOP, reason, expected=expected, found=found, next_step=next_step)


def partition_name(wanted: Wanted) -> str:
    """The GPT name of our partition: the same 20 characters that the disk's serial shows (a name holds 36)."""
    return f"labctl:{(wanted.volume_id or wanted.lab or 'volume')[:20]}"


def is_uuid(text: str) -> bool:
    """Whether a volume id can serve as a GPT's disk GUID."""
    return bool(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text.lower()))


def decide(facts: Facts, wanted: Wanted) -> Plan:
    """The plan for this disk. Pure: same facts, same plan."""
    for step in (_device, _mount_point):
        refusal = step(facts, wanted)
        if refusal:
            return refusal
    plan = _content(facts, wanted)
    if plan.action == USE:
        return _usable(facts, plan) or identity(facts.marker, wanted, plan)
    if plan.action == INITIALISE:
        return _writable(facts, plan) or plan
    return plan


def refuse_path(path: str) -> str:
    """Why a path can't be a mount point, or "" if it can."""
    if not re.fullmatch(r"(/[A-Za-z0-9._+-]+)+", path) or any(part in (".", "..") for part in path.split("/")):
        return "it must be an absolute path of plain names (letters, digits, . _ + -)"
    parts = path.strip("/").split("/")
    if parts[0] in SYSTEM_PATHS or "/".join(parts) in SYSTEM_ROOTS:
        return "it belongs to the system"
    return ""


def content_wanted(area: Area, partitioned: bool = False) -> bool:
    """Whether the decision may depend on every byte of a device: nothing on it was recognised."""
    return not (
        area.kind or area.usage or area.table or area.signatures or area.ambivalent or area.unknown or partitioned
    )


def _device(facts: Facts, wanted: Wanted) -> Plan | None:
    disk = facts.disk
    if facts.root_disk:
        return stop(
            f"{disk.path} is the disk this machine runs from",
            expected=f"the disk of volume {wanted.volume_id or '(none given)'}",
            found=f"{disk.path}, which holds /",
            next_step="check block_volume_id / block_volume_device",
        )
    if not facts.whole_disk:
        return stop(
            f"{disk.path} is a partition", "a whole disk", "a partition", "name the disk in block_volume_device"
        )
    if disk.size == 0:
        return stop(f"{disk.path} has no size", "a disk", "0 bytes", "detach and attach the volume again")
    unknown = [text for area in (disk, *(p.area for p in facts.partitions)) for text in area.unknown]
    if unknown:
        return stop(
            "the disk's state can't be read completely, and unknown counts as data",
            expected="every check to answer",
            found="; ".join(unknown),
            next_step="install what is missing (packages fdisk, util-linux, e2fsprogs) or look at the disk's I/O errors in `dmesg`",
        )
    return None


def _mount_point(facts: Facts, wanted: Wanted) -> Plan | None:
    path, state = wanted.mount_point, facts.mount_point
    refused = refuse_path(path)
    if refused:
        return stop(f"{path} can't be the mount point: {refused}", next_step="choose another block_volume_mount_point")
    if state.symlink or state.not_directory:
        what = "a symbolic link leads there" if state.symlink else "it isn't a directory"
        return stop(
            f"{path} can't be the mount point: {what}", "a directory", what, "choose another path or move it away"
        )
    if state.source and not state.ours:
        return stop(
            f"something else is mounted at {path}",
            expected=f"{facts.disk.path} or nothing",
            found=state.source,
            next_step=f"stop what uses {path}, then `umount {path}`",
        )
    if state.entries:
        names = ", ".join(sorted(state.entries)[:5])
        return stop(
            f"{path} isn't empty: mounting over it would hide what is there",
            expected="an empty directory",
            found=f"{len(state.entries)} entries on the root disk: {names}",
            next_step=f"move the content of {path} away",
        )
    if state.fstab_claim:
        return stop(
            f"another line of /etc/fstab claims {path}",
            expected="no line, or the one of this volume",
            found=state.fstab_claim,
            next_step="remove that line, or choose another block_volume_mount_point",
        )
    return None


def _content(facts: Facts, wanted: Wanted) -> Plan:
    disk = facts.disk
    if disk.ambivalent:
        found = ", ".join(f"{kind} at byte {offset}" for offset, kind in disk.signatures)
        return stop(f"{disk.path} carries signatures that contradict each other", "one filesystem", found, ADVICE)
    if disk.table:
        return _partitioned(facts, wanted)
    if facts.partitions:
        return stop(
            f"the kernel knows partitions of {disk.path}, but there is no partition table on it",
            expected="a table, or no partitions",
            found=", ".join(p.area.path for p in facts.partitions),
            next_step="the table may have been destroyed: look for its backup with `gdisk`, don't write to the disk",
        )
    if disk.kind or disk.usage:
        return _filesystem(disk, 0)
    return _blank(disk, wanted, resume=False)


def _partitioned(facts: Facts, wanted: Wanted) -> Plan:
    disk, table = facts.disk, facts.table
    strays = [s for s in disk.signatures if s[1] not in ("gpt", "PMBR", "dos")]
    if disk.kind or disk.usage or strays:
        also = disk.kind or ", ".join(kind for _offset, kind in strays)
        return stop(
            f"{disk.path} has a partition table and something else on it",
            "one of both",
            f"{disk.table} and {also}",
            ADVICE,
        )
    if disk.table == "gpt" and not any(kind == "gpt" and offset < 8192 for offset, kind in disk.signatures):
        return stop(
            f"the primary GPT of {disk.path} is destroyed; its backup at the end of the disk is intact",
            expected="a primary GPT header",
            found="the backup only",
            next_step=f"restore it with `gdisk {disk.path}` (r, b, w) after a snapshot of the volume",
        )
    kernel = sorted((p.extent for p in facts.partitions), key=lambda e: e.number)
    if list(table.extents) != kernel:
        return stop(
            f"the kernel and the table on {disk.path} disagree about its partitions",
            expected=_extents(table.extents),
            found=_extents(kernel) + ("".join(f"; {w}" for w in table.warnings)),
            next_step=f"`partx --update {disk.path}` or reboot; if it stays, look at the table with `sfdisk -l {disk.path}`",
        )
    if len(facts.partitions) != 1:
        found = f"{disk.table} table with {len(facts.partitions) or 'no'} partitions"
        return stop(
            f"{disk.path} has {found.split('with ')[1]}",
            "one partition with a filesystem, or a blank disk",
            found,
            ADVICE,
        )
    only = facts.partitions[0]
    if only.area.ambivalent:
        return stop(
            f"{only.area.path} carries signatures that contradict each other",
            "one filesystem",
            str(only.area.signatures),
            ADVICE,
        )
    if only.area.kind or only.area.usage or only.area.table:
        return _filesystem(only.area, only.extent.number)
    if not ours(facts, wanted):
        return stop(
            f"{only.area.path} holds no filesystem that is known",
            expected="a filesystem",
            found=f"a partition named '{facts.table.names.get(only.extent.number, '')}', "
            + _bytes_found(only.area.content),
            next_step=ADVICE,
        )
    return _blank(only.area, wanted, resume=True)


def ours(facts: Facts, wanted: Wanted) -> bool:
    """Whether the table is the one that labctl writes for this very volume.

    It is written only on a disk that was read and found zero, so what the partition holds came after.
    """
    if len(facts.partitions) != 1 or facts.table.kind != "gpt" or facts.table.names.get(1) != partition_name(wanted):
        return False
    return not is_uuid(wanted.volume_id) or facts.table.guid == wanted.volume_id.lower()


def _filesystem(area: Area, number: int) -> Plan:
    what = NOT_VOLUMES.get(area.kind) or ("a member of something larger" if area.kind.endswith("_member") else "")
    if area.table:
        what = f"a partition table ({area.table}) of its own"
    elif not what and area.usage != "filesystem":
        what = f"{area.kind or 'something'} ({area.usage or 'of unknown use'})"
    others = {kind for _offset, kind in area.signatures} - {area.kind}
    # ext4's own history: wipefs names the family member it sees
    others -= {"ext2", "ext3", "ext4"} if area.kind.startswith("ext") else set()
    if what:
        return stop(f"{area.path} holds {what}", "a filesystem that can be mounted", area.kind or area.table, ADVICE)
    if others and not area.kind.startswith("vfat"):
        found = ", ".join([area.kind, *sorted(others)])
        return stop(f"{area.path} holds {area.kind} and signatures of something else", area.kind, found, ADVICE)
    if not area.uuid:
        return stop(
            f"the {area.kind} on {area.path} has no UUID to mount it by",
            "a UUID",
            "none",
            "give it one with its own tool",
        )
    return Plan(USE, f"{area.path} holds {area.kind}: mounted as it is", area.path, number, area.kind, area.uuid)


def _blank(area: Area, wanted: Wanted, resume: bool) -> Plan:
    content = area.content
    if content.data_at is not None and not (resume and content.remains_of_mkfs):
        return stop(
            f"{area.path} holds data of an unknown kind",
            expected="a filesystem, or a disk that is zero from the first byte to the last",
            found=_bytes_found(content),
            next_step=ADVICE,
        )
    if wanted.format != WHEN_BLANK:
        return stop(
            f"{area.path} looks blank, and making a filesystem isn't allowed",
            expected="a filesystem (block_volume_format: never)",
            found="none",
            next_step="set block_volume_format: when_blank if this is the right volume",
        )
    if not (content.proven_zero or content.remains_of_mkfs):
        return stop(
            f"{area.path} looks blank but is too large to be read whole: {_gib(area.size)} GiB",
            expected="every byte read, so that nothing is lost",
            found=_bytes_found(content),
            next_step=f"set block_volume_read_limit_gib: {-(-area.size // 2**30)} (reading takes about {_minutes(area)} minutes, once)",
        )
    how = "the run that partitioned it was cut off" if resume else "every byte of it is zero"
    return Plan(INITIALISE, f"{area.path}: {how}", area.path, 1, "ext4", resume=resume)


def _usable(facts: Facts, plan: Plan) -> Plan | None:
    """Whether nobody else uses what is to be mounted."""
    for area in (facts.disk, *(p.area for p in facts.partitions)):
        if area.mounted_at and not facts.mount_point.ours:
            where = ", ".join(area.mounted_at)
            next_step = f"stop what uses it, then `umount {area.mounted_at[0]}`"
            return stop(f"{area.path} is mounted elsewhere", "not mounted", where, next_step)
        if area.swap or area.holders:
            by = "swap" if area.swap else ", ".join(area.holders)
            return stop(
                f"{area.path} is in use by {by}",
                "no user",
                by,
                "release it first (`swapoff`, `dmsetup`, `mdadm --stop`)",
            )
    target = next(a for a in (facts.disk, *(p.area for p in facts.partitions)) if a.path == plan.device)
    if target.read_only:
        return stop(f"{target.path} is read-only", "a volume that can be written", "read-only", "attach it read-write")
    if facts.mount_point.ours and facts.mount_point.source != plan.device:
        return stop("another partition of this disk is mounted", plan.device, facts.mount_point.source, "unmount it")
    if target.busy and not facts.mount_point.ours:
        return stop(
            f"{target.path} is in use although it isn't mounted here",
            expected="exclusive access",
            found="another program, or a mount in another namespace (a container), holds it",
            next_step="stop the containers that use it, or reboot",
        )
    if facts.same_uuid:
        return stop(
            f"several devices hold a filesystem with the UUID {plan.uuid}: one is a copy of the other",
            expected=plan.device,
            found=", ".join((plan.device, *facts.same_uuid)),
            next_step="detach the copy, or give it a UUID of its own (`tune2fs -U random`)",
        )
    if facts.mount_point.ours and facts.mount_point.read_only:
        return stop(
            f"{plan.device} is mounted read-only",
            expected="read-write",
            found="ro (the kernel does that after an I/O or filesystem error)",
            next_step="see `dmesg`; then `labctl drain`, `e2fsck` the volume, and converge again",
        )
    return None


def _writable(facts: Facts, plan: Plan) -> Plan | None:
    for area in (facts.disk, *(p.area for p in facts.partitions)):
        uses = [
            *area.mounted_at,
            *area.holders,
            *(["swap"] if area.swap else []),
            *(["an exclusive user"] if area.busy else []),
        ]
        if uses:
            return stop(
                f"{area.path} is blank but in use",
                "no user",
                ", ".join(uses),
                "find the user with `lsblk` and `fuser -v`",
            )
        if area.read_only:
            return stop(
                f"{area.path} is blank but read-only",
                "a volume that can be written",
                "read-only",
                "attach it read-write",
            )
    if facts.mount_point.source:
        return stop("the mount point is in use", plan.device, facts.mount_point.source, "unmount it")
    return None


def identity(marker: Marker, wanted: Wanted, plan: Plan) -> Plan:
    """Compare the marker with the lab, the volume id and the filesystem's UUID: the plan to use it, or a stop."""
    values = marker.values
    if marker.problem and not marker.stale:
        return stop(
            f"the volume, or the marker {MARKER_PATH} on it, can't be read",
            expected="none, or a JSON object written by labctl",
            found=marker.problem,
            next_step="look at it by a read-only mount; a damaged marker may be moved away on purpose",
        )
    if not values:
        return _with(plan, adopt=True)
    version = values.get("layout_version")
    if not isinstance(version, int) or version > LAYOUT_VERSION:
        return stop(
            "the volume was written by a newer labctl",
            expected=f"layout version {LAYOUT_VERSION} or older",
            found=str(version),
            next_step="use that labctl, or a newer one",
        )
    # no id or lab given: nothing to compare with; the filesystem's UUID always is
    expected = {"lab": wanted.lab, "volume_id": wanted.volume_id, "filesystem_uuid": plan.uuid}
    differs = [key for key, value in expected.items() if value and values.get(key) and values[key] != value]
    if not differs:
        return plan
    found = {key: str(values.get(key, "")) for key in expected}
    if wanted.accept_marker and wanted.accept_marker == marker_identity(values):
        return _with(plan, accepted=True)
    what = {
        "lab": "belongs to another lab",
        "volume_id": "is a copy of another volume, or of another cloud",
        "filesystem_uuid": "has a marker that was copied to it",
    }
    return stop(
        f"the volume {' and '.join(what[key] for key in differs)}",
        expected=_identities(expected),
        found=_identities(found),
        next_step=f"attach the right volume; or, to take this one over on purpose, set block_volume_accept_marker: {marker_identity(values)}",
    )


def marker_identity(values: Mapping[str, Any]) -> str:
    """What block_volume_accept_marker must say to take a volume with this marker over."""
    return f"{values.get('lab') or '-'}/{values.get('volume_id') or '-'}/{values.get('filesystem_uuid') or '-'}"


def _with(plan: Plan, **changes: Any) -> Plan:
    return Plan(**{**plan.__dict__, **changes})


def _identities(values: Mapping[str, str]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value or '(none)'}" for key, value in values.items())


def _extents(extents: Any) -> str:
    return ", ".join(f"#{e.number} {e.start}+{e.size}" for e in extents) or "no partitions"


def _bytes_found(content: Content) -> str:
    if content.data_at is not None:
        return f"a byte that isn't zero at offset {content.data_at}"
    return f"{_gib(content.bytes_read)} GiB read, all zero"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}".rstrip("0").rstrip(".")


def _minutes(area: Area) -> int:
    speed = area.content.bytes_read / area.content.seconds if area.content.seconds else 0
    return max(1, round(area.size / speed / 60)) if speed else 1
