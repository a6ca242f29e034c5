"""A proxy before the real APIs that fails on request: only what real services can't be made to do is done by it.

Every service of the catalogue is reached through it at `URL/SCHEME/HOST:PORT/PATH`: the addresses that the services
tell (Keystone's catalogue, versions, links) are rewritten to that form. What isn't to fail is the real answer.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests

#: Headers of one connection only, and those that no longer fit the body.
_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length", "content-encoding", "host"})


@dataclass
class Fault:
    """What happens to requests of that method whose real URL matches `url`, the next `times` times.

    `status` and `body` are the answer (status None: silence, until the client hangs up). `executed`: the real service
    gets the request all the same, and only its answer is lost.
    """

    url: str
    status: int | None
    method: str = ".*"
    body: str = ""
    kind: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1_000_000
    executed: bool = False


@dataclass
class Proxy:
    """The running proxy: the faults to come, and what was asked of it (method, real URL without query, status)."""

    port: int
    faults: list[Fault] = field(default_factory=list)
    seen: list[tuple[str, str, int | None]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def through(self, url: str) -> str:
        """A real URL, as it is reached through the proxy."""
        return re.sub(r"^(https?)://", rf"http://127.0.0.1:{self.port}/\1/", url)

    def rewritten(self, body: bytes, netloc: str) -> bytes:
        """A service's answer with all addresses on the cloud's host leading here."""
        host = re.escape(netloc.partition(":")[0])
        here = f"http://127.0.0.1:{self.port}/".encode()
        return re.sub(rb"(https?)://(" + host.encode() + rb"[:/])", lambda m: here + m[1] + b"/" + m[2], body)

    def fault_for(self, method: str, url: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.url, url) and re.fullmatch(fault.method, method):
                    fault.times -= 1
                    return fault
        return None

    def count(self, method: str, url: str) -> int:
        """How many such requests there were."""
        return len([one for one in self.seen if re.fullmatch(method, one[0]) and re.search(url, one[1])])


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy

    def do_GET(self) -> None:
        scheme, _, rest = self.path.lstrip("/").partition("/")
        url = f"{scheme}://{rest}"
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.fault_for(self.command, url)
        if fault is None or fault.executed:
            real = self._forward(url, body)
        if fault is None:
            self._note(url, real.status_code)
            kept = {key: value for key, value in real.headers.items() if key.lower() not in _HOP}
            answer = real.content
            if "json" in real.headers.get("Content-Type", ""):
                answer = self.proxy.rewritten(answer, rest.partition("/")[0])
            self._answer(real.status_code, answer, kept)
            return
        self._note(url, fault.status)
        if fault.status is None:
            self.proxy.ended.wait(60)
            self.close_connection = True
            return
        self._answer(fault.status, fault.body.encode(), {"Content-Type": fault.kind, **fault.headers})

    do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = do_GET

    def _note(self, url: str, status: int | None) -> None:
        self.proxy.seen.append((self.command, url.partition("?")[0], status))

    def _forward(self, url: str, body: bytes) -> requests.Response:
        headers = {key: value for key, value in self.headers.items() if key.lower() not in _HOP}
        headers["Accept-Encoding"] = "identity"
        # a connection of its own for each request: uWSGI closes kept ones without a word
        return requests.request(
            self.command, url, data=body or None, headers=headers, allow_redirects=False, timeout=120
        )

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Connection", "close")
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD" and status != 204:
            self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def proxy() -> Iterator[Proxy]:
    """The proxy, until the block ends."""
    handler = type("Handler", (_Handler,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        made = Proxy(server.server_address[1])
        handler.proxy = made  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield made
        finally:
            made.ended.set()
            server.shutdown()
