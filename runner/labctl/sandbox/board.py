"""Work that goes on in several threads, told as one sentence by the thread that waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from labctl.models import Tell

#: Seconds between two sentences; labctl's rule is at least one every 2 s.
INTERVAL_S = 1.5


@dataclass
class Job:
    """A piece of work; whoever does it writes what it is at into `doing`."""

    name: str
    board: Board = field(repr=False)
    doing: str = ""
    since: float = field(default_factory=time.monotonic)

    def note(self, doing: str) -> None:
        """What it does now, after its name: "step 3 of 9"."""
        self.doing = doing

    def say(self, sentence: str) -> None:
        """A sentence worth a line of its own: something is done."""
        self.board.news.append(sentence)

    def sentence(self) -> str:
        """Such as "OpenStack image: step 3 of 9 (84 s)"."""
        return f"{self.name}: {self.doing or 'begun'} ({time.monotonic() - self.since:.0f} s)"


class Board:
    """Runs jobs in threads. `finish` waits, tells, and raises the first failure after every thread has ended.

    A job waits in its thread for those it comes after: start them in that order.
    """

    def __init__(self, workers: int = 24) -> None:
        self.pool = ThreadPoolExecutor(workers)
        self.futures: set[Future[None]] = set()
        self.jobs: list[Job] = []
        self.news: list[str] = []
        self.stop = threading.Event()
        self.failure: BaseException | None = None

    def start(self, name: str, work: Callable[[Job], None], after: tuple[Future[None], ...] = ()) -> Future[None]:
        """Runs `work(job)` in a thread as soon as everything in `after` has succeeded."""

        def run() -> None:
            for future in after:
                future.result()
            if self.stop.is_set():
                return
            job = Job(name, self)
            self.jobs.append(job)
            try:
                work(job)
            except BaseException as error:
                if not self.stop.is_set():
                    self.failure = error  # what the others then raise is only its consequence
                    self.stop.set()
                raise
            finally:
                self.jobs.remove(job)

        future = self.pool.submit(run)
        self.futures.add(future)
        return future

    def finish(self, tell: Tell) -> None:
        """Waits for all jobs, with a sentence every `INTERVAL_S`; raises what the first failed job raised."""
        pending = set(self.futures)
        try:
            while pending:
                done, pending = wait(pending, timeout=INTERVAL_S, return_when=FIRST_COMPLETED)
                while self.news:
                    tell(self.news.pop(0))
                if not done and self.jobs:
                    tell("; ".join(job.sentence() for job in list(self.jobs)))
        except BaseException:
            self.stop.set()
            raise
        finally:
            self.pool.shutdown(wait=True, cancel_futures=True)
        while self.news:
            tell(self.news.pop(0))
        if self.failure:
            raise self.failure
