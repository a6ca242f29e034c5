"""Files of the sandbox: content hashes, private files, a lock."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from labctl.errors import ConfigError
from labctl.models import Tell
from labctl.resources import root
from labctl.sandbox.config import SandboxConfig

#: In the state directory; without it a folder isn't ours to write to or to delete.
MARKER = "sandbox.json"
#: Not in the state directory: whether that is ours is only known once the lock is held.
LOCKS = Path("/run")


def build_files(*parts: str) -> Path:
    """A folder of build files (`cloud`, `node`, `images/mlflow`, …), in the wheel or in a checkout."""
    return root().joinpath("sandbox", *parts)


def content_hash(*parts: Path | str | bytes) -> str:
    """12 hex digits that change when a file's name or content changes.

    A Path is a folder (all files below it) or a file; text and bytes count as they are. Modes don't count: a wheel
    doesn't keep them. Compiled Python is left out.
    """
    digest = hashlib.sha256()

    def add(name: str, data: bytes) -> None:
        digest.update(f"{name}\0{len(data)}\0".encode() + data)

    for part in parts:
        if isinstance(part, Path):
            files = [part] if part.is_file() else sorted(p for p in part.rglob("*") if p.is_file())
            for file in files:
                if "__pycache__" not in file.parts:
                    add(str(file.relative_to(part)) if file != part else file.name, file.read_bytes())
        else:
            add("", part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:12]


def write_private(path: Path, text: str) -> None:
    """Writes a 0600 file atomically: a reader sees the old text or the new one, and nobody else sees either."""
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(fd)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """The file's content, or None if there is none or an interrupted run left half of one."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def prepare_state(config: SandboxConfig) -> None:
    """Makes the state directory (0700) and marks it as this sandbox's.

    Raises ConfigError if the folder is somebody else's: it has content but no marker, or another sandbox's marker.
    """
    state = config.state
    state.mkdir(parents=True, exist_ok=True)
    marker = state / MARKER
    owner = read_json(marker)
    if owner is None and any(entry.name not in (MARKER, "log") for entry in state.iterdir()):
        raise ConfigError(
            "the sandbox's state directory holds something else",
            expected=f"an empty folder, or one with {MARKER} in it",
            found=str(state),
            source="LABCTL_SANDBOX_STATE",
            next_step="set LABCTL_SANDBOX_STATE to an empty folder",
        )
    mine = {"name": config.name, "prefix": config.prefix}
    if owner is not None and owner != mine:
        raise ConfigError(
            "the state directory belongs to another sandbox",
            expected=json.dumps(mine),
            found=json.dumps(owner),
            source=str(marker),
            next_step="set LABCTL_SANDBOX_STATE, LABCTL_SANDBOX_NAME and LABCTL_SANDBOX_SUBNET_PREFIX together",
        )
    state.chmod(0o700)
    for folder in (config.volumes, config.logs, state / "registry"):
        folder.mkdir(exist_ok=True)
    # Cinder in the control plane isn't root; on this machine the state directory keeps everybody else out.
    config.volumes.chmod(0o777)
    if owner is None:
        write_private(marker, json.dumps(mine))


@contextmanager
def locked(config: SandboxConfig, tell: Tell, sleep: Callable[[float], None] = time.sleep) -> Iterator[None]:
    """One command at a time changes a sandbox; a second one waits and says so."""
    with (LOCKS / f"{config.name}.lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                tell("another labctl command is working on this sandbox: waiting for it")
                sleep(1.5)
        yield
