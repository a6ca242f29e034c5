"""The writes that a plan allows, each preceded by a second look at what it is about to change."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ansible.module_utils import block_table
from ansible.module_utils.block_bytes import (
    SUPERBLOCK_END,
    new_filesystem,
    read_content,
    time_uuid,
    unfinished,
)
from ansible.module_utils.block_facts import exclusive_refused, read_area
from ansible.module_utils.block_host import ask, kernel_path, mounts, read_text, serial_of, sysfs
from ansible.module_utils.block_model import LAYOUT_VERSION, Area, Facts, Plan, Wanted
from ansible.module_utils.block_plan import backup_only
from ansible.module_utils.block_superblock import ext_state
from ansible.module_utils.block_table import Failed, must, read_table, write_all

ENDS = 4 << 20  # bytes of head and tail that are read once more right before the table is written
NODE_SECONDS = 30
MOUNT_OPTIONS = "defaults,nofail,x-systemd.device-timeout=30s"


class Refused(Exception):
    """A second look found something that the plan didn't know of: nothing (more) was written."""


# -- partition table and filesystem -------------------------------------------------------------------


@contextlib.contextmanager
def held(path: str) -> Iterator[int]:
    """A device open exclusively: while this lasts nobody can mount it or put it to other use."""
    if exclusive_refused(path):  # waits for a probing tool that holds it for a moment
        raise Refused(f"{path} is held by somebody else")
    try:
        fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        raise Refused(f"{path} can't be held exclusively: {error.strerror}") from error
    try:
        yield fd
    finally:
        os.close(fd)


def initialise(plan: Plan, facts: Facts, wanted: Wanted, first_write: Callable[[], None]) -> None:
    """Table, partition and filesystem on a disk that the plan found blank. Raises Refused, Failed or OSError.

    `first_write` is called when the last check has passed, right before the disk is changed.
    """
    disk, in_partition = facts.disk.path, plan.device != facts.disk.path
    if not in_partition:
        with held(disk) as fd:
            same_disk(fd, facts)
            area = read_area(disk, held=True)
            still_nothing(replace(area, signatures=()) if plan.resume and backup_only(area) else area)
            uuid = block_table.half_written(disk, wanted, facts.disk.size) if plan.resume else time_uuid()
            if not uuid:
                raise Refused(f"{disk} holds more than an unfinished table of labctl's")
            if not plan.resume:
                still_blank(fd, facts)
            first_write()
            block_table.write_new(fd, disk, wanted, uuid)
            os.fsync(fd)
    partition = wait_for_partition(disk)
    make_filesystem(partition, read_table(disk).uuids.get(1, ""), in_partition, first_write)


def same_disk(fd: int, facts: Facts) -> None:
    """Raises Refused unless the disk behind the held descriptor is the one that was judged."""
    disk = facts.disk
    if os.fstat(fd).st_rdev != os.stat(disk.path).st_rdev or serial_of(disk.path) != facts.serial:
        raise Refused(f"{disk.path} isn't the disk any more that was looked at")
    if os.lseek(fd, 0, os.SEEK_END) != disk.size:
        raise Refused(f"{disk.path} has changed its size")


def still_blank(fd: int, facts: Facts) -> None:
    """Raises Refused unless the ends are still zero."""
    for offset in (0, max(0, facts.disk.size - ENDS)):
        if os.pread(fd, ENDS, offset).strip(b"\0"):
            raise Refused(f"{facts.disk.path} isn't blank any more near offset {offset}")


def still_nothing(area: Area) -> None:
    """Raises Refused unless the tools still recognise nothing and nobody uses it."""
    seen = area.kind or area.usage or area.table or area.signatures or area.unknown
    if seen or area.holders or area.swap or area.mounted_at:
        raise Refused(f"{area.path} isn't blank any more: {seen or 'it is in use'}")


