"""Says what is going on, on stderr: one line per step, what it waits for meanwhile, and how long it took.

In a terminal the current step is a line that moves; elsewhere (a log, CI) there are plain lines and, so that nothing
ever stands still in silence, a reminder every few seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.status import Status

#: Seconds without a line after which a log that is not a terminal hears what is being waited for.
REMINDER_SECONDS = 10.0


class Progress:
    """Where the layers below `cli` report to; only this class writes. `verbose`: whatever is told is a line."""

    def __init__(self, console: Console, *, verbose: bool = False) -> None:
        self._console = console
        self._verbose = verbose
        self._live: Status | None = None
        self._step = ""
        self._text = ""
        self._result = ""
        self._said = 0.0
        self._started = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def step(self, title: str) -> Iterator[Progress]:
        """A step with a beginning and an end; `tell` says in between what it is doing."""
        self._step, self._text, self._result, self._started = title, "", "", time.monotonic()
        stop = threading.Event()
        if self._console.is_terminal:
            self._live = self._console.status(escape(title))
            self._live.start()
        else:
            self._say(f"{title} …")
        ticker = threading.Thread(target=self._tick, args=(stop,), daemon=True)
        ticker.start()
        try:
            yield self
        except BaseException:
            self._end(stop, ticker)
            self._say(f"✗ {title}  ({self._elapsed():.1f} s)", style="red")
            raise
        self._end(stop, ticker)
        outcome = f": {self._result}" if self._result else ""
        self._say(f"✓ {title}{outcome}  ({self._elapsed():.1f} s)")

    def tell(self, text: str) -> None:
        """What the current step is doing or waiting for, in a few words."""
        with self._lock:
            new, self._text = text != self._text, text
        if new and self._verbose:
            self._say(f"  {text}")

    def result(self, text: str) -> None:
        """What the current step came to; shown at its end."""
        self._result = text

    def note(self, text: str, style: str | None = None) -> None:
        """A line of its own: something a person should know, not tied to a step."""
        self._say(text, style=style)

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def _end(self, stop: threading.Event, ticker: threading.Thread) -> None:
        stop.set()
        ticker.join()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _tick(self, stop: threading.Event) -> None:
        while not stop.wait(0.25):
            with self._lock:
                text = f"{self._step}: {self._text}" if self._text else self._step
            if self._live is not None:
                self._live.update(f"{escape(text)} [dim]{self._elapsed():.0f} s[/dim]")
            elif time.monotonic() - self._said > REMINDER_SECONDS:
                self._say(f"  {text}  ({self._elapsed():.0f} s)")

    def _say(self, text: str, style: str | None = None) -> None:
        self._said = time.monotonic()
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
