"""A running load: its lock, and its stages' numbers beside what every job tells.

Its progress is written twice a second, whatever the load is at.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import AbstractContextManager
from typing import Any

from labctl_etl.rclone import RUN
from labctl_job import job
from labctl_job.commands import Program
from labctl_job.errors import Failure

WRITE_SECONDS = 0.5
STAGES = ("extract", "transform", "load")
#: Seconds over which a rate is taken.
WINDOW = 10.0
PROGRAM = Program(
    path=os.path.dirname(os.path.abspath(__file__)),
    folder=RUN,
    unit_of=lambda _: "labctl-etl-job.service",
    noun="load",
    if_not_started="labctl doctor",
    if_killed="labctl etl again: it sends only what is missing",
)


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


class Job(job.Job):
    """Where the rest of the program says what it does."""

    def __init__(self, job_id: str, command: str) -> None:
        super().__init__(RUN, job_id, command)
        self.stages = {name: Stage() for name in STAGES}
        self._lock, self._done = threading.Lock(), threading.Event()
        threading.Thread(target=self._keep_writing, daemon=True).start()

    def end(self, **outcome: Any) -> None:
        """The last word: `result`, or `error`."""
        self._done.set()
        super().end(**outcome)

    def _keep_writing(self) -> None:
        while not self._done.wait(WRITE_SECONDS):
            self._put()

    def _put(self, **facts: Any) -> None:
        with self._lock:
            if self._done.is_set() and "state" not in facts:
                return
            super()._put(**facts, stages={name: stage.as_dict() for name, stage in self.stages.items()})


def locked() -> AbstractContextManager[None]:
    """Nobody else loads from this host meanwhile."""
    os.makedirs(RUN, mode=0o700, exist_ok=True)
    busy = Failure(
        "Another load is running on this server.",
        next_step="wait for it (`labctl ssh -- systemctl status labctl-etl-job`), then run labctl etl again",
    )
    return job.locked(os.path.join(RUN, "lock"), busy)
