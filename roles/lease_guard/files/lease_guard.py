"""Drains this server before its lease ends, which deletes it without a warning: services off, volume unmounted.

Arguments: the volume's mount point, the compose project's directory, the lease's end (2026-11-24T13:00:00Z). Runs as
labctl-lease-guard.service. Needs no cloud and no credential. What it can't stop it tells, and goes on with the rest.
"""

import contextlib
import os
import subprocess
import sys
import time
from datetime import datetime, timezone

from ansible.module_utils import block_host, block_unmount
from ansible.module_utils import stack_docker as docker

#: Stopped in this order, and not started again by a reboot: what starts the services, what writes to the store.
FIRST_UNITS = ("labctl-stack.service", "labctl-backup.timer", "labctl-backup.service")
#: Its mount has nothing to lose; it goes so that nobody begins something on it.
LAST_UNITS = ("rclone-object.service",)
#: Seconds that a service gets for its clean shutdown, and between looks at who still uses the volume.
GRACE, LOOK = 60, 10
#: Seconds before the lease's end at which a volume that is still in use is at least made read-only.
LAST_RESORT = 120


def say(text):
    """A line for the journal."""
    print(text, flush=True)


def stop_units(names):
    """Stop and disable units; those that aren't there are no matter."""
    for name in names:
        done = subprocess.run(["systemctl", "disable", "--now", name], capture_output=True, text=True, check=False)
        if done.returncode and "not exist" not in done.stderr and "not loaded" not in done.stderr:
            subprocess.run(["systemctl", "stop", name], capture_output=True, check=False)
            say(f"{name}: {done.stderr.strip()}")


def running_on(path):
    """Containers that run and have something of the volume."""
    names = docker.docker("ps", "--format", "{{.Names}}").stdout.split()
    return [
        name
        for name, one in docker.inspect("container", names).items()
        if any(docker.same_or_below(str(mount.get("Source")), path) for mount in one.get("Mounts") or [])
    ]


def stop_services(path, project_dir):
    """The stack in compose's order, then whatever else runs on the volume, the tutorial's containers for instance."""
    with docker.locked():
        done = docker.compose(project_dir, "stop", "--timeout", str(GRACE), seconds=5 * GRACE)
        if done.returncode:
            say(f"docker compose stop: {done.stderr.strip()[-500:]}")
        if left := running_on(path):
            say(f"also stopping {', '.join(left)}")
            docker.docker("stop", "--time", str(GRACE), *left, seconds=GRACE * (len(left) + 1))


def unmount(path):
    """Unmount; "" when nothing is mounted there any more, else what is in the way."""
    while here := [mount for mount in block_host.mounts() if mount.target == path]:
        number = here[-1].number
        if users := block_unmount.users_of(number, path):
            return "; ".join(users[:10])
        if problem := block_unmount.unmount(path, block_host.kernel_path(number)):
            return problem
    return ""


def main():
    """Drain, and try until the lease ends."""
    path, project_dir = os.path.normpath(sys.argv[1]), sys.argv[2]
    ends = datetime.strptime(sys.argv[3], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc).timestamp()
    say(f"the lease ends at {sys.argv[3]}: the services stop, and {path} is unmounted")
    with contextlib.suppress(OSError):  # a small image has no wall
        subprocess.run(["wall", f"labctl: this server is deleted at {sys.argv[3]}; leave {path}"], check=False)
    told = None
    while True:
        stop_units(FIRST_UNITS)
        try:
            stop_services(path, project_dir)
        except docker.DockerFailed as failure:
            say(str(failure))
        stop_units(LAST_UNITS)
        problem = unmount(path)
        if not problem:
            say(f"drained: nothing is mounted at {path}")
            return 0
        if problem != told:
            say(f"{path} can't be unmounted yet: {problem}")
        told = problem
        block_host.ask("sync", "--file-system", path)
        if time.time() > ends - LAST_RESORT:
            answer = block_host.ask("mount", "-o", "remount,ro", path)
            say(f"{path} made read-only" if answer.rc == 0 else f"{path} can't be made read-only: {answer.words}")
        if time.time() > ends:
            return 1
        time.sleep(LOOK)


if __name__ == "__main__":
    sys.exit(main())
