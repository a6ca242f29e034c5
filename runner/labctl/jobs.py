"""Long jobs on the lab's server: started by a role as units of their own, followed from here over SSH.

A connection that breaks or a Ctrl-C here doesn't end a job, and the same command finds it again.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from labctl.context import Context
from labctl.errors import CloudRefused, ConfigError, ConvergeFailed, HostUnreachable, LabctlError, SafetyStop
from labctl.models import Server

#: Seconds that the server holds a question open, that ssh gets on top, and that a broken connection is tried again.
ASK_SECONDS, SSH_SECONDS, RECONNECT_SECONDS = 5, 20, 120
#: ssh's own exit code, for a connection that failed.
SSH_FAILED = 255

_KINDS: dict[str, type[LabctlError]] = {
    "usage": ConfigError,
    "refused": CloudRefused,
    "failed": ConvergeFailed,
    "safety_stop": SafetyStop,
}


def follow(
    ctx: Context, server: Server, program: str, job: str, tell: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Wait for a job's end and tell its progress meanwhile; returns its last word. Its error becomes labctl's.

    `program`: the path on the server, which answers to `wait --job ID`.
    """
    seen, lost_at = -1, 0.0
    while True:
        ask = ["wait", "--job", job, "--seen", str(seen), "--seconds", str(ASK_SECONDS)]
        try:
            found: dict[str, Any] = on_host(ctx, server, ["sudo", "-n", "python3", program, *ask])
        except HostUnreachable:
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > RECONNECT_SECONDS:
                raise
            tell({"step": "the connection broke; the job goes on"})
            time.sleep(1)
            continue
        lost_at, seen = 0.0, found["seq"]
        tell(found)
        if found["state"] == "running":
            continue
        if found["state"] != "done":
            raise error_of(found.get("error") or {})
        return found


def words(found: Mapping[str, Any]) -> str:
    """What a job is at, in a few words."""
    return ": ".join(part for part in (found.get("step"), found.get("text")) if part)


def error_of(error: Mapping[str, str]) -> LabctlError:
    """A job's error as labctl's, with its exit code."""
    return _KINDS.get(error.get("kind", ""), ConvergeFailed)(
        error.get("msg", "The job failed without a message."),
        expected=error.get("expected", ""),
        found=error.get("found", ""),
        next_step=error.get("next_step", "run the same command again: it continues"),
    )


def on_host(ctx: Context, server: Server, command: Sequence[str], data: str = "") -> Any:
    """Run a command on the server that prints JSON; `data` goes to its standard input."""
    try:
        done = subprocess.run(
            ctx.login(server).argv(*command),
            input=data,
            capture_output=True,
            text=True,
            check=False,
            timeout=ASK_SECONDS + SSH_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise HostUnreachable(f"{server.name} doesn't answer.", next_step="labctl status") from None
    if done.returncode == SSH_FAILED:
        raise HostUnreachable(
            f"{server.name} can't be logged into.", found=done.stderr.strip(), next_step="labctl status"
        )
    if done.returncode:
        raise ConvergeFailed("A command on the server failed.", detail=done.stderr.strip()[-500:])
    return json.loads(done.stdout or "null")
