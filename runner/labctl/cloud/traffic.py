"""Counts the API requests of a session, and repeats the one whose connection the server had just closed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Methods that do the same however often they arrive.
_REPEATABLE = frozenset({"GET", "HEAD", "PUT", "DELETE"})


@dataclass
class Traffic:
    """The API requests answered so far: method, URL without query, status."""

    log: list[tuple[str, str, int]] = field(default_factory=list)

    def watch(self, session: Any) -> None:
        """Counts and steadies a `requests` session.

        Some API servers (uWSGI's own HTTP socket, as Keystone is often run) close a kept connection without saying so,
        and a request sent at that moment is reset. One that can be repeated is, once. A POST can't be: it could make
        a second server. So each POST gets a connection of its own.
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
        try:
            return send(request, **options)
        except OSError as error:
            if request.method in _REPEATABLE and was_reset(error):
                return send(request, **options)
            raise

    adapter.send = steady_send


def was_reset(error: BaseException) -> bool:
    """Whether the other end closed the connection before it answered (not a time-out, not a refused connection)."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ConnectionResetError | BrokenPipeError):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
