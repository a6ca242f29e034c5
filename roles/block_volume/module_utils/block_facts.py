"""Reads everything about a volume's disk that a decision needs, and writes nothing.

What can't be found out goes into `unknown` of the area it concerns; the planner stops on it.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import stat
import struct
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ansible.module_utils.block_plan import (
    MARKER_PATH,
    Area,
    Content,
    Extent,
    Facts,
    Marker,
    MountPoint,
    Partition,
    Table,
    Wanted,
    content_wanted,
    partition_name,
)

TOOL_SECONDS = 120
BLOCK = 4096
CHUNK = 4 << 20  # bytes per read: large enough for full speed, and a multiple of every sector size
SAMPLES = 64
MARKER_LIMIT = 1 << 20
EXT_MAGIC, EXT_NEEDS_RECOVERY, EXT_ERRORS = 0xEF53, 0x4, 0x2  # linux/fs/ext4/ext4.h
# Mounted like this nothing is written, not even a journal's replay.
UNTOUCHED = {
    "ext3": "noload",
    "ext4": "noload",
    "xfs": "norecovery",
    "btrfs": "rescue=nologreplay",
    "f2fs": "norecovery",
}


@dataclass(frozen=True)
class Answer:
    """What a tool said. `rc` is 127 if it isn't installed, 124 if it took longer than TOOL_SECONDS."""

    rc: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """The last line of complaint."""
        return (self.err.strip() or self.out.strip() or f"exit {self.rc}").splitlines()[-1]


