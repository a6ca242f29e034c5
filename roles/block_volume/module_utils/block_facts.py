"""Reads everything about a volume's disk that a decision needs, and writes nothing.

What can't be found out goes into `unknown` of the area it concerns; the planner stops on it.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace

from ansible.module_utils import block_room
from ansible.module_utils.block_bytes import device_size, read_behind, read_content, unfinished
from ansible.module_utils.block_host import (
    ask,
    device_number,
    exclusive_refused,
    installed,
    kernel_path,
    mounts,
    plain,
    read_text,
    root_disks,
    serial_of,
    sysfs,
)
from ansible.module_utils.block_model import (
    MARKER_PATH,
    Area,
    Extent,
    Facts,
    Marker,
    MountPoint,
    Partition,
    Table,
    Wanted,
)
from ansible.module_utils.block_plan import backup_only, content_wanted, partition_name
from ansible.module_utils.block_superblock import ext_state, filesystem_size
from ansible.module_utils.block_table import half_written, read_table

MARKER_LIMIT = 1 << 20  # bytes
# Mounted like this nothing is written, not even a journal's replay.
UNTOUCHED = {
    "ext3": "noload",
    "ext4": "noload",
    "xfs": "norecovery",
    "btrfs": "rescue=nologreplay",
    "f2fs": "norecovery",
}

# Looks at $5 on device $3, in a mount namespace of its own: a run that is killed leaves no mount behind.
LOOK = """
mount -t "$1" -o "$2" "$3" "$4" || exit 90
cd "$4" || exit 91
rc=92
if [ -L .labctl ] || [ -L "$5" ]; then
  echo "a symbolic link is in its way" >&2; rc=93
elif [ -e "$5" ]; then
  head -c 1048576 "$5"; rc=$?
fi
cd / && umount "$4"
exit $rc
"""


# -- the snapshot -------------------------------------------------------------------------------------


def snapshot(disk_path: str, wanted: Wanted, read_limit: int) -> Facts:
    """Everything about one disk. `read_limit`: bytes up to which an unrecognised device is read whole."""
    number = device_number(disk_path)
    home = sysfs(number)
    disk = read_area(disk_path)
    table = read_table(disk_path) if disk.table else Table()
    partitions = [
        read_partition(f"{home}/{child}", table, wanted, read_limit)
        for child in (os.listdir(home) if os.path.isdir(home) else ())
        if os.path.exists(f"{home}/{child}/partition")
    ]
    if content_wanted(disk, bool(partitions)) or (backup_only(disk) and not partitions):
        content = read_content(disk_path, disk.size, read_limit)
        if content.data_at is not None:
            content = replace(content, unfinished=bool(half_written(disk_path, wanted, read_limit)))
        disk = replace(disk, content=content)
    areas = (disk, *(p.area for p in partitions))
    mount_point = read_mount_point(wanted.mount_point, {device_number(a.path) for a in areas}, areas)
    filesystems = [a for a in areas if a.usage == "filesystem" and a.uuid]
    facts = Facts(
        disk=disk,
        serial=serial_of(disk_path),
        root_disk=number in root_disks(),
        whole_disk=not os.path.exists(f"{home}/partition"),
        table=table,
        partitions=tuple(sorted(partitions, key=lambda p: p.extent.number)),
        mount_point=mount_point,
        marker=read_marker(filesystems[0], mount_point, wanted) if len(filesystems) == 1 else Marker(),
        same_uuid=same_uuid(filesystems[0]) if len(filesystems) == 1 else (),
    )
    return read_room(facts, filesystems[0], read_limit) if wanted.grow and len(filesystems) == 1 else facts


def read_room(facts: Facts, filesystem: Area, read_limit: int) -> Facts:
    """The facts with what growing needs to know."""
    tools = ["sfdisk", "partx", block_room.TOOLS[filesystem.kind]] if filesystem.kind in block_room.TOOLS else []
    facts = replace(facts, missing_tool=next((tool for tool in tools if not installed(tool)), ""))
    if not block_room.has_room(facts):
        return facts
    sector = facts.table.sector
    start = -(-block_room.behind(facts) // sector) * sector
    content = read_behind(facts.disk.path, start, facts.disk.size, read_limit, facts.table)
    return replace(facts, behind=content)


def read_partition(home: str, table: Table, wanted: Wanted, read_limit: int) -> Partition:
    """A partition by the kernel's directory of it; what a cut-off run of ours may have left is recognised."""
    major, _, minor = read_text(f"{home}/dev").partition(":")
    area = read_area(kernel_path(os.makedev(int(major), int(minor))))
    number, start, size = (int(read_text(f"{home}/{key}")) for key in ("partition", "start", "size"))
    if content_wanted(area):
        content = read_content(area.path, area.size, read_limit)
        if content.data_at is not None and table.names.get(number) == partition_name(wanted):
            content = replace(content, unfinished=unfinished(area.path, table.uuids.get(number, "")))
        area = replace(area, content=content)
    return Partition(Extent(number, start * 512, size * 512), area)


