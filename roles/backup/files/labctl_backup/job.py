"""A running backup or restore: its unit, its lock, and how the last backup ended."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager
from typing import Any

from labctl_backup.model import iso
from labctl_job import job
from labctl_job.commands import Program
from labctl_job.errors import Failure

RUN = "/run/labctl-backup"
#: What only looks doesn't wait for what writes.
LOOKING = ("list", "verify")
#: The last backup's end on this host, for `labctl status`.
LAST = "/var/lib/labctl/backup-last.json"
LOCK = ".labctl/backup.lock"
PROGRAM = Program(
    path=os.path.dirname(os.path.abspath(__file__)),
    folder=RUN,
    unit_of=lambda command: f"labctl-backup-{'look' if command in LOOKING else 'job'}.service",
    noun="job",
    if_not_started="systemctl status on the server",
    if_killed="run the same command again",
    # PartOf: what stops the stack for a drain stops this, too, or it would hold the volume.
    properties=("PartOf=labctl-stack.service", "Nice=5"),
)


class Job(job.Job):
    """Where the rest of the program says what it does."""

    def __init__(self, job_id: str, command: str) -> None:
        super().__init__(RUN, job_id, command)
        self._started = time.time()

    def end(self, **outcome: Any) -> None:
        """The last word: `result`, or `error`. A backup's stays on the host."""
        super().end(**outcome)
        if self.command == "backup":
            os.makedirs(os.path.dirname(LAST), mode=0o755, exist_ok=True)
            error = outcome.get("error")
            last = {
                "started": iso(self._started),
                "ended": iso(time.time()),
                "ok": error is None,
                "id": (outcome.get("result") or {}).get("id", ""),
                "error": f"{error['msg']} {error.get('found', '')}".strip() if error else "",
            }
            job.write_json(LAST, last, 0o644)


def locked(data_dir: str) -> AbstractContextManager[None]:
    """Nobody else backs up or restores this volume meanwhile."""
    busy = Failure(
        "Another backup or restore of this volume is running.",
        expected="one at a time",
        next_step="wait for it (`systemctl status labctl-backup labctl-backup-job` on the server)",
    )
    return job.locked(os.path.join(data_dir, LOCK), busy)
