"""Waiting for a state, with a time-out and a word every second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from labctl.errors import CloudRefused
from labctl.models import Tell

#: Seconds between two looks. States change within seconds; once a second keeps `tell` below its 2 s and the API calm.
INTERVAL = 1.0

T = TypeVar("T")


def wait_until(
    look: Callable[[], tuple[T | None, str]], tell: Tell, timeout: float, interval: float = INTERVAL
) -> tuple[T | None, str, float]:
    """Looks until `look` gives a result, or `timeout` seconds are over.

    `look` returns the result (None: not yet) and a sentence about what it saw, which `tell` gets with the seconds
    passed. Returns the result (None after the time-out), the last sentence and the seconds waited.
    """
    started = time.monotonic()
    while True:
        result, seen = look()
        passed = time.monotonic() - started
        if result is not None or passed >= timeout:
            return result, seen, passed
        tell(f"{seen}, {passed:.0f} s")
        time.sleep(min(interval, max(0.0, timeout - passed)))


def wait_gone(look: Callable[[], str], tell: Tell, timeout: float) -> None:
    """Waits until something that is being deleted is gone: until `look` returns "" instead of a sentence about it.

    Raises CloudRefused after `timeout` seconds.
    """

    def gone() -> tuple[bool | None, str]:
        seen = look()
        return (None if seen else True), seen

    done, seen, passed = wait_until(gone, tell, timeout)
    if not done:
        raise CloudRefused(
            f"{seen}, and not gone after {passed:.0f} s",
            next_step="run the same command again, or ask the site's help desk",
        )
