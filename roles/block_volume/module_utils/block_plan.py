"""What may be done to a volume: a pure function over a snapshot of facts.

`decide` touches nothing and knows no tool. It returns the one plan that the facts allow:

- use         the volume holds one filesystem that is ours, or nobody's yet: mount it as it is
- initialise  every byte was read and is zero (or all that isn't is the table that an earlier run of ours
              wrote before it was cut off): partition it, make a filesystem, mount
- grow        like use, and the volume has room behind it, and it was asked for: what of growing is still to do
- stop        anything else; nothing may be written. Unknown counts as data.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ansible.module_utils import block_room
from ansible.module_utils.block_model import (
    INITIALISE,
    LAYOUT_VERSION,
    MARKER_PATH,
    USE,
    WHEN_BLANK,
    Area,
    Content,
    Extent,
    Facts,
    Marker,
    Plan,
    Wanted,
    stop,
)

ADVICE = (
    "see what it is with `lsblk -f`, `wipefs -n` and `sfdisk -l`; labctl never erases a volume, "
    "so empty it by hand if its content isn't needed"
)

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
    "vfat": "FAT, which knows no owners",
    "exfat": "exFAT, which knows no owners",
    "ntfs": "NTFS, which knows no owners of Linux",
}
SYSTEM_PATHS = {
    "bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "run", "sbin", "sys", "tmp", "usr",
}  # fmt: skip
SYSTEM_ROOTS = {
    "home", "lost+found", "media", "mnt", "opt", "root", "srv", "var", "var/lib", "var/lib/docker", "var/log",
}  # fmt: skip


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
        plan = _usable(facts, plan) or identity(facts.marker, wanted, plan)
        return block_room.grow(facts, wanted, plan) if plan.action == USE else plan
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


def backup_only(disk: Area) -> bool:
    """Whether all that is recognised is a GPT's header at the end: a run of ours that was cut off may leave that."""
    return not (disk.kind or disk.usage or disk.table) and {kind for _offset, kind in disk.signatures} == {"gpt"}


def areas(facts: Facts) -> tuple[Area, ...]:
    """The disk and its partitions."""
    return (facts.disk, *(p.area for p in facts.partitions))


def _device(facts: Facts, wanted: Wanted) -> Plan | None:
    disk = facts.disk
    if facts.root_disk:
        return stop(
            f"{disk.path} is the disk this machine runs from",
            expected=f"the disk of volume {wanted.volume_id or '(none given)'}",
            found=f"{disk.path}, which holds /",
            next_step="check block_volume_id and block_volume_device",
        )
    if not facts.whole_disk or disk.size == 0:
        found = "a partition" if not facts.whole_disk else "0 bytes"
        return stop(f"{disk.path} isn't a disk to use", "a whole disk", found, "name the disk in block_volume_device")
    if facts.serial and wanted.volume_id and wanted.volume_id[:20] not in facts.serial:
        accept = f"serial:{facts.serial}"
        if accept not in accepted(wanted):
            return stop(
                f"{disk.path} isn't the disk of this volume: its serial is another's",
                expected=f"volume {wanted.volume_id}, serial {wanted.volume_id[:20]}",
                found=f"serial {facts.serial}",
                next_step=_accept_command("attach the right volume", accept),
            )
    unknown = [text for area in areas(facts) for text in area.unknown]
    if unknown:
        return stop(
            "the disk's state can't be read completely, and unknown counts as data",
            expected="every check to answer",
            found="; ".join(unknown),
            next_step="install what is missing (packages fdisk, util-linux, e2fsprogs) or see `dmesg` for I/O errors",
        )
    return None


