"""This machine as the volume's code sees it: its tools, disks and mounts. Reads only."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TOOL_SECONDS = 120


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


PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def installed(tool: str) -> bool:
    """Whether a program is there."""
    return shutil.which(tool, path=PATH) is not None


def ask(*cmd: str, data: str | None = None, detached: bool = False, env: Mapping[str, str] | None = None) -> Answer:
    """Run a tool in the C locale. `detached`: it survives a hang-up of the connection that started it."""
    whole_env = {
        **os.environ,
        **(env or {}),
        "LC_ALL": "C",
        "PATH": PATH,
    }
    source: dict[str, Any] = {"stdin": subprocess.DEVNULL} if data is None else {"input": data}
    try:
        done = subprocess.run(
            cmd, capture_output=True, text=True, errors="replace", timeout=None if detached else TOOL_SECONDS,
            check=False, env=whole_env, start_new_session=detached, **source,
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
            found.add(device_number(os.path.join(by_id, name)))
    for path, serial in disk_serials().items():
        if serial in (volume_id, volume_id[:20]):
            found.add(device_number(path))
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


def device_number(path: str) -> int:
    """The device number of a block device's path, 0 if it isn't one."""
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


def disk_of(number: int) -> int:
    """The device number of a partition's disk, 0 if it isn't a partition."""
    home = sysfs(number)
    if not os.path.exists(f"{home}/partition"):
        return 0
    major, _, minor = read_text(f"{os.path.dirname(home)}/dev").partition(":")
    return os.makedev(int(major or 0), int(minor or 0))


def sector_size(path: str) -> int:
    """Bytes of the logical sector of a disk, or of a partition's disk; 512 for a file."""
    home = sysfs(device_number(path))
    text = read_text(f"{home}/../queue/logical_block_size") or read_text(f"{home}/queue/logical_block_size")
    return int(text or 512)


def serial_of(path: str) -> str:
    """The serial number of a disk, "" if it has none."""
    return disk_serials().get(path, "")


# -- mounts ------------------------------------------------------------------------------------------


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
            number = device_number(source) or number
        read_only = "ro" in fields[5].split(",") or "ro" in super_options.split(",")
        slave = any(f.startswith(("shared:", "master:")) for f in fields[6:])
        result.append(Mount(number, plain(fields[4]), plain(source), read_only, slave))
    return result


def exclusive_refused(path: str) -> bool:
    """Whether O_EXCL is refused, which the kernel does for mounts (in any namespace), holders and swap."""
    whole = device_number(path)
    for _ in range(5):  # a probing tool may hold it for a moment
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
            return False
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        if any(whole in (m.number, disk_of(m.number)) for m in mounts()):
            return True  # it, or a partition of it, is mounted: no use to wait
        time.sleep(0.2)
    return True


def plain(text: str) -> str:
    """A path without the octal escapes of mountinfo and fstab."""
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