def wait_for_partition(disk: str) -> str:
    """The device node of partition 1, once the kernel's idea of it is the table's. Raises Failed after NODE_SECONDS."""
    extents = read_table(disk).extents
    home, deadline = sysfs(os.stat(disk).st_rdev), time.monotonic() + NODE_SECONDS
    while time.monotonic() < deadline:
        ask("udevadm", "settle", "--timeout=10")
        for child in os.listdir(home):
            if read_text(f"{home}/{child}/partition") != "1":
                continue
            known = (int(read_text(f"{home}/{child}/start")) * 512, int(read_text(f"{home}/{child}/size")) * 512)
            major, _, minor = read_text(f"{home}/{child}/dev").partition(":")
            path = kernel_path(os.makedev(int(major), int(minor)))
            if len(extents) == 1 and known == (extents[0].start, extents[0].size) and os.path.exists(path):
                return str(path)
        ask("partx", "--update", disk)
        time.sleep(0.3)
    raise Failed(f"the partition of {disk} didn't appear within {NODE_SECONDS} s")


def make_filesystem(partition: str, uuid: str, resume: bool, first_write: Callable[[], None]) -> None:
    """Copy the image of a new ext4 onto the partition, its primary superblock last.

    mkfs runs on the image only, so the device can be held from the last look to the last write, and what an earlier
    run may have written is known byte by byte.
    """
    still_nothing(read_area(partition))
    if resume and not unfinished(partition, uuid):
        raise Refused(f"{partition} holds more than an unfinished filesystem of labctl's")
    with new_filesystem(partition, uuid) as image, held(partition) as fd, open(image, "rb") as source:
        content = read_content(partition, os.lseek(fd, 0, os.SEEK_END), 0)
        if content.data_at is not None and not resume:
            raise Refused(f"{partition} isn't blank any more: a byte at offset {content.data_at}")
        if resume:
            first_write()
        for offset, data in parts_of(source.fileno()):
            first = max(0, SUPERBLOCK_END - offset)
            if data[first:].strip(b"\0"):
                write_all(fd, data[first:], offset + first)
        os.fsync(fd)
        write_all(fd, os.pread(source.fileno(), SUPERBLOCK_END, 0), 0)
        os.fsync(fd)
    ask("udevadm", "settle", "--timeout=10")


def parts_of(fd: int) -> Iterator[tuple[int, bytes]]:
    """The parts of a sparse file that aren't holes, as (offset, bytes)."""
    offset = 0
    while True:
        try:
            offset = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(fd, offset, os.SEEK_HOLE)
        while offset < end:
            data = os.pread(fd, min(ENDS, end - offset), offset)
            yield offset, data
            offset += len(data)


# -- fstab and mount ----------------------------------------------------------------------------------


def fstab_line(plan: Plan, wanted: Wanted) -> str:
    """Our line. x-labctl.volume marks it as ours; programs ignore options that begin with x-."""
    options = f"{MOUNT_OPTIONS},x-labctl.volume={wanted.volume_id or 'unnamed'}"
    check_at_boot = 2 if plan.filesystem.startswith("ext") else 0
    return f"UUID={plan.uuid} {wanted.mount_point} {plan.filesystem} {options} 0 {check_at_boot}"


def fstab_with(text: str, line: str, mount_point: str) -> str:
    """/etc/fstab with our line instead of an older one of the same mount point; all else stays to the byte."""
    kept, placed = [], False
    for old in text.splitlines(keepends=True):
        fields = old.split("#", 1)[0].split()
        if len(fields) > 1 and fields[1].rstrip("/") == mount_point:
            if not placed:
                kept.append(line + "\n")
                placed = True
            continue
        kept.append(old)
    if not placed:
        if kept and not kept[-1].endswith("\n"):
            kept[-1] += "\n"
        kept.append(line + "\n")
    return "".join(kept)