def _mount_point(facts: Facts, wanted: Wanted) -> Plan | None:
    path, state = wanted.mount_point, facts.mount_point
    refused = refuse_path(path)
    if not refused and (state.symlink or state.not_directory):
        refused = "a symbolic link leads there" if state.symlink else "it isn't a directory"
    if refused:
        return stop(f"{path} can't be the mount point: {refused}", next_step="choose another block_volume_mount_point")
    if state.source and not state.ours:
        return stop(
            f"something else is mounted at {path}",
            expected=f"{facts.disk.path} or nothing",
            found=state.source,
            next_step=f"labctl drain (it stops what uses {path} and unmounts it), or `umount {path}`; then run again",
        )
    if state.entries:
        return stop(
            f"{path} isn't empty: mounting over it would hide what is there",
            expected="an empty directory",
            found=f"{len(state.entries)} entries on the root disk: {', '.join(sorted(state.entries)[:5])}",
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
        return _contradiction(disk)
    if disk.table:
        return _table(facts) or _only_partition(facts, wanted)
    if facts.partitions:
        return stop(
            f"the kernel knows partitions of {disk.path}, but there is no partition table on it",
            expected="a table, or no partitions",
            found=", ".join(p.area.path for p in facts.partitions),
            next_step="the table may have been destroyed: look for its backup with `gdisk`, don't write to the disk",
        )
    if disk.content.unfinished:
        return _blank(disk, wanted, resume=True)
    if disk.kind or disk.usage or disk.signatures:
        return _filesystem(disk, 0)
    return _blank(disk, wanted, resume=False)


def _contradiction(area: Area) -> Plan:
    found = ", ".join(f"{kind} at byte {offset}" for offset, kind in area.signatures)
    return stop(f"{area.path} carries signatures that contradict each other", "one filesystem", found, ADVICE)


def _table(facts: Facts) -> Plan | None:
    """What is wrong with a disk's partition table, if anything is."""
    return _damage(facts.disk) or _partitions(facts)


def _damage(disk: Area) -> Plan | None:
    """Whether the table is half destroyed, or not alone."""
    strays = {kind for _offset, kind in disk.signatures} - {"gpt", "PMBR", "dos"}
    if disk.kind or disk.usage or strays:
        found = f"{disk.table} and {disk.kind or ', '.join(sorted(strays))}"
        return stop(f"{disk.path} has a partition table and something else on it", "one of both", found, ADVICE)
    if disk.table == "PMBR":
        return stop(
            f"the GPT of {disk.path} is damaged, or the disk is smaller than it was: nothing but its MBR is left",
            expected="a GPT, primary and backup",
            found=f"a protective MBR on {disk.size} bytes",
            next_step="attach the volume in its full size, or look with `gdisk` after a snapshot of the volume",
        )
    if disk.table == "gpt" and not any(kind == "gpt" and offset < 8192 for offset, kind in disk.signatures):
        return stop(
            f"the primary GPT of {disk.path} is destroyed; its backup at the end of the disk is intact",
            expected="a primary GPT header",
            found="the backup only",
            next_step=f"restore it with `gdisk {disk.path}` (r, b, w) after a snapshot of the volume",
        )
    return None


def _partitions(facts: Facts) -> Plan | None:
    """Whether there is one partition, whole, and the kernel knows it."""
    disk, table = facts.disk, facts.table
    if any(extent.end > disk.size for extent in table.extents):
        return stop(
            f"{disk.path} is smaller than its partition: its end is missing",
            expected=f"at least {max(e.end for e in table.extents)} bytes",
            found=f"{disk.size} bytes",
            next_step="attach the volume in its full size; nothing can be read of what is missing",
        )
    kernel = sorted((p.extent for p in facts.partitions), key=lambda e: e.number)
    if list(table.extents) != kernel and not _enlarged(facts):
        return stop(
            f"the kernel and the table on {disk.path} disagree about its partitions",
            expected=_extents(table.extents),
            found="; ".join([_extents(kernel), *table.warnings]),
            next_step=f"`partx --update {disk.path}` or reboot; if it stays, see `sfdisk -l {disk.path}`",
        )
    if len(facts.partitions) != 1:
        found = f"{len(facts.partitions) or 'no'} partitions"
        return stop(f"{disk.path} has {found}", "one partition with a filesystem, or a blank disk", found, ADVICE)
    return None


def _enlarged(facts: Facts) -> bool:
    """Whether the table differs only by a larger end of a partition with a filesystem: growing was cut off there."""
    if len(facts.partitions) != 1 or len(facts.table.extents) != 1:
        return False
    disk, kernel, area = facts.table.extents[0], facts.partitions[0].extent, facts.partitions[0].area
    same_start = (disk.number, disk.start) == (kernel.number, kernel.start)
    return same_start and kernel.size < disk.size and area.usage == "filesystem"


def _only_partition(facts: Facts, wanted: Wanted) -> Plan:
    only = facts.partitions[0]
    if only.area.ambivalent:
        return _contradiction(only.area)
    if only.area.kind or only.area.usage or only.area.table or only.area.signatures:
        return _filesystem(only.area, only.extent.number)
    if ours(facts, wanted):
        return _blank(only.area, wanted, resume=True)
    name = facts.table.names.get(only.extent.number, "")
    return stop(
        f"{only.area.path} holds no filesystem that is known",
        expected="a filesystem",
        found=f"a partition named '{name}', {_bytes_found(only.area.content)}",
        next_step=ADVICE,
    )


def ours(facts: Facts, wanted: Wanted) -> bool:
    """Whether the table is the one that labctl writes for this very volume.

    It is written only on a disk that was read and found zero, so what the partition holds came after.
    """
    if len(facts.partitions) != 1 or facts.table.kind != "gpt" or facts.table.names.get(1) != partition_name(wanted):
        return False
    return not is_uuid(wanted.volume_id) or facts.table.guid == wanted.volume_id.lower()


def _filesystem(area: Area, number: int) -> Plan:
    if not (area.kind or area.table) and {kind for _offset, kind in area.signatures} in ({"ext2"}, {"ext3"}, {"ext4"}):
        return stop(
            f"the superblock of the ext filesystem on {area.path} is damaged",
            expected="a superblock whose checksum is right",
            found="a magic number, and nothing else that fits (a tool that was killed while it wrote leaves that)",
            next_step=f"after a snapshot of the volume: `e2fsck -f {area.path}` (it asks before each repair)",
        )
    what = NOT_VOLUMES.get(area.kind) or ("a member of something larger" if area.kind.endswith("_member") else "")
    if area.table:
        what = f"a partition table ({area.table}) of its own"
    elif not what and area.usage != "filesystem":
        what = f"{area.kind or ', '.join(kind for _offset, kind in area.signatures)} ({area.usage or 'of unknown use'})"
    if what:
        return stop(f"{area.path} holds {what}", "a filesystem that can be mounted", area.kind or what, ADVICE)
    others = {kind for _offset, kind in area.signatures} - _family(area.kind)
    if others:
        found = ", ".join([area.kind, *sorted(others)])
        return stop(f"{area.path} holds {area.kind} and signatures of something else", area.kind, found, ADVICE)
    if not area.uuid:
        advice = "give it one with the filesystem's own tool"
        return stop(f"the {area.kind} on {area.path} has no UUID to mount it by", "a UUID", "none", advice)
    if area.filesystem_size > area.size:
        return stop(
            f"{area.path} is smaller than its filesystem: its end is missing",
            expected=f"at least {area.filesystem_size} bytes",
            found=f"{area.size} bytes",
            next_step="attach the volume in its full size; nothing can be read of what is missing",
        )
    return Plan(USE, f"{area.path} holds {area.kind}: mounted as it is", area.path, number, area.kind, area.uuid)


def _family(kind: str) -> set[str]:
    """Signatures that belong to one filesystem: wipefs may name another member."""
    return {"ext2", "ext3", "ext4"} if kind in ("ext2", "ext3", "ext4") else {kind}


def _blank(area: Area, wanted: Wanted, resume: bool) -> Plan:
    content = area.content
    if content.data_at is not None and not (resume and content.unfinished):
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
    if not (content.proven_zero or content.unfinished):
        limit = -(-area.size // 2**30)
        return stop(
            f"{area.path} looks blank but is too large to be read whole: {_gib(area.size)} GiB",
            expected="every byte read, so that nothing is lost",
            found=_bytes_found(content),
            next_step=f"set block_volume_read_limit_gib: {limit} (takes about {_minutes(area)} minutes, once)",
        )
    how = "the run that began to partition or format it was cut off" if resume else "every byte of it is zero"
    return Plan(INITIALISE, f"{area.path}: {how}", area.path, 1, "ext4", resume=resume)


def _usable(facts: Facts, plan: Plan) -> Plan | None:
    """Whether nobody else uses what is to be mounted, and it is the only one of its kind."""
    mounted, target = facts.mount_point.ours, next(a for a in areas(facts) if a.path == plan.device)
    problem = _used_elsewhere(facts)
    if problem:
        return problem
    if target.read_only or (mounted and facts.mount_point.read_only):
        return stop(
            f"{target.path} is {'mounted ' if mounted else ''}read-only",
            expected="a volume that can be written",
            found="read-only (the kernel makes it so after an I/O or filesystem error, the cloud if it was told to)",
            next_step="see `dmesg`; for errors: `labctl drain`, `e2fsck` the volume, converge again",
        )
    if mounted and facts.mount_point.source != plan.device:
        return stop("another part of this disk is mounted", plan.device, facts.mount_point.source, "unmount it")
    if target.busy and not mounted:
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
    return None


def _used_elsewhere(facts: Facts) -> Plan | None:
    for area in areas(facts):
        if area.mounted_at and not facts.mount_point.ours:
            where, advice = ", ".join(area.mounted_at), f"stop what uses it, then `umount {area.mounted_at[0]}`"
            return stop(f"{area.path} is mounted elsewhere", "not mounted", where, advice)
        if area.swap or area.holders:
            users, advice = (
                "swap" if area.swap else ", ".join(area.holders),
                "release it first (swapoff, dmsetup, mdadm)",
            )
            return stop(f"{area.path} is in use by {users}", "no user", users, advice)
    return None


def _writable(facts: Facts, plan: Plan) -> Plan | None:
    """Whether a blank disk is nobody's at this moment."""
    for area in areas(facts):
        flags = {"swap": area.swap, "an exclusive user": area.busy, "read-only": area.read_only}
        uses = [*area.mounted_at, *area.holders, *(name for name, there in flags.items() if there)]
        if uses:
            advice = "find the user with `lsblk` and `fuser -v`"
            return stop(f"{area.path} is blank but can't be had alone", "no user", ", ".join(uses), advice)
    if facts.mount_point.source:
        return stop("the mount point is in use", plan.device, facts.mount_point.source, "unmount it")
    return None


def identity(marker: Marker, wanted: Wanted, plan: Plan) -> Plan:
    """Compare the marker with the lab, the volume id and the filesystem's UUID: the plan to use it, or a stop."""
    values = marker.values
    if marker.problem and not marker.stale:
        return stop(
            f"the volume, or the marker {MARKER_PATH} on it, can't be read",
            expected="no marker, or a JSON object written by labctl",
            found=marker.problem,
            next_step="look at it by a read-only mount; a damaged marker may be moved away on purpose",
        )
    if not values:
        return replace(plan, adopt=True)
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
    accept = marker_identity(values)
    if accept in accepted(wanted):
        return replace(plan, accepted=True)
    return stop(
        f"the volume {' and '.join(MISMATCH[key] for key in differs)}",
        expected=_identities(expected),
        found=_identities({key: str(values.get(key, "")) for key in expected}),
        next_step=_accept_command("attach the right volume", accept),
    )


def accepted(wanted: Wanted) -> list[str]:
    """The identities that are taken over on purpose."""
    return [text for text in wanted.accept_marker.split(",") if text]


def _accept_command(instead: str, name: str) -> str:
    command = f"labctl converge --accept-volume {shlex.quote(name)}"
    return f"{instead}; to take this one over on purpose: {command} (plain Ansible: block_volume_accept_marker)"


MISMATCH = {
    "lab": "belongs to another lab",
    "volume_id": "is a copy of another volume, or from another cloud",
    "filesystem_uuid": "carries the marker of another filesystem",
}


def marker_identity(values: Mapping[str, Any]) -> str:
    """What block_volume_accept_marker must say to take a volume with this marker over."""
    return "/".join(str(values.get(key) or "-") for key in ("lab", "volume_id", "filesystem_uuid"))


def _identities(values: Mapping[str, str]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value or '(none)'}" for key, value in values.items())


def _extents(extents: Iterable[Extent]) -> str:
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
