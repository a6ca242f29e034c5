"""Counts the API requests of a session, and repeats what a busy server turned away."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import Any

from labctl.cloud.refusals import translate
from labctl.errors import CloudRefused

#: Methods that do the same however often they arrive.
_REPEATABLE = frozenset({"GET", "HEAD", "PUT", "DELETE"})
#: A busy service or the proxy before it: too many requests, bad gateway, unavailable, gateway time-out.
BUSY = frozenset({429, 502, 503, 504})
#: What says that the request was not looked at, so that even one that makes something may be sent again.
TURNED_AWAY = frozenset({429})
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
        Swift under load answered 503 to a PUT of a container, seen). Raises CloudRefused for a web page.
        """
        session.hooks["response"].append(self._note)
        for adapter in {id(adapter): adapter for adapter in session.adapters.values()}.values():
            _steady(adapter)  # http:// and https:// share one

    def _note(self, response: Any, *_: Any, **__: Any) -> None:
        self.log.append((str(response.request.method), str(response.url).partition("?")[0], int(response.status_code)))


def _steady(adapter: Any) -> None:
    send = adapter.send

    def steady_send(request: Any, **options: Any) -> Any:
        for pause in PAUSES:
            response = once_more_if_reset(request, **options)
            if response.status_code not in (BUSY if request.method in _REPEATABLE else TURNED_AWAY):
                return _checked(response)
            response.close()
            time.sleep(_pause(response, pause))
        return _checked(once_more_if_reset(request, **options))

    def once_more_if_reset(request: Any, **options: Any) -> Any:
        if request.method == "POST":
            adapter.close()
        try:
            return send(request, **options)
        except OSError as error:
            if request.method not in _REPEATABLE or not was_reset(error):
                raise
            return send(request, **options)

    adapter.send = steady_send


def _checked(response: Any) -> Any:
    """The response, unless the libraries would make something of it that it doesn't say."""
    _keep_a_torn_refusal(response)
    _refuse_a_page(response)
    _refuse_failed_discovery(response)
    return response


def _keep_a_torn_refusal(response: Any) -> None:
    """A refusal stays one though its text was cut off.

    uWSGI resets the connection of a request whose body the service didn't read: Cinder's 401 to a POST whose token had
    ended came so (seen), and that status is what a new token is asked for by.
    """
    if response.status_code < 400:
        return
    try:
        _ = response.content
    except OSError:
        response._content = b""


def _refuse_failed_discovery(response: Any) -> None:
    """A GET without a token asks a service for its versions; where that fails, openstacksdk says that it has none."""
    request = response.request
    failed = response.status_code in TURNED_AWAY or response.status_code >= 500
    if failed and request.method == "GET" and "X-Auth-Token" not in request.headers:
        from keystoneauth1.exceptions import from_response

        error = from_response(response, request.method, request.url)
        raise translate(error, f"ask {str(request.url).partition('?')[0]} for its versions") from error


def _refuse_a_page(response: Any) -> None:
    """Raises for a web page or a text where an API's answer should be (a login page before the network, say).

    The libraries make of one an empty record, or an error that says nothing. Only a 200 that has a body is looked at
    (Swift calls the empty answer to a PUT HTML), and of an object store's only pages: objects may be text.
    """
    kind = str(response.headers.get("Content-Type", "")).lower()
    url = str(response.url).partition("?")[0]
    strange = "text/html" in kind or ("text/" in kind and "/AUTH_" not in url)
    if response.status_code != 200 or not strange or not response.content:
        return
    page = "web page" if "html" in kind else "text"
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", response.text)).strip()[:200]
    raise CloudRefused(
        f"{url} answered with a {page}",
        expected="JSON, an API's answer",
        found=f"HTTP {response.status_code}, {page}: {text}",
        source=f"{response.request.method} {url}",
        next_step="check auth_url, and whether this network wants a login or a proxy first; then run the command again",
    )


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
