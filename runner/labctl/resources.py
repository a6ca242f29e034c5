"""Where the playbooks, roles, inventory and sandbox files are: in the wheel, or in a checkout."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def root() -> Path:
    """The folder that holds `playbooks`, `roles`, `inventory` and `sandbox`."""
    packed = _PACKAGE / "_data"
    return packed if packed.is_dir() else _PACKAGE.parents[1]


def state_directory() -> Path:
    """Where labctl keeps what can be made again on this machine (known hosts, logs); `$LABCTL_STATE` moves it."""
    if chosen := os.environ.get("LABCTL_STATE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "labctl"
