"""Debian packages for a role's own module: no apt at all when they are installed, patience when apt is busy."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

LISTS = "/var/lib/apt/lists"
LISTS_GOOD_SECONDS = 6 * 3600
LOCK_SECONDS = 300  # first boot: cloud-init and apt-daily hold the locks for minutes
LOCKED = "Could not get lock"
QUIET = {
    "DEBIAN_FRONTEND": "noninteractive",
    "LC_ALL": "C.UTF-8",
    "NEEDRESTART_SUSPEND": "1",  # or Ubuntu's needrestart restarts sshd and others under us
}


class AptFailed(Exception):
    """apt-get said no; the message holds its last lines."""


def missing(module: Any, names: Sequence[str]) -> list[str]:
    """Those of `names` that dpkg doesn't have as installed, in their order."""
    _rc, out, _err = module.run_command(["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\\n", *names])
    installed = {line.split()[0] for line in out.splitlines() if line.endswith(" installed")}
    return [name for name in names if name not in installed]


def install(module: Any, names: Sequence[str]) -> None:
    """Install `names` without recommended packages and without ever removing one; AptFailed if that can't be done."""
    fresh = _lists_are_fresh()
    if not fresh:
        _update(module)
    command = [
        "apt-get",
        "-y",
        "-q",
        "--no-install-recommends",
        "--no-remove",
        "-o",
        "Dpkg::Use-Pty=0",
        "-o",
        f"DPkg::Lock::Timeout={LOCK_SECONDS}",
        "install",
        *names,
    ]
    rc, out, err = module.run_command(command, environ_update=QUIET)
    if rc and fresh:
        _update(module)
        rc, out, err = module.run_command(command, environ_update=QUIET)
    if rc:
        raise AptFailed(f"apt-get install {' '.join(names)}: {_tail(err or out)}")


def _lists_are_fresh() -> bool:
    """Whether there are package lists and they are recent; an image often ships without any."""
    try:
        there = any(name.endswith(("_Packages", "_Packages.lz4")) for name in os.listdir(LISTS))
        return there and time.time() - os.stat(LISTS).st_mtime < LISTS_GOOD_SECONDS
    except FileNotFoundError:
        return False


def _update(module: Any) -> None:
    """apt-get update. Its lock has no time-out option, so the wait is here."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        rc, out, err = module.run_command(["apt-get", "-q", "update"], environ_update=QUIET)
        if not rc:
            return
        if LOCKED not in err or time.monotonic() > deadline:
            raise AptFailed(f"apt-get update: {_tail(err or out)}")
        time.sleep(3)


def _tail(text: str) -> str:
    """The last lines, where apt says what went wrong."""
    return "\n".join(text.strip().splitlines()[-8:])
