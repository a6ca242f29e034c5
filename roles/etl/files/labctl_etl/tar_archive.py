"""A tar, plain or packed (gz, zstd): what is in it is known, and checked, only as it comes."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from labctl_etl import rules
from labctl_etl.fetch import CHUNK
from labctl_etl.model import Dataset, Refused
from labctl_etl.sources import Entry, Source
from labctl_job.errors import Failure

#: A tar ends with two blocks of zeros.
BLOCK = 512
ZSTD_MAGIC, GZIP_MAGIC = b"\x28\xb5\x2f\xfd", b"\x1f\x8b"


class Tar(Source):
    """A tar, plain or packed, which tells what is in it only while it is read."""

    def __init__(self, described: Dataset, stream: Any, size: int, extra: dict[str, Any]) -> None:
        super().__init__(described)
        self._stream, self.total, self._extra = stream, size, extra
        self._unpacked = 0
        self._helper: subprocess.Popen[bytes] | None = None

    def fingerprint(self) -> dict[str, Any]:
        """By what the server says of the file, or by its SHA-256 if the description names it."""
        return {**self._extra, "bytes": self.total} if self._extra else {}

    def entries(self) -> Iterator[Entry]:
        """In the order of the file."""
        found = 0
        seen = set[str]()
        try:
            counted = _Counted(self._open(), self._count)
            with tarfile.open(fileobj=counted, mode="r|") as archive:  # type: ignore[call-overload]
                while (member := archive.next()) is not None:
                    archive.members = []  # or it keeps all of them
                    if why := rules.bad_name(member.name) or ("" if not member.isdev() else "a device"):
                        raise self.refuse(why)
                    if member.isdir():
                        continue
                    if not member.isreg() or member.issparse():
                        raise self.refuse(f"the entry {member.name!r} is a link or a special file")
                    if member.name in seen:
                        raise self.refuse(f"the entry {member.name!r} is there twice")
                    seen.add(member.name)
                    found += 1
                    content = archive.extractfile(member)
                    assert content is not None
                    yield Entry(member.name, member.size, content.read)
        except (tarfile.TarError, zlib.error, EOFError) as error:
            raise self.refuse(f"it is no whole tar, or damaged ({error})") from None
        self._drain()
        if counted.end.strip(b"\0"):  # tarfile takes an end without the mark that a tar ends with for one
            raise self.refuse("it is cut off: the end mark of a tar is missing")
        if not found:
            raise self.refuse("the archive holds no file")

    def sha256(self) -> str:
        """Of the archive as it was sent."""
        return str(self._stream.sha256())

    def position(self) -> int:
        """Bytes of the archive."""
        return int(self._stream.position)

    def close(self) -> None:
        """Close the connection, and end the unpacking."""
        if self._helper is not None and self._helper.poll() is None:
            self._helper.kill()
        self._stream.close()

    def _count(self, count: int) -> None:
        self._unpacked += count
        if rules.is_bomb(self._stream.position, self._unpacked):
            raise self.refuse(f"{self._stream.position} bytes of it unpack to more than {self._unpacked}")

    def _open(self) -> Callable[[int], bytes]:
        """A way to read the tar itself, by its first bytes rather than by its name."""
        head = self._stream.read(CHUNK)
        pushed = _Pushed(head, self._stream)
        if head.startswith(GZIP_MAGIC):
            return _Gzip(pushed, self.refuse).read
        if head.startswith(ZSTD_MAGIC):
            return self._zstd(pushed)
        return pushed.read

    def _zstd(self, packed: _Pushed) -> Callable[[int], bytes]:
        if not shutil.which("zstd"):
            raise Failure("zstd is missing on the server.", next_step="labctl etl installs it; apt install zstd")
        helper = subprocess.Popen(
            ["zstd", "-dcq"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._helper = helper
        self._feeding: list[BaseException] = []

        def feed() -> None:
            assert helper.stdin is not None
            try:
                with helper.stdin:
                    while block := packed.read(CHUNK):
                        helper.stdin.write(block)
            except BrokenPipeError:
                pass
            except BaseException as error:
                self._feeding.append(error)
                helper.kill()

        self._feeder = threading.Thread(target=feed, daemon=True)
        self._feeder.start()
        assert helper.stdout is not None
        return helper.stdout.read

    def _drain(self) -> None:
        """The end of the packed stream: what the unpacking thinks of it."""
        if self._helper is None:
            return
        assert self._helper.stdout is not None
        assert self._helper.stderr is not None
        while self._helper.stdout.read(CHUNK):
            pass
        self._feeder.join()
        for error in self._feeding:
            raise error
        if self._helper.wait():
            raise self.refuse(f"zstd: {self._helper.stderr.read().decode(errors='replace').strip()[-200:]}")


class _Pushed:
    """A stream whose first bytes were read already."""

    def __init__(self, head: bytes, stream: Any) -> None:
        self._head, self._stream = head, stream

    def read(self, size: int) -> bytes:
        """Up to `size` bytes."""
        if self._head:
            block, self._head = self._head[:size], self._head[size:]
            return block
        return bytes(self._stream.read(size))


class _Gzip:
    """A gzip stream, member by member, never more at a time than was asked for."""

    def __init__(self, packed: _Pushed, refuse: Callable[[str], Refused]) -> None:
        self._packed, self._refuse, self._waiting = packed, refuse, b""
        self._decoder = zlib.decompressobj(31)

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; an end before the stream's own is a damaged archive."""
        while True:
            if self._decoder.eof:
                self._waiting = self._decoder.unused_data or self._packed.read(CHUNK)
                if not self._waiting.startswith(GZIP_MAGIC):
                    return b""  # what follows a gzip stream is padding
                self._decoder = zlib.decompressobj(31)
            block = self._decoder.decompress(self._waiting, size)
            self._waiting = self._decoder.unconsumed_tail
            if block:
                return block
            if not self._waiting and not self._decoder.eof:
                self._waiting = self._packed.read(CHUNK)
                if not self._waiting:
                    raise self._refuse("it is cut off in the middle of its gzip stream")


class _Counted:
    """What tarfile reads from: as many bytes as it asks for, counted."""

    def __init__(self, read: Callable[[int], bytes], count: Callable[[int], None]) -> None:
        self._read, self._count = read, count
        self.end = b""

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes, fewer only at the end."""
        parts, left = [], size
        while left and (block := self._read(left)):
            parts.append(block)
            left -= len(block)
        self._count(size - left)
        data = b"".join(parts)
        self.end = data[-BLOCK:] if len(data) >= BLOCK else (self.end + data)[-BLOCK:]
        return data
