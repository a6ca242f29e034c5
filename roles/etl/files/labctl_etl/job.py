"""A running load: its lock, its progress for whoever watches, and what became of it.

Progress is a small file that is replaced twice a second, so that watching needs no connection that must not break.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from labctl_etl.errors import EXIT_CODES, Failure
from labctl_etl.rclone import RUN

UNIT = "labctl-etl-job.service"
LOOK_SECONDS, WRITE_SECONDS = 0.2, 0.5
STAGES = ("extract", "transform", "load")
#: Seconds over which a rate is taken.
WINDOW = 10.0


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


class Stage:
    """Bytes and images of one stage as they come."""

    def __init__(self) -> None:
        self.bytes = self.images = 0
        self.total_bytes = self.total_images = -1
        self._marks: list[tuple[float, int, int]] = []
        self._lock = threading.Lock()

    def add(self, size: int, images: int = 1) -> None:
        """So much more."""
        with self._lock:
            self.bytes += size
            self.images += images

    def as_dict(self) -> dict[str, Any]:
        """For whoever watches; rates per second over the last WINDOW seconds, `left` in seconds, None if unknown."""
        now = time.monotonic()
        with self._lock:
            self._marks = [mark for mark in self._marks if now - mark[0] <= WINDOW] or self._marks[-1:]
            first = self._marks[0] if self._marks else (now, self.bytes, self.images)
            self._marks.append((now, self.bytes, self.images))
            span = max(now - first[0], 1e-3)
            rate, image_rate = (self.bytes - first[1]) / span, (self.images - first[2]) / span
            left: float | None = None
            if self.total_images >= 0:
                missing = max(0, self.total_images - self.images)
                left = 0.0 if not missing else missing / image_rate if image_rate else None
            elif self.total_bytes >= 0:
                missing = max(0, self.total_bytes - self.bytes)
                left = 0.0 if not missing else missing / rate if rate else None
            return {
                "bytes": self.bytes, "images": self.images,
                "total_bytes": self.total_bytes, "total_images": self.total_images,
                "bytes_per_second": round(rate), "images_per_second": round(image_rate, 1),
                "left": None if left is None else round(left, 1),
            }  # fmt: skip


class Job:
    """Where the rest of the program says what it does."""

    def __init__(self, job_id: str, command: str) -> None:
        self._id, self._lock = job_id, threading.Lock()
        self._state: dict[str, Any] = {"state": "running", "command": command, "step": "", "text": "", "seq": 0}
        self.stages = {name: Stage() for name in STAGES}
        self.notes: list[str] = []
        self._done = threading.Event()
        self._writer = threading.Thread(target=self._keep_writing, daemon=True)

    def begin(self) -> None:
        """Tell progress from now on."""
        self._writer.start()

    def step(self, title: str) -> None:
        """A new step begins."""
        self._put(step=title, text="")
        print(title, file=sys.stderr, flush=True)  # for the journal

    def note(self, text: str) -> None:
        """Something that a person should know at the end."""
        self.notes.append(text)

    def end(self, **outcome: Any) -> None:
        """The last word: `result`, or `error`."""
        self._done.set()
        self._put(state="failed" if "error" in outcome else "done", notes=self.notes, **outcome)

    def _keep_writing(self) -> None:
        while not self._done.wait(WRITE_SECONDS):
            self._put()

    def _put(self, **facts: Any) -> None:
        with self._lock:
            if self._done.is_set() and "state" not in facts:
                return
            stages = {name: stage.as_dict() for name, stage in self.stages.items()}
            self._state.update(facts, stages=stages, seq=self._state["seq"] + 1)
            os.makedirs(RUN, mode=0o700, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=".new-", dir=RUN)
            with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
                json.dump(self._state, handle)
            os.replace(temporary, path_of(self._id))


def execute(job_id: str, command: str, work: Callable[[Job], dict[str, Any]]) -> int:
    """Do the work of one job; its result or error goes to its progress file. Returns the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by a signal"))
    job = Job(job_id, command)
    job.begin()
    try:
        job.end(result=work(job))
        return 0
    except Failure as failure:
        told = failure
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            job.end(error={"kind": "failed", "msg": f"The {command} ended early.", "found": f"{error}"})
            raise
        told = Failure(
            "The server's disk is full.", found=str(error),
            next_step="make room on the server (df -h), then labctl etl again: it sends only what is missing",
        )  # fmt: skip
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
        job.end(error={"kind": "failed", "msg": f"The {command} ended early.", "found": said})
        raise
    job.end(error=told.as_dict())
    print(f"{told.msg} {told.found}".strip(), file=sys.stderr)
    return EXIT_CODES[told.kind]


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Nobody else loads from this host meanwhile; a killed holder's lock is gone with it."""
    os.makedirs(RUN, mode=0o700, exist_ok=True)
    with open(os.path.join(RUN, "lock"), "w", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure(
                "Another load is running on this server.",
                next_step="wait for it (`labctl ssh -- systemctl status labctl-etl-job`), then run labctl etl again",
            ) from None
        yield


def start(program: str, arguments: list[str]) -> dict[str, Any]:
    """Start a job as a unit of its own, so that it goes on whatever becomes of the connection. Returns its id.

    A job that is running is told instead of a second one being started.
    """
    os.makedirs(RUN, mode=0o700, exist_ok=True)
    record = os.path.join(RUN, "current.json")
    if _active():
        return {**(read_json(record) or {}), "running": True}
    job_id = uuid.uuid4().hex[:12]
    Job(job_id, arguments[0])._put(step="starting")
    with open(record, "w", encoding="utf-8") as handle:
        json.dump({"job": job_id, "arguments": arguments}, handle)
    done = subprocess.run(
        ["systemd-run", f"--unit={UNIT}", "--collect", "--quiet", "/usr/bin/python3", program, *arguments,
         "--job", job_id],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise Failure("The load can't be started.", found=done.stderr.strip(), next_step="labctl doctor")
    return {"job": job_id, "arguments": arguments, "running": False}


def _active() -> bool:
    return subprocess.run(["systemctl", "is-active", "--quiet", UNIT], check=False).returncode == 0


def wait(job_id: str, seen: int, seconds: float) -> dict[str, Any]:
    """The job's progress as soon as it is another than `seen`, or after `seconds`.

    A job whose unit is gone without a last word was killed: its state is `failed` then.
    """
    deadline = time.monotonic() + seconds
    while True:
        alive = _active()
        found: dict[str, Any] = read_json(path_of(job_id)) or {"state": "lost", "seq": 0, "step": ""}
        if found["state"] in ("running", "lost") and not alive:
            words = {"kind": "failed", "msg": "The load was killed.", "found": f"its last step: {found['step']}",
                     "next_step": "labctl etl again: it sends only what is missing"}  # fmt: skip
            return {**found, "state": "failed", "error": words}
        if found["state"] != "running" or found["seq"] != seen or time.monotonic() > deadline:
            return found
        time.sleep(LOOK_SECONDS)
