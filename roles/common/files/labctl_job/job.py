"""A running job: its lock, its progress for whoever watches, and what became of it.

Progress is a small file that is replaced at each step, so that watching needs no connection that must not break.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from labctl_job.errors import EXIT_CODES, Failure


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


def path_of(folder: str, job_id: str) -> str:
    """Where a job's progress is."""
    return os.path.join(folder, f"job-{job_id}.json")


class Job:
    """Where the rest of a program says what it does. `folder`: of its progress files, below /run."""

    def __init__(self, folder: str, job_id: str, command: str) -> None:
        self._path, self.command = path_of(folder, job_id), command
        self._state: dict[str, Any] = {"state": "running", "command": command, "step": "", "text": "", "seq": 0}
        self.notes: list[str] = []

    def step(self, title: str) -> None:
        """A new step begins."""
        self._put(step=title, text="")
        print(title, file=sys.stderr, flush=True)  # for the journal

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
        os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
        write_json(self._path, self._state)


def execute(job: Job, work: Callable[[], dict[str, Any]]) -> int:
    """Do a job's work; its result or error goes to its progress file. Returns the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by a signal"))
    try:
        result = work()
    except Failure as failure:
        job.end(error=failure.as_dict())
        print(f"{failure.msg} {failure.found}".strip(), file=sys.stderr)
        return EXIT_CODES[failure.kind]
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
        job.end(error={"kind": "failed", "msg": f"The {job.command} ended early.", "found": said})
        raise
    job.end(result=result)
    return 0


@contextlib.contextmanager
def locked(path: str, busy: Failure) -> Iterator[None]:
    """Nobody else holds the lock meanwhile, or `busy` is raised; a killed holder's lock is gone with it."""
    with open(path, "w", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        yield
