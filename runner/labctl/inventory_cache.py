"""The dynamic inventory of one Ansible run, asked for more than once: the cloud is asked the first time only.

A run is the process that called us (Ansible, or a shell), told by its id and its start time. What is remembered is
forgotten after SECONDS, by another lab.yaml or login, and by every command of labctl that makes or deletes a server.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

#: How long it is taken for the truth: a change made elsewhere (in Horizon, by another laptop) shows after that.
SECONDS = 30
_NAME = "inventory.json"


def read(state: Path, key: str) -> dict[str, Any] | None:
    """What was remembered below the lab's state directory for this run, or None."""
    try:
        path = state / _NAME
        if not 0 <= time.time() - path.stat().st_mtime < SECONDS:
            return None
        remembered = json.loads(path.read_text())
        return dict(remembered["document"]) if remembered["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(state: Path, key: str, document: dict[str, Any]) -> None:
    """Remember it, for this run. A state directory that can't be written to is no reason to fail."""
    if not key:
        return
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        new = state / f".{_NAME}.{os.getpid()}"
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"key": key, "document": document}, file)
        new.replace(state / _NAME)
    except OSError:
        return


def forget(state: Path) -> None:
    """After a change: the next call asks the cloud."""
    (state / _NAME).unlink(missing_ok=True)


def key_of(lab_file: Path, clouds_file: Path | None) -> str:
    """What one run is told from another by, with the configuration it was asked for; "" where nobody can tell."""
    caller = os.getppid()
    try:
        # the 22nd field of /proc/PID/stat: the start in clock ticks since boot (proc(5)); the name may hold blanks
        started = Path(f"/proc/{caller}/stat").read_text().rpartition(")")[2].split()[19]
        files = [str(lab_file.absolute()).encode(), lab_file.read_bytes()]
        files += [clouds_file.read_bytes()] if clouds_file else []
    except (OSError, IndexError):
        return ""
    login = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("OS_"))
    parts = [str(caller).encode(), started.encode(), *files, *(one.encode() for one in login)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()