def ask(*cmd: str, data: str | None = None, detached: bool = False) -> Answer:
    """Run a tool in the C locale. `detached`: it survives a hang-up of the connection that started it."""
    env = {**os.environ, "LC_ALL": "C", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    source: dict[str, Any] = {"stdin": subprocess.DEVNULL} if data is None else {"input": data}
    try:
        done = subprocess.run(
            cmd, capture_output=True, text=True, errors="replace", timeout=None if detached else TOOL_SECONDS,
            check=False, env=env, start_new_session=detached, **source,
        )  # fmt: skip
    except FileNotFoundError:
        return Answer(127, "", f"{cmd[0]} isn't installed")
    except subprocess.TimeoutExpired:
        return Answer(124, "", f"{cmd[0]} gave no answer within {TOOL_SECONDS} s")
    return Answer(done.returncode, done.stdout, done.stderr)


def read_text(path: str) -> str:
    """A small file's text without its newline, "" if it can't be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


# -- finding the disk ---------------------------------------------------------------------------------


def find_disks(volume_id: str) -> list[str]:
    """Disks whose serial is a Cinder volume's id, as /dev/<kernel name>; normally one.

    Hypervisors cut the serial: virtio shows its first 20 characters, SCSI and NVMe up to 36.
    """
    ends = re.compile(rf"(^|[-_])({re.escape(volume_id)}|{re.escape(volume_id[:20])})(_\d+)?$")
    found: set[int] = set()
    by_id = "/dev/disk/by-id"
    for name in os.listdir(by_id) if os.path.isdir(by_id) else ():
        if ends.search(name) and not re.search(r"-part\d+$", name):
            found.add(_device_number(os.path.join(by_id, name)))
    for path, serial in disk_serials().items():
        if serial in (volume_id, volume_id[:20]):
            found.add(_device_number(path))
    return sorted(path for path in (kernel_path(number) for number in found if number) if path)


def disk_serials() -> dict[str, str]:
    """Serial numbers of this machine's disks by path: by the kernel, else by the udev database (lsblk)."""
    serials = {}
    for name in sorted(os.listdir("/sys/block")):
        serial = read_text(f"/sys/block/{name}/serial") or read_text(f"/sys/block/{name}/device/serial")
        if serial:
            serials[f"/dev/{name}"] = serial
    answer = ask("lsblk", "--json", "--nodeps", "--output", "PATH,SERIAL")
    for row in json.loads(answer.out or "{}").get("blockdevices", []) if answer.rc == 0 else ():
        if row.get("serial"):
            serials.setdefault(row["path"], row["serial"])
    return serials


def _device_number(path: str) -> int:
    try:
        status = os.stat(path)
    except OSError:
        return 0
    return status.st_rdev if stat.S_ISBLK(status.st_mode) else 0


def kernel_path(number: int) -> str:
    """/dev/<name> of a device number, "" if the kernel has no such device (any more)."""
    for line in read_text(f"{sysfs(number)}/uevent").splitlines():
        if line.startswith("DEVNAME="):
            return "/dev/" + line.partition("=")[2]
    return ""


def sysfs(number: int) -> str:
    """The kernel's directory of a block device."""
    return os.path.realpath(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")


def serial_of(path: str) -> str:
    """The serial number of a disk, "" if it has none."""
    return disk_serials().get(path, "")


# -- the snapshot -------------------------------------------------------------------------------------


def snapshot(disk_path: str, wanted: Wanted, read_limit: int) -> Facts:
    """Everything about one disk. `read_limit`: bytes up to which an unrecognised device is read whole."""
    number = _device_number(disk_path)
    home = sysfs(number)
    children = [c for c in (os.listdir(home) if os.path.isdir(home) else []) if os.path.exists(f"{home}/{c}/partition")]
    disk = read_area(disk_path)
    table = read_table(disk_path) if disk.table else Table()
    partitions = []
    for child in children:
        major, _, minor = read_text(f"{home}/{child}/dev").partition(":")
        area = read_area(kernel_path(os.makedev(int(major), int(minor))))
        extent = Extent(
            *(
                int(read_text(f"{home}/{child}/{key}")) * unit
                for key, unit in (("partition", 1), ("start", 512), ("size", 512))
            )
        )
        if content_wanted(area):
            content = read_content(area.path, area.size, read_limit)
            if content.data_at is not None and table.names.get(extent.number) == partition_name(wanted):
                content = replace(content, remains_of_mkfs=remains_of_mkfs(area.path, area.size))
            area = replace(area, content=content)
        partitions.append(Partition(extent, area))
    if content_wanted(disk, bool(children)):
        disk = replace(disk, content=read_content(disk_path, disk.size, read_limit))
    areas = (disk, *(p.area for p in partitions))
    mount_point = read_mount_point(wanted.mount_point, {_device_number(a.path) for a in areas}, areas)
    filesystems = [a for a in areas if a.usage == "filesystem" and a.uuid]
    return Facts(
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


def read_area(path: str) -> Area:
    """What the tools say about one block device."""
    unknown: list[str] = []
    probe = ask("blkid", "--probe", "--output", "export", path)
    if probe.rc not in (0, 2, 8):
        unknown.append(f"blkid {path}: {probe.words}")
    tags = dict(line.split("=", 1) for line in probe.out.splitlines() if "=" in line)
    wiped = ask("wipefs", "--no-act", "--json", path)
    signatures: list[tuple[int, str]] = []
    try:
        if wiped.rc:
            raise ValueError(wiped.words)
        for row in json.loads(wiped.out or "{}").get("signatures", []):
            signatures.append((int(str(row["offset"]), 0), str(row["type"])))
    except (ValueError, KeyError) as error:
        unknown.append(f"wipefs {path}: {error}")
    number = _device_number(path)
    home = sysfs(number)
    size = 0
    try:
        size = device_size(path)
        busy = exclusive_refused(path)
    except OSError as error:
        busy = False
        unknown.append(f"{path}: {error.strerror}")
    return Area(
        path=path,
        size=size,
        kind=tags.get("TYPE", ""),
        usage=tags.get("USAGE", ""),
        uuid=tags.get("UUID", ""),
        table=tags.get("PTTYPE", ""),
        signatures=tuple(sorted(signatures)),
        ambivalent=probe.rc == 8,
        holders=tuple(sorted(os.listdir(f"{home}/holders"))) if os.path.isdir(f"{home}/holders") else (),
        mounted_at=tuple(m.target for m in mounts() if m.number == number),
        swap=any(_device_number(line.split()[0]) == number for line in read_text("/proc/swaps").splitlines()[1:]),
        busy=busy,
        read_only=read_text(f"{home}/ro") == "1",
        unknown=tuple(unknown),
    )


def device_size(path: str) -> int:
    """Bytes of a block device."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def exclusive_refused(path: str) -> bool:
    """Whether O_EXCL is refused, which the kernel does for mounts (in any namespace), holders and swap."""
    for _ in range(5):  # a probing tool may hold it for a moment
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
            return False
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        if any(m.number == _device_number(path) for m in mounts()):
            return True
        time.sleep(0.2)
    return True


def read_table(path: str) -> Table:
    """The partition table as it is on the disk; an empty one if sfdisk can't read it."""
    answer = ask("sfdisk", "--json", path)
    try:
        table: dict[str, Any] = json.loads(answer.out)["partitiontable"] if answer.rc == 0 else {}
    except (ValueError, KeyError):
        table = {}
    unit, extents, names = int(table.get("sectorsize", 512)), [], {}
    for row in table.get("partitions", []):
        digits = re.search(r"(\d+)$", str(row["node"]))
        number = int(digits.group(1)) if digits else 0
        extents.append(Extent(number, int(row["start"]) * unit, int(row["size"]) * unit))
        names[number] = str(row.get("name", ""))
    return Table(
        kind=str(table.get("label", "")),
        guid=str(table.get("id", "")).lower(),
        extents=tuple(sorted(extents, key=lambda e: e.number)),
        names=names,
        warnings=tuple(line.strip() for line in answer.err.splitlines() if line.strip()),
    )


# -- reading bytes ------------------------------------------------------------------------------------


def read_content(path: str, size: int, limit: int) -> Content:
    """Whether a device is zero. Ends, then samples, then (up to `limit` bytes) all of it; stops at the first byte found."""
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


# -- mounts, marker -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mount:
    """A line of mountinfo. `number` is the device's, also for a filesystem that shows an anonymous one (btrfs)."""

    number: int
    target: str
    source: str
    read_only: bool
    slave: bool


def mounts(pid: str = "self") -> list[Mount]:
    """What is mounted in a process's namespace, in order; later ones hide earlier ones at the same place."""
    result = []
    for line in read_text(f"/proc/{pid}/mountinfo").splitlines():
        head, _, tail = line.partition(" - ")
        fields, (_kind, source, super_options) = head.split(), tail.split()[:3]
        major, _, minor = fields[2].partition(":")
        number = os.makedev(int(major), int(minor))
        if int(major) == 0 and source.startswith("/dev/"):
            number = _device_number(source) or number
        read_only = "ro" in fields[5].split(",") or "ro" in super_options.split(",")
        slave = any(f.startswith(("shared:", "master:")) for f in fields[6:])
        result.append(Mount(number, _plain(fields[4]), _plain(source), read_only, slave))
    return result


def _plain(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m.group(1), 8)), text)


def root_disks() -> set[int]:
    """Device numbers of the disks (and all between) that / and /boot are on."""
    found = {m.number for m in mounts() if m.target in ("/", "/boot", "/boot/efi", "/usr", "/var")}
    queue = [number for number in found if os.path.exists(sysfs(number))]
    while queue:
        home = sysfs(queue.pop())
        below = [os.path.dirname(home)] if os.path.exists(f"{home}/partition") else []
        if os.path.isdir(f"{home}/slaves"):
            below += [os.path.realpath(f"{home}/slaves/{s}") for s in os.listdir(f"{home}/slaves")]
        for directory in below:
            major, _, minor = read_text(f"{directory}/dev").partition(":")
            number = os.makedev(int(major or 0), int(minor or 0))
            if number not in found:
                found.add(number)
                queue.append(number)
    return found


def read_mount_point(path: str, ours: set[int], areas: Sequence[Area]) -> MountPoint:
    """The state of the mount point; `ours` are the device numbers of the disk and its partitions."""
    here = [m for m in mounts() if m.target == path]
    top = here[-1] if here else None
    entries: tuple[str, ...] = ()
    if top is None and os.path.isdir(path):
        entries = tuple(os.listdir(path))
    uuids = {a.uuid for a in areas if a.uuid}
    source = ""
    if top:
        source = (
            kernel_path(top.number)
            if top.number in ours
            else f"{top.source} ({kernel_path(top.number) or 'a device that is gone'})"
        )
    return MountPoint(
        source=source,
        ours=bool(top) and top.number in ours,
        read_only=bool(top) and top.read_only,
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
        if len(fields) < 2 or os.path.normpath(_plain(fields[1])) != path:
            continue
        options = fields[3] if len(fields) > 3 else ""
        if fields[0].removeprefix("UUID=").strip('"') not in uuids and "x-labctl.volume=" not in options:
            return line.strip()
    return ""


def same_uuid(area: Area) -> tuple[str, ...]:
    """Other devices with a filesystem of the same UUID: mounting by UUID could take the wrong one."""
    if not re.fullmatch(r"[0-9A-Za-z-]+", area.uuid):
        return ()
    answer = ask("blkid", "--cache-file", "/dev/null", "--match-token", f"UUID={area.uuid}", "--output", "device")
    own = _device_number(area.path)
    return tuple(sorted({p for p in answer.out.split() if _device_number(p) not in (0, own)}))


def read_marker(area: Area, mount_point: MountPoint, wanted: Wanted) -> Marker:
    """The marker of a filesystem: from the mount if it is mounted, else by a look that writes nothing."""
    if mount_point.ours:
        return marker_below(wanted.mount_point)
    if area.mounted_at or area.busy or area.unknown:
        return Marker()  # the planner stops on these by themselves
    stale = not area.kind.startswith("ext") or ext_state(area.path)[0]
    options = ",".join(filter(None, ("ro", "nosuid", "nodev", "noexec", UNTOUCHED.get(area.kind, ""))))
    place = tempfile.mkdtemp(prefix="labctl-look-", dir="/run")
    # In a mount namespace of its own: a run that is killed leaves no mount behind.
    script = (
        'mount -t "$1" -o "$2" "$3" "$4" || exit 90; cd "$4" || exit 91; [ -e "$5" ] || [ -L "$5" ] || { cd /; umount "$4"; exit 92; }; '
        'if [ -L .labctl ] || [ -L "$5" ]; then echo "a symbolic link is in its way" >&2; exit 93; fi; head -c 1048576 "$5"; rc=$?; cd /; umount "$4"; exit $rc'
    )
    try:
        answer = ask(
            "unshare", "--mount", "sh", "-c", script, "look", area.kind, options, area.path, place, MARKER_PATH
        )
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
