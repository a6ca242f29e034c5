"""The stack's part of the volume's marker: which data it serves, and by which versions that was last opened.

The marker `.labctl/volume.json` belongs to the role block_volume; this file reads and rewrites the one key `stack` and
keeps all others. `postgres_dir` and `s3_dir` are pointers: paths relative to the volume that say which directories are
served, so that a restore can write new ones beside the old and then switch by one rename.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from typing import Any

MARKER = ".labctl/volume.json"
KEY = "stack"
#: The keys that hold paths; what they say is joined to the mount point, so it must not lead out of it.
POINTERS = ("postgres_dir", "s3_dir")


class MarkerError(Exception):
    """The marker can't be read or doesn't say what it should: nobody knows which data is the lab's."""


def read(data_dir: str) -> dict[str, Any]:
    """The key `stack` of the volume mounted at data_dir, {} if the marker has none yet.

    Raises MarkerError where the marker is missing, isn't readable JSON, or has a pointer that leads out of the volume.
    """
    stack = _marker(data_dir).get(KEY, {})
    if not isinstance(stack, dict):
        raise MarkerError(f"{os.path.join(data_dir, MARKER)}: the key {KEY} isn't an object")
    _check(stack, data_dir)
    return stack


def write(data_dir: str, stack: dict[str, Any]) -> bool:
    """Make `stack` the value of that key, in one step and durably; False, and nothing written, if it is so already.

    Keys that are left out of `stack` are dropped: start from what `read` returned. Raises MarkerError or OSError.
    """
    _check(stack, data_dir)
    marker = _marker(data_dir)
    if marker.get(KEY) == stack:
        return False
    marker[KEY] = stack
    path = os.path.join(data_dir, MARKER)
    descriptor, temporary = tempfile.mkstemp(prefix=".volume-", dir=os.path.dirname(path))
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(marker, file, indent=1, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_directory(os.path.dirname(path))
    return True


def sync_directory(path: str) -> None:
    """Wait until the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _marker(data_dir: str) -> dict[str, Any]:
    path = os.path.join(data_dir, MARKER)
    try:
        with open(path, encoding="utf-8") as file:
            marker = json.load(file)
    except FileNotFoundError:
        raise MarkerError(f"there is no {path}") from None
    except (OSError, ValueError) as error:
        raise MarkerError(f"{path} can't be read: {error}") from None
    if not isinstance(marker, dict):
        raise MarkerError(f"{path} isn't a JSON object")
    return marker


def _check(stack: dict[str, Any], data_dir: str) -> None:
    for key in POINTERS:
        path = stack.get(key)
        if path is None:
            continue
        parts = path.split("/") if isinstance(path, str) else [""]
        if not all(part not in ("", ".", "..") and part.isprintable() for part in parts) or parts[0] == ".labctl":
            raise MarkerError(f"{os.path.join(data_dir, MARKER)}: {KEY}.{key} isn't a path on the volume: {path!r}")
