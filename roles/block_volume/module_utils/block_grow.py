"""Makes a filesystem fill its extended volume: table, kernel, filesystem, each step complete before the next.

A run that is cut off leaves a volume that mounts as before; the next one finds out which steps are left.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable

from ansible.module_utils import block_room, block_table, block_unmount
from ansible.module_utils.block_bytes import read_behind
from ansible.module_utils.block_host import ask, device_number, mounts, read_text, sysfs
from ansible.module_utils.block_model import Extent, Facts, Plan
from ansible.module_utils.block_write import NODE_SECONDS, Failed, Refused, must


class Mounted(Exception):
    """This kernel doesn't let us grow a mounted ext4: that needs CAP_SYS_RESOURCE, which containers may lack."""


def grow_table(facts: Facts, first_write: Callable[[], None]) -> None:
    """The partition up to the disk's end; its start, UUID and name stay, and a GPT's backup moves to the end."""
    disk = facts.disk.path
    fd = os.open(disk, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # udev leaves a locked disk alone
        if block_table.read_table(disk) != facts.table or os.lseek(fd, 0, os.SEEK_END) != facts.disk.size:
            raise Refused(f"{disk} isn't any more what was looked at")
        if read_behind(disk, block_room.behind(facts), facts.disk.size, 0, facts.table).data_at is not None:
            raise Refused(f"{disk} isn't free any more behind its partition")
        block_table.write_grown(fd, facts, first_write)
    finally:
        os.close(fd)


def tell_kernel(facts: Facts) -> None:
    """The kernel's idea of the partition as the table has it; works while it is mounted."""
    disk = facts.disk.path
    wanted, deadline = block_table.read_table(disk).extents[0], time.monotonic() + NODE_SECONDS
    while kernel_extent(disk, wanted.number) != wanted:
        answer = ask("partx", "--update", "--nr", str(wanted.number), disk)
        if time.monotonic() > deadline:
            raise Failed(f"the kernel doesn't take partition {wanted.number} of {disk} as it is: {answer.words}")
        time.sleep(0.1)


def kernel_extent(disk: str, number: int) -> Extent | None:
    """A partition as the kernel knows it."""
    home = sysfs(device_number(disk))
    for child in os.listdir(home):
        if read_text(f"{home}/{child}/partition") == str(number):
            start, size = (int(read_text(f"{home}/{child}/{key}")) * 512 for key in ("start", "size"))
            return Extent(number, start, size)
    return None


def grow_filesystem(plan: Plan, mount_point: str) -> None:
    """The mounted filesystem as large as its device. Raises Mounted where that isn't allowed while it is mounted."""
    commands = {
        "ext4": ("resize2fs", plan.device),
        "xfs": ("xfs_growfs", "-d", mount_point),
        "btrfs": ("btrfs", "filesystem", "resize", "max", mount_point),
    }
    answer = ask(*commands[plan.filesystem], detached=True)
    if plan.filesystem == "ext4" and "Permission denied to resize" in answer.err:
        raise Mounted
    must(answer, " ".join(commands[plan.filesystem]))
    ask("sync", "--file-system", mount_point)


def grow_unmounted(plan: Plan, mount_point: str) -> None:
    """The same for an ext4 that has to be taken away for it. Raises Mounted if somebody uses it."""
    here = [m for m in mounts() if m.target == mount_point]
    if not here or block_unmount.users_of(here[-1].number, mount_point):
        raise Mounted
    problem = block_unmount.unmount(mount_point, plan.device)
    if problem:
        raise Failed(f"{mount_point} couldn't be unmounted: {problem}")
    checked = ask("e2fsck", "-f", "-p", plan.device, detached=True)  # resize2fs insists on it
    if checked.rc >= 4:
        raise Refused(f"{plan.device} has errors that a cautious repair doesn't fix: {checked.words}")
    must(ask("resize2fs", plan.device, detached=True), f"resize2fs {plan.device}")
