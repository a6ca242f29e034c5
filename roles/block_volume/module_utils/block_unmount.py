"""Takes a volume away: plain unmount only, and names who is in the way."""

from __future__ import annotations

import contextlib
import os

from ansible.module_utils.block_host import ask, exclusive_refused, mounts, read_text


def users_of(number: int, mount_point: str) -> list[str]:
    """Who would keep the volume busy: processes, other mounts, and mounts in containers that an unmount doesn't reach.

    Names and process ids only: command lines may hold secrets.
    """
    users = [f"it is also mounted at {m.target}" for m in mounts() if m.number == number and m.target != mount_point]
    users += [f"{m.target} is mounted below it" for m in mounts() if m.target.startswith(mount_point + "/")]
    here, seen = os.stat(mount_point).st_dev, {os.readlink("/proc/self/ns/mnt")}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # processes end while we look
            path = _open_path(pid, here)
            if path and int(pid) != os.getpid():
                users.append(f"process {pid} ({read_text(f'/proc/{pid}/comm')}) has {path} open")
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace not in seen:
                seen.add(namespace)
                kept = [m.target for m in mounts(pid) if m.number == number and not m.slave]
                name = read_text(f"/proc/{pid}/comm")
                users += [f"the container of process {pid} ({name}) has it mounted at {target}" for target in kept]
    return users


def _open_path(pid: str, device: int) -> str:
    """A path on the device that the process has as directory, program, open or mapped file; "" if none."""
    links = [f"/proc/{pid}/{name}" for name in ("cwd", "root", "exe")]
    links += [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
    for link in links:
        with contextlib.suppress(OSError):
            if os.stat(link).st_dev == device:
                return os.readlink(link)
    wanted = f"{os.major(device):02x}:{os.minor(device):02x}"
    for line in read_text(f"/proc/{pid}/maps").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[3] == wanted:
            return str(fields[5])
    return ""


def unmount(mount_point: str, device: str) -> str:
    """Flush and unmount; returns "" or why it didn't work. Never lazily: that would hide writers from a detach."""
    ask("sync", "--file-system", mount_point)
    answer = ask("umount", mount_point)
    if answer.rc:
        return str(answer.words)
    if device and exclusive_refused(device):
        return f"it is unmounted here, but {device} is still held by another mount namespace or program"
    return ""
