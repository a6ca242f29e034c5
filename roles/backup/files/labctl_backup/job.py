"""A running job: its lock, its progress for whoever watches, and what became of it.

Progress is a small file that is replaced at each step, so that watching needs no connection that must not break.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from labctl_backup.errors import EXIT_CODES, Failure
from labctl_backup.model import iso

RUN = "/run/labctl-backup"
#: What only looks doesn't wait for what writes.
UNIT, LOOKING_UNIT, LOOKING = "labctl-backup-job.service", "labctl-backup-look.service", ("list", "verify")
#: The last backup's end on this host, for `labctl status`.
LAST = "/var/lib/labctl/backup-last.json"
LOCK = ".labctl/backup.lock"
LOOK_SECONDS = 0.2


def write_json(path: str, document: Any, mode: int = 0o600) -> None:
    """Replace a small file by a rename, durable before it is visible."""
    descriptor, temporary = tempfile.mkstemp(prefix=".new-", dir=os.path.dirname(path))
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            os.fchmod(handle.fileno(), mode)
            json.dump(document, handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_json(path: str) -> Any:
    """What a JSON file says, or None where there is none or it can't be read."""
    try:
        with open(path, encoding="utf-8") as handle:
            return json.load(handle)
    except (OSError, ValueError):
        return None


def path_of(job_id: str) -> str:
    """Where a job's progress is."""
    return os.path.join(RUN, f"job-{job_id}.json")


class Job:
    """Where the rest of the program says what it does."""

    def __init__(self, job_id: str, command: str) -> None:
        self._id = job_id
        self._state: dict[str, Any] = {"state": "running", "command": command, "step": "", "text": "", "seq": 0}
        self.notes: list[str] = []

    def step(self, title: str) -> None:
        """A new step begins."""
        self._put(step=title, text="")

    def tell(self, text: str) -> None:
        """What the step is at."""
        self._put(text=text)

    def note(self, text: str) -> None:
        """Something that a person should know at the end."""
        self.notes.append(text)

    def end(self, **outcome: Any) -> None:
        """The last word: `result`, or `error`."""
        self._put(state="failed" if "error" in outcome else "done", notes=self.notes, **outcome)

    def _put(self, **facts: Any) -> None:
        self._state.update(facts, seq=self._state["seq"] + 1)
        os.makedirs(RUN, mode=0o700, exist_ok=True)
        write_json(path_of(self._id), self._state)
        if not sys.stderr.isatty() and facts.get("step"):
            print(facts["step"], file=sys.stderr, flush=True)  # for the journal


def execute(job_id: str, command: str, work: Callable[[Job], dict[str, Any]]) -> int:
    """Do the work of one job; its result or error goes to its progress file. Returns the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by a signal"))
    job, started = Job(job_id, command), time.time()
    try:
        result = work(job)
    except Failure as failure:
        _ended(job, command, started, error=failure.as_dict())
        print(f"{failure.msg} {failure.found}".strip(), file=sys.stderr)
        return EXIT_CODES[failure.kind]
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
        _ended(job, command, started, error={"kind": "failed", "msg": f"The {command} ended early.", "found": said})
        raise
    _ended(job, command, started, result=result)
    return 0


def _ended(job: Job, command: str, started: float, **outcome: Any) -> None:
    job.end(**outcome)
    if command == "backup":
        os.makedirs(os.path.dirname(LAST), mode=0o755, exist_ok=True)
        error = outcome.get("error")
        last = {
            "started": iso(started),
            "ended": iso(time.time()),
            "ok": error is None,
            "id": (outcome.get("result") or {}).get("id", ""),
            "error": f"{error['msg']} {error.get('found', '')}".strip() if error else "",
        }
        write_json(LAST, last, 0o644)


@contextlib.contextmanager
def locked(data_dir: str) -> Iterator[None]:
    """Nobody else backs up or restores this volume meanwhile; a killed holder's lock is gone with it."""
    with open(os.path.join(data_dir, LOCK), "w", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure(
                "Another backup or restore of this volume is running.",
                expected="one at a time",
                next_step="wait for it (`systemctl status labctl-backup labctl-backup-job` on the server)",
            ) from None
        yield


def start(program: str, arguments: list[str]) -> dict[str, Any]:
    """Start a job as a unit of its own, so that it goes on whatever becomes of the connection. Returns its id.

    A job that is running is told instead of a second one being started.
    """
    os.makedirs(RUN, mode=0o700, exist_ok=True)
    unit = unit_of(arguments[0])
    record = os.path.join(RUN, f"current-{unit}.json")
    if _active(unit):
        return {**(read_json(record) or {}), "running": True}
    job_id = uuid.uuid4().hex[:12]
    Job(job_id, arguments[0]).step("starting")
    write_json(record, {"job": job_id, "arguments": arguments})
    done = subprocess.run(
        # PartOf: what stops the stack for a drain stops this, too, or it would hold the volume.
        ["systemd-run", f"--unit={unit}", "--collect", "--quiet", "--property=PartOf=labctl-stack.service",
         "--property=Nice=5", "/usr/bin/python3", program, *arguments, "--job", job_id],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        if _active(unit):
            return {**(read_json(record) or {}), "running": True}
        raise Failure(
            "The job can't be started.", found=done.stderr.strip(), next_step="systemctl status on the server"
        )
    return {"job": job_id, "arguments": arguments, "running": False}


def unit_of(command: str) -> str:
    """The unit that a command runs as."""
    return LOOKING_UNIT if command in LOOKING else UNIT


def _active(unit: str) -> bool:
    done = subprocess.run(["systemctl", "is-active", "--quiet", unit], check=False)
    return done.returncode == 0


def wait(job_id: str, seen: int, seconds: float) -> dict[str, Any]:
    """The job's progress as soon as it is another than `seen`, or after `seconds`.

    A job whose unit is gone without a last word was killed: its state is `failed` then.
    """
    deadline = time.monotonic() + seconds
    while True:
        command = (read_json(path_of(job_id)) or {}).get("command", "")
        alive = _active(unit_of(command))
        found: dict[str, Any] = read_json(path_of(job_id)) or {"state": "lost", "seq": 0, "step": ""}
        if found["state"] in ("running", "lost") and not alive:
            words = {"kind": "failed", "msg": "The job was killed.", "found": f"its last step: {found['step']}"}
            return {**found, "state": "failed", "error": {**words, "next_step": "run the same command again"}}
        if found["seq"] != seen or found["state"] != "running" or time.monotonic() > deadline:
            return found
        time.sleep(LOOK_SECONDS)