def read_area(path: str, held: bool = False) -> Area:
    """What the tools say about one block device. `held`: it is us who hold it exclusively."""
    unknown: list[str] = []
    probe = ask("blkid", "--probe", "--output", "export", path)
    if probe.rc not in (0, 2, 8):
        unknown.append(f"blkid {path}: {probe.words}")
    tags = dict(line.split("=", 1) for line in probe.out.splitlines() if "=" in line)
    wiped = ask("wipefs", "--no-act", "--json", path)
    kind, mounted_at = tags.get("TYPE", ""), tuple(m.target for m in mounts() if m.number == device_number(path))
    signatures: list[tuple[int, str]] = []
    try:
        if wiped.rc:
            raise ValueError(wiped.words)
        for row in json.loads(wiped.out or "{}").get("signatures", []):
            signatures.append((int(str(row["offset"]), 0), str(row["type"])))
    except (ValueError, KeyError) as error:
        unknown.append(f"wipefs {path}: {error}")
    number = device_number(path)
    home = sysfs(number)
    size = spans = 0
    try:
        size = device_size(path)
        spans = filesystem_size(path, kind, mounted_at[0] if mounted_at else "") if kind else 0
        busy = not held and exclusive_refused(path)
    except OSError as error:
        busy = False
        unknown.append(f"{path}: {error.strerror}")
    return Area(
        path=path,
        size=size,
        kind=kind,
        usage=tags.get("USAGE", ""),
        uuid=tags.get("UUID", ""),
        table=tags.get("PTTYPE", ""),
        signatures=tuple(sorted(signatures)),
        ambivalent=probe.rc == 8,
        holders=tuple(sorted(os.listdir(f"{home}/holders"))) if os.path.isdir(f"{home}/holders") else (),
        mounted_at=mounted_at,
        swap=any(device_number(line.split()[0]) == number for line in read_text("/proc/swaps").splitlines()[1:]),
        busy=busy,
        read_only=read_text(f"{home}/ro") == "1",
        filesystem_size=spans,
        unknown=tuple(unknown),
    )


# -- mounts, marker -----------------------------------------------------------------------------------


def read_mount_point(path: str, ours: set[int], areas: Sequence[Area]) -> MountPoint:
    """The state of the mount point; `ours` are the device numbers of the disk and its partitions."""
    here = [m for m in mounts() if m.target == path]
    top = here[-1] if here else None
    entries: tuple[str, ...] = ()
    if top is None and os.path.isdir(path):
        entries = tuple(os.listdir(path))
    uuids = {a.uuid for a in areas if a.uuid}
    mounted_ours, source = top is not None and top.number in ours, ""
    if top is not None:
        device = kernel_path(top.number)
        source = device if mounted_ours or device == top.source else f"{top.source} ({device or 'no device, or gone'})"
    return MountPoint(
        source=source,
        ours=mounted_ours,
        read_only=top is not None and top.read_only,
        entries=entries,
        not_directory=os.path.lexists(path) and not os.path.isdir(path),
        symlink=os.path.realpath(path) != os.path.normpath(path),
        fstab_claim=fstab_claim(path, uuids),
    )


def fstab_claim(path: str, uuids: set[str]) -> str:
    """The line of /etc/fstab that mounts something else at `path`, "" if there is none.

    A line with our option x-labctl.volume is ours whatever it mounts: an earlier volume of this host.
    """
    for line in read_text("/etc/fstab").splitlines():
        fields = line.split("#", 1)[0].split()
        if len(fields) < 2 or os.path.normpath(plain(fields[1])) != path:
            continue
        options = fields[3] if len(fields) > 3 else ""
        if fields[0].removeprefix("UUID=").strip('"') not in uuids and "x-labctl.volume=" not in options:
            return str(line.strip())
    return ""


def same_uuid(area: Area) -> tuple[str, ...]:
    """Other devices with a filesystem of the same UUID: mounting by UUID could take the wrong one."""
    if not re.fullmatch(r"[0-9A-Za-z-]+", area.uuid):
        return ()
    answer = ask("blkid", "--cache-file", "/dev/null", "--match-token", f"UUID={area.uuid}", "--output", "device")
    own = device_number(area.path)
    return tuple(sorted({p for p in answer.out.split() if device_number(p) not in (0, own)}))


def read_marker(area: Area, mount_point: MountPoint, wanted: Wanted) -> Marker:
    """The marker of a filesystem: from the mount if it is mounted, else by a look that writes nothing."""
    if mount_point.ours:
        return marker_below(wanted.mount_point)
    if area.mounted_at or area.busy or area.unknown:
        return Marker()  # the planner stops on these by themselves
    stale = not area.kind.startswith("ext") or ext_state(area.path)[0]
    options = ",".join(filter(None, ("ro", "nosuid", "nodev", "noexec", UNTOUCHED.get(area.kind, ""))))
    place = tempfile.mkdtemp(prefix="labctl-look-", dir="/run")
    try:
        answer = ask("unshare", "--mount", "sh", "-c", LOOK, "look", area.kind, options, area.path, place, MARKER_PATH)
    finally:
        os.rmdir(place)
    if answer.rc == 92:
        return Marker(stale=stale)
    if answer.rc == 90:
        return Marker(problem=f"{area.path} ({area.kind}) can't be mounted: {answer.words}")
    if answer.rc:
        return Marker(problem=answer.words, stale=stale)
    return replace(parse_marker(answer.out), stale=stale)


def marker_below(mount_point: str) -> Marker:
    """The marker of a mounted volume; links aren't followed."""
    directory, path = os.path.join(mount_point, ".labctl"), os.path.join(mount_point, MARKER_PATH)
    if os.path.islink(directory):
        return Marker(problem=f"{directory} is a symbolic link")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return Marker()
    except OSError as error:
        return Marker(problem=f"{path}: {error.strerror}")
    with os.fdopen(fd, encoding="utf-8", errors="replace") as file:
        return parse_marker(file.read(MARKER_LIMIT))


def parse_marker(text: str) -> Marker:
    """A marker's text as values."""
    try:
        values = json.loads(text)
    except ValueError as error:
        return Marker(problem=f"it isn't JSON: {error}")
    if not isinstance(values, dict) or not values:
        return Marker(problem="it isn't a JSON object with values")
    return Marker(values=values)


def attached_to() -> str:
    """This host, so that a rebuilt one of the same name is another: its name and systemd's machine id."""
    return f"{os.uname().nodename} ({read_text('/etc/machine-id') or 'no machine id'})"
