"""An archive as bytes: over HTTP in one pass that survives a cut, or by ranges; or from a file of this host."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from labctl_etl.model import Refused
from labctl_job.errors import Failure

CHUNK = 1 << 20
#: Seconds without a byte until an attempt counts as failed, and without progress until the download does.
TIMEOUT, PATIENCE = 60, 300
#: Of a range that is read ahead where an archive's directory is looked for.
BLOCK = 1 << 20
FINAL_REFUSALS = (400, 401, 403, 404, 405, 410, 451)
#: What a connection that breaks may raise.
BROKEN = (OSError, http.client.HTTPException, ValueError)


class Remote:
    """What a server says of a file: its size, whether it gives out ranges, and what tells one version from another."""

    def __init__(self, url: str) -> None:
        self.url = url
        with _patient(url, lambda: _open(url, "bytes=0-0")) as answer:
            headers = answer.headers
            self.ranges = answer.status == 206
            total = re.search(r"/(\d+)$", headers.get("Content-Range", "")) if self.ranges else None
            length = headers.get("Content-Length") if not self.ranges else None
            self.size = int(total[1]) if total else int(length) if length else -1
            etag = headers.get("ETag", "")
            self.etag = "" if etag.startswith("W/") else etag
            self.modified = headers.get("Last-Modified", "")

    def validators(self) -> dict[str, Any]:
        """What stays the same while the file does; empty where the server tells nothing of the kind."""
        found = {"etag": self.etag, "modified": self.modified}
        return {key: value for key, value in found.items() if value}

    def open(self, start: int, end: int | None = None) -> Any:
        """The bytes from start (to end, exclusive). Failure where the file isn't the one any more."""
        answer = _open(self.url, f"bytes={start}-{'' if end is None else end - 1}" if start or end else "", self.etag)
        if start and answer.status != 206:
            answer.close()
            raise Refused(self.url, "it was replaced by another file while it was read")
        return answer


class Stream:
    """One pass over a remote file; what was cut is taken up where it ended. `sha256` is of all bytes read so far."""

    def __init__(self, remote: Remote) -> None:
        self._remote, self.position = remote, 0
        self._answer: Any = None
        self._digest = hashlib.sha256()
        self.resumed = 0

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; b"" at the end."""
        waited = time.monotonic()
        while True:
            try:
                if self._answer is None:
                    self._answer = self._begin()
                block: bytes = self._answer.read(CHUNK if size < 0 else size)
                if not block and 0 <= self.position < self._remote.size:
                    raise OSError(f"the connection ended after {self.position} of {self._remote.size} bytes")
                self._digest.update(block)
                self.position += len(block)
                return block
            except BROKEN as error:
                self.close()
                if _final(error) or time.monotonic() - waited > PATIENCE:
                    raise _unreachable(self._remote.url, error) from None
                self.resumed += 1
                time.sleep(min(5.0, 0.2 * self.resumed))

    def _begin(self) -> Any:
        if self.position and not self._remote.ranges:
            answer = self._remote.open(0)  # the server can only begin anew: what was read is passed over
            left = self.position
            while left and (block := answer.read(min(CHUNK, left))):
                left -= len(block)
            return answer
        return self._remote.open(self.position)

    def sha256(self) -> str:
        """Of the whole file, which is read to its end for that."""
        while self.read(CHUNK):
            pass
        return self._digest.hexdigest()

    def close(self) -> None:
        """Give the connection up."""
        with contextlib.suppress(Exception):
            if self._answer is not None:
                self._answer.close()
        self._answer = None


class Seekable:
    """A remote file for `zipfile`, which looks for the directory at the end: read in blocks, each once."""

    def __init__(self, remote: Remote) -> None:
        self._remote, self._at, self._blocks = remote, 0, dict[int, bytes]()

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """The position."""
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        """Set the position."""
        self._at = offset + (0, self._at, self._remote.size)[whence]
        if self._at < 0:
            raise OSError("a position before the beginning")
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Bytes from the position on."""
        end = self._remote.size if size < 0 else min(self._at + size, self._remote.size)
        found = b""
        while self._at < end:
            number = self._at // BLOCK
            block = self._block(number)
            part = block[self._at - number * BLOCK : end - number * BLOCK]
            found += part
            self._at += len(part)
        return found

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            start = number * BLOCK
            end = min(start + BLOCK, self._remote.size)

            def get() -> Any:
                with self._remote.open(start, end) as answer:
                    data = answer.read()
                if len(data) != end - start:
                    raise OSError("a range was cut off")
                return data

            self._blocks[number] = _patient(self._remote.url, get)
        return self._blocks[number]


class File:
    """A file of this host, read like a Stream."""

    resumed = 0

    def __init__(self, path: str) -> None:
        try:
            self._file = open(path, "rb")  # noqa: SIM115 (closed with the source)
        except OSError as error:
            raise _unreachable(path, error) from None
        self._digest, self.position = hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes."""
        block = self._file.read(CHUNK if size < 0 else size)
        self._digest.update(block)
        self.position += len(block)
        return block

    def sha256(self) -> str:
        """Of the whole file, which is read to its end for that."""
        while self.read(CHUNK):
            pass
        return self._digest.hexdigest()

    def close(self) -> None:
        """Close it."""
        self._file.close()


def local_path(url: str) -> str:
    """The path that a file:// URL names, or ""."""
    parts = urllib.parse.urlsplit(url)
    return urllib.request.url2pathname(parts.path) if parts.scheme == "file" else ""


def spool(remote: Remote, folder: str) -> str:
    """The whole file on this host's disk: for an archive whose server gives out no ranges. The caller removes it."""
    os.makedirs(folder, mode=0o700, exist_ok=True)
    path = os.path.join(folder, "spool")
    stream = Stream(remote)
    with open(path, "wb") as target:
        while block := stream.read(CHUNK):
            target.write(block)
    return path


def _open(url: str, span: str, etag: str = "") -> Any:
    headers = {"User-Agent": "labctl", "Accept-Encoding": "identity"}
    if span:
        headers["Range"] = span
        if etag:
            headers["If-Range"] = etag
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)


def _patient(url: str, ask: Any) -> Any:
    """An answer, after some attempts if need be."""
    began, pause = time.monotonic(), 0.2
    while True:
        try:
            return ask()
        except BROKEN as error:
            if _final(error) or time.monotonic() - began > TIMEOUT:
                raise _unreachable(url, error) from None
            time.sleep(pause)
            pause = min(5.0, pause * 2)


def _final(error: Exception) -> bool:
    return isinstance(error, urllib.error.HTTPError) and error.code in FINAL_REFUSALS


def _unreachable(url: str, error: Exception) -> Failure:
    return Failure(
        f"{url} can't be fetched. Nothing was loaded.",
        found=str(error),
        next_step="check dataset.url in lab.yaml; if the server is only away for a while, run the same command again",
    )
