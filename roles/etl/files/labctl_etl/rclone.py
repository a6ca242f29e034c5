"""The host's rclone as one process that lives as long as a load does: one login, connections that are used again.

It listens on a Unix socket in a folder that only root enters. Nothing here knows which protocol the store speaks.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

from labctl_job.errors import Failure

RUN = "/run/labctl-etl"
#: Without these two every object of a listing, and every PUT, costs a request more. They say nothing to other stores.
HINTS = ("--swift-no-large-objects", "--s3-no-head")
START_SECONDS = 30
#: How long a store may be away, in seconds, before a load gives up; rclone's own attempts are part of it.
PATIENCE = 600
CALL_SECONDS = 3600
#: What an upload out of memory may have, in bytes.
UPLOAD_SIZES = (1 << 18, 1 << 22, 1 << 28)
#: Seconds between looks at a long command: the first and the longest.
LOOK_FIRST, LOOK_LAST = 0.03, 0.3
REFUSED = re.compile(
    r"\b(401|403)\b|Unauthori[sz]ed|Forbidden|Authorization Failed|AccessDenied|InvalidAccessKeyId"
    r"|SignatureDoesNotMatch|Could not find (Application Credential|user|project)",
    re.IGNORECASE,
)
FULL = re.compile(r"no space left|disk quota|\b507\b|\b413\b|QuotaExceeded", re.IGNORECASE)
#: What a store says to a request of a kind that it never answers.
UNKNOWN = re.compile(r"\b501\b|NotImplemented")


class StoreError(Exception):
    """What rclone said. `status` is that of its answer: 404 where the object isn't there."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("rclone", timeout=CALL_SECONDS)
        self._path = path

    def connect(self) -> None:
        """To the socket rather than to a host."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Rclone:
    """A running rclone. Its methods may be called from several threads."""

    def __init__(self, folder: str, process: subprocess.Popen[bytes]) -> None:
        self.socket, self._process = os.path.join(folder, "rc.sock"), process
        self.folder, self._local = folder, threading.local()
        self.ended = threading.Event()

    def call(self, command: str, **parameters: Any) -> dict[str, Any]:
        """One of rclone's remote-control commands. StoreError if it fails."""
        body = json.dumps(parameters).encode()
        answer: dict[str, Any] = json.loads(self._ask("POST", f"/{command}", body, "application/json") or b"{}")
        return answer

    def follow(self, command: str, look: Callable[[], object], stop: threading.Event, **parameters: Any) -> None:
        """A long command; `look` is called now and then. It is given up when `stop` is set. StoreError if it fails."""
        job = self.call(command, _async=True, **parameters)["jobid"]
        pause, stopped, said = LOOK_FIRST, False, ""
        while not (found := self.call("job/status", jobid=job))["finished"]:
            if not stopped and stop.wait(pause):
                stopped = True
                with contextlib.suppress(StoreError):
                    self.call("job/stop", jobid=job)
            elif stopped:
                time.sleep(pause)  # what is being sent must be over before anything is removed
            pause = min(LOOK_LAST, pause * 1.5)
            look()
            said = str(self.call("core/stats", group=f"job/{job}").get("lastError") or "")
            if not stopped and _final("", said) is not None:
                # each of the other files would only be refused, too
                stopped = True
                with contextlib.suppress(StoreError):
                    self.call("job/stop", jobid=job)
        if not found["success"] and said and _final("", said) is not None:
            raise StoreError(said, 500)
        if not found["success"]:
            raise StoreError(str(found["error"]), 500)

    def get(self, fs: str, path: str) -> bytes:
        """An object's content. StoreError with status 404 where there is none."""
        return self._ask("GET", f"/{urllib.parse.quote(f'[{fs}]', safe='')}/{urllib.parse.quote(path)}")

    def upload(self, fs: str, path: str, data: bytes) -> None:
        """One object out of memory: one request to the store, with its MD5 compared."""
        folder, _, name = path.rpartition("/")
        boundary = "labctl-7f1d0c9a5e"
        while boundary.encode() in data:
            boundary += "x"
        quoted = name.replace("\\", "\\\\").replace('"', '\\"')
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{quoted}"\r\n\r\n'
        body = b"".join((head.encode(), data, f"\r\n--{boundary}--\r\n".encode()))
        # what is not larger than that is sent as it is; more would be cut into segments. rclone keeps so much memory
        # for it, and logs in anew for every other value
        cutoff = next(size for size in UPLOAD_SIZES if size > len(data))
        settings = json.dumps({"StreamingUploadCutoff": cutoff})
        query = urllib.parse.urlencode({"fs": fs, "remote": folder, "_config": settings})
        self._ask("POST", f"/operations/uploadfile?{query}", body, f"multipart/form-data; boundary={boundary}")

    def _ask(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> bytes:
        for attempt in (1, 2):
            connection = getattr(self._local, "connection", None)
            fresh = connection is None
            if connection is None:
                connection = self._local.connection = _Connection(self.socket)
            try:
                connection.request(method, path, body, {"Content-Type": kind} if kind else {})
                answer = connection.getresponse()
                data: bytes = answer.read()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                self._local.connection = None
                if self._process.poll() is not None or fresh or attempt == 2:
                    raise StoreError(f"rclone doesn't answer ({error}): {self.last_words()}", 0) from None
                continue
            if answer.status >= 400:
                raise StoreError(_error_text(data), answer.status)
            return data
        raise AssertionError("unreachable")

    def last_words(self) -> str:
        """The end of rclone's log."""
        with contextlib.suppress(OSError), open(os.path.join(self.folder, "log"), errors="replace") as log:
            return log.read()[-400:].strip()
        return ""


@contextlib.contextmanager
def running(config: str, scratch: str) -> Iterator[Rclone]:
    """An rclone that is gone at the end, however this process ends. `scratch`: where it may put a file."""
    binary = shutil.which("rclone", path="/usr/local/bin:/usr/bin:/bin")
    if binary is None or not os.path.exists(config):
        raise Failure("The server has no rclone, or no rclone.conf.", expected=config, next_step="labctl converge")
    os.makedirs(RUN, mode=0o700, exist_ok=True)
    os.makedirs(scratch, mode=0o700, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="rclone-", dir=RUN)
    # the kernel ends it when this process is killed
    command = ["setpriv", "--pdeathsig", "KILL", "--", binary, "rcd", "--config", config,
               f"--rc-addr=unix://{folder}/rc.sock", "--rc-no-auth", "--rc-serve",
               "--contimeout=10s", "--timeout=60s", "--low-level-retries=3", "--retries=1", "--temp-dir", scratch,
               "--ignore-times", *HINTS]  # fmt: skip
    with open(os.path.join(folder, "log"), "wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        rclone = Rclone(folder, process)
        _await(rclone, process)
        yield rclone
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _await(rclone: Rclone, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        if os.path.exists(rclone.socket):
            with contextlib.suppress(StoreError):
                rclone.call("rc/noop")
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise Failure("rclone doesn't start.", found=rclone.last_words(), next_step="labctl converge --only rclone")
        time.sleep(0.02)


def patient(
    what: str, ask: Callable[[], Any], stop: threading.Event | None = None, left: Callable[[], int] | None = None
) -> Any:
    """Ask until the store answers, for PATIENCE seconds. What it refuses for good is told at once, as a Failure.

    `left`: how much there is still to do; as long as that gets less, the store isn't away.
    """
    deadline, pause = time.monotonic() + PATIENCE, 0.5
    known = left() if left else 0
    while True:
        try:
            return ask()
        except StoreError as error:
            if error.status == 404:
                raise
            text = str(error)
            if (failure := _final(what, text)) is not None:
                raise failure from None
            if left is not None and (now := left()) < known:
                known, deadline, pause = now, time.monotonic() + PATIENCE, 0.5
            if time.monotonic() > deadline or error.status == 0:
                raise Failure(
                    f"The object store doesn't answer: {what}.",
                    found=text[-500:],
                    next_step="when it is back, run labctl etl again: it sends only what is missing",
                ) from None
        if stop is not None and stop.wait(pause):
            raise Failure("The load was given up.")
        if stop is None:
            time.sleep(pause)
        pause = min(5.0, pause * 1.5)


def _final(what: str, text: str) -> Failure | None:
    if REFUSED.search(text):
        return Failure(
            f"The object store refused the server's credential: {what}.",
            kind="refused",
            expected="a credential that is valid",
            found=text[-500:],
            next_step="labctl up (it makes a new one), then labctl etl again: it sends only what is missing",
        )
    if FULL.search(text):
        return Failure(
            f"The object store has no room: {what}.", kind="refused", found=text[-500:],
            next_step="make room or raise the quota, then labctl etl again: it sends only what is missing",
        )  # fmt: skip
    if UNKNOWN.search(text):
        return Failure(
            f"The object store doesn't know this kind of request: {what}.", found=text[-500:],
            next_step="report it with the name of the store: a load should do with what all stores answer",
        )  # fmt: skip
    return None


def _error_text(data: bytes) -> str:
    try:
        return str(json.loads(data)["error"])
    except (ValueError, KeyError, TypeError):
        return data.decode(errors="replace")[-500:]
