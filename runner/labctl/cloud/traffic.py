"""Counts the API requests of a session, and repeats what a busy server turned away."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

#: Methods that do the same however often they arrive.
_REPEATABLE = frozenset({"GET", "HEAD", "PUT", "DELETE"})
#: A busy service or the proxy before it: too many requests, bad gateway, unavailable, gateway time-out.
BUSY = frozenset({429, 502, 503, 504})
#: Seconds before the second and the third try of a repeatable request, where the service doesn't say (Retry-After).
PAUSES = (1.0, 4.0)
#: Seconds that a Retry-After is heeded for at most: longer, and the refusal is better than the wait.
LONGEST_PAUSE = 15.0


@dataclass
class Traffic:
    """The API requests answered so far: method, URL without query, status."""

    log: list[tuple[str, str, int]] = field(default_factory=list)

    def watch(self, session: Any) -> None:
        """Counts and steadies a `requests` session.

        Some API servers (uWSGI's own HTTP socket, as Keystone is often run) close a kept connection without saying so,
        and a request sent at that moment is reset. One that can be repeated is, once. A POST can't be: it could make
        a second server. So each POST gets a connection of its own. Likewise for a service that says it is busy (a
        Swift under load answered 503 to a PUT of a container, seen).
        """
        session.hooks["response"].append(self._note)
        for adapter in {id(adapter): adapter for adapter in session.adapters.values()}.values():
            _steady(adapter)  # http:// and https:// share one

    def _note(self, response: Any, *_: Any, **__: Any) -> None:
        self.log.append((str(response.request.method), str(response.url).partition("?")[0], int(response.status_code)))


def _steady(adapter: Any) -> None:
    send = adapter.send

    def steady_send(request: Any, **options: Any) -> Any:
        if request.method == "POST":
            adapter.close()
        if request.method not in _REPEATABLE:
            return send(request, **options)
        for pause in PAUSES:
            response = once_more_if_reset(request, **options)
            if response.status_code not in BUSY:
                return response
            response.close()
            time.sleep(_pause(response, pause))
        return once_more_if_reset(request, **options)

    def once_more_if_reset(request: Any, **options: Any) -> Any:
        try:
            return send(request, **options)
        except OSError as error:
            if not was_reset(error):
                raise
            return send(request, **options)

    adapter.send = steady_send


def _pause(response: Any, otherwise: float) -> float:
    """Seconds that the service asks to wait, at most LONGEST_PAUSE; `otherwise` if it says nothing or gives a date."""
    said = str(response.headers.get("Retry-After", ""))
    return min(float(said), LONGEST_PAUSE) if said.isdecimal() else otherwise


def was_reset(error: BaseException) -> bool:
    """Whether the other end closed the connection before it answered (not a time-out, not a refused connection)."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ConnectionResetError | BrokenPipeError):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