def read_fstab() -> str:
    """The text of /etc/fstab, "" if there is none."""
    try:
        with open("/etc/fstab", encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def write_fstab(text: str) -> None:
    """Replace /etc/fstab in one step, with its owner and mode."""
    fd, new = tempfile.mkstemp(prefix=".fstab-", dir="/etc")
    with os.fdopen(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
        file.flush()
        if os.path.exists("/etc/fstab"):
            shutil.copystat("/etc/fstab", new)
            os.chown(new, os.stat("/etc/fstab").st_uid, os.stat("/etc/fstab").st_gid)
        else:
            os.chmod(new, 0o644)
        os.fsync(file.fileno())
    os.replace(new, "/etc/fstab")


def protect(directory: str) -> bool:
    """Make the bare mount point immutable, so that nothing starts to write to the root disk while the volume is away.

    Best effort: a root filesystem without the flag says no. Mounting over it works as ever.
    """
    os.makedirs(directory, mode=0o755, exist_ok=True)
    if not is_protected(directory):
        ask("chattr", "+i", directory)
    return is_protected(directory)


def is_protected(directory: str) -> bool:
    """Whether a directory has the immutable flag."""
    answer = ask("lsattr", "-d", directory)
    return answer.rc == 0 and "i" in answer.out.split()[0]


def mount(plan: Plan, wanted: Wanted) -> bool:
    """Mount by the line in /etc/fstab and check that it is the plan's device.

    Returns whether the bare directory below is protected.
    """
    if plan.filesystem.startswith("ext") and ext_state(plan.device)[1]:
        answer = ask("e2fsck", "-p", plan.device, detached=True)  # what the boot would run; 1 and 2: repaired
        if answer.rc >= 4:
            raise Refused(f"{plan.device} has errors that a cautious repair doesn't fix: {answer.words}")
    wait_for_link(f"/dev/disk/by-uuid/{plan.uuid}")
    protected = protect(wanted.mount_point)
    if os.path.isdir("/run/systemd/system"):
        must(ask("systemctl", "daemon-reload"), "systemctl daemon-reload")
    must(ask("mount", wanted.mount_point, detached=True), f"mount {wanted.mount_point}")
    here = [m for m in mounts() if m.target == wanted.mount_point]
    if not here or here[-1].number != os.stat(plan.device).st_rdev:
        ask("umount", wanted.mount_point)
        raise Refused(f"mounting by UUID took {here[-1].source if here else 'nothing'} instead of {plan.device}")
    return protected


def wait_for_link(path: str) -> None:
    """Wait until udev has seen the filesystem: systemd stops a mount whose device it doesn't know."""
    deadline = time.monotonic() + NODE_SECONDS
    while not os.path.exists(path) and time.monotonic() < deadline:
        ask("udevadm", "settle", "--timeout=10")
        time.sleep(0.2)


# -- ownership and marker -----------------------------------------------------------------------------


def own(mount_point: str, uid: int, gid: int) -> None:
    """Give the root directory of a new filesystem to its user; nothing below it."""
    os.chown(mount_point, uid, gid)


def marker_for(values: Any, plan: Plan, wanted: Wanted, host: str) -> dict[str, Any]:
    """The marker as it should be: identity and last host set, everything else (of later versions, too) kept."""
    marker = dict(values)
    marker["layout_version"] = marker.get("layout_version", LAYOUT_VERSION)
    marker["lab"] = wanted.lab or marker.get("lab", "")
    marker["volume_id"] = wanted.volume_id or marker.get("volume_id", "")
    marker["filesystem_uuid"] = plan.uuid
    marker.setdefault("created", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    marker.setdefault("origin", "adopted" if plan.adopt else "initialised")
    marker["last_attached_to"] = host
    return marker


def write_marker(mount_point: str, marker: dict[str, Any]) -> None:
    """Put the marker on the volume in one step, and wait until it is on the disk."""
    directory = os.path.join(mount_point, ".labctl")
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    if os.path.islink(directory) or not os.path.isdir(directory):
        raise Refused(f"{directory} isn't a directory")
    for left in (name for name in os.listdir(directory) if name.startswith(".marker-")):
        os.unlink(os.path.join(directory, left))  # of a run that was killed here
    fd, new = tempfile.mkstemp(prefix=".marker-", dir=directory)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            json.dump(marker, file, indent=1, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, os.path.join(directory, "volume.json"))
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise
    ask("sync", "--file-system", directory)


def plain_name(text: str) -> bool:
    """Whether a name may stand in fstab, a GPT name and a marker: no spaces, quotes, commas."""
    return bool(re.fullmatch(r"[A-Za-z0-9._@+-]{0,64}", text))
