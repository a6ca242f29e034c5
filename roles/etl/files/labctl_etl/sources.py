"""Where a dataset comes from: an archive, a folder of this host, a prefix of the same store; here are the latter two.

A source yields its entries in the order in which it has them, each read once. What a source knows before its first
byte is read (a zip's directory, a listing), it checks before; what it meets on the way raises Refused there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from labctl_etl import rules
from labctl_etl.model import Dataset, Refused
from labctl_job.errors import Failure

#: Objects of a prefix that are read at the same time.
READ_AHEAD = 16


@dataclass
class Entry:
    """A file of the source: its name there, its bytes when unpacked, and a way to read it (once, now)."""

    name: str
    size: int
    read: Callable[[int], bytes]


class Source:
    """What all sources share. `total`: bytes to be read, -1 where nobody knows; `names`: known beforehand, or None."""

    total = -1
    images_total = -1
    names: list[str] | None = None

    def __init__(self, described: Dataset) -> None:
        self.described = described

    def fingerprint(self) -> dict[str, Any]:
        """What stays the same as long as the source does; empty if only reading it would tell."""
        return {}

    def peek(self, name: str) -> bytes | None:
        """A small entry ahead of its turn (a list of labels), where the source can do that."""
        del name
        return None

    def entries(self) -> Iterator[Entry]:
        """Every file."""
        raise NotImplementedError

    def position(self) -> int:
        """How many bytes of the source were read."""
        return 0

    def sha256(self) -> str:
        """Of the whole source, once its entries were read."""
        return ""

    def close(self) -> None:
        """Give up what is held."""

    def refuse(self, why: str) -> Refused:
        """The error of a bad source."""
        return Refused(self.described.where, why)


class Folder(Source):
    """A folder of this host. Links in it are refused: they may lead anywhere."""

    def __init__(self, described: Dataset) -> None:
        super().__init__(described)
        self._files: list[tuple[str, os.stat_result]] = []
        if not os.path.isdir(described.folder):
            raise Failure(f"There is no folder {described.folder} on the server.", kind="usage",
                          next_step="copy it there, or correct dataset.folder in lab.yaml")  # fmt: skip
        self._walk(described.folder, "")
        self._files.sort()
        if not self._files:
            raise self.refuse("the folder holds no file")
        self.names = [name for name, _ in self._files]
        self.total = sum(found.st_size for _, found in self._files)
        self._position, self._digest = 0, hashlib.sha256()

    def _walk(self, folder: str, prefix: str) -> None:
        with os.scandir(folder) as found:
            for item in found:
                name = prefix + item.name
                if why := rules.bad_name(name):
                    raise self.refuse(why)
                if item.is_dir(follow_symlinks=False):
                    self._walk(item.path, f"{name}/")
                elif item.is_file(follow_symlinks=False):
                    self._files.append((name, item.stat(follow_symlinks=False)))
                else:
                    raise self.refuse(f"the entry {name!r} is a symbolic link or a special file")

    def fingerprint(self) -> dict[str, Any]:
        """By every file's name, size and time of change."""
        digest = hashlib.sha256()
        for name, found in self._files:
            digest.update(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
        return {"bytes": self.total, "index": digest.hexdigest()}

    def peek(self, name: str) -> bytes | None:
        """The list of labels."""
        with contextlib.suppress(OSError), open(os.path.join(self.described.folder, name), "rb") as file:
            return file.read()
        return None

    def entries(self) -> Iterator[Entry]:
        """By name."""
        for name, found in self._files:
            with open(os.path.join(self.described.folder, name), "rb") as file:

                def read(size: int, file: Any = file) -> bytes:
                    block = bytes(file.read(size))
                    self._position += len(block)
                    self._digest.update(block)
                    return block

                yield Entry(name, found.st_size, read)
                if file.read(1) or file.tell() != found.st_size:
                    raise self.refuse(f"{name} changed while it was read")

    def position(self) -> int:
        """Bytes of the files."""
        return self._position

    def sha256(self) -> str:
        """Of the files' bytes, one after the other."""
        return self._digest.hexdigest()


class Prefix(Source):
    """Objects of the same store below CONTAINER/PATH; some are read ahead at the same time."""

    def __init__(self, described: Dataset, listing: list[dict[str, Any]], read: Callable[[str], bytes]) -> None:
        super().__init__(described)
        self._read, self._position, self._digest = read, 0, hashlib.sha256()
        self._objects = sorted((row["Path"], row["Size"], row.get("Hashes", {}).get("md5", "")) for row in listing)
        for name, _, _ in self._objects:
            if why := rules.bad_name(name):
                raise self.refuse(why)
        if not self._objects:
            raise self.refuse("there is no object")
        self.names = [name for name, _, _ in self._objects]
        self.total = sum(size for _, size, _ in self._objects)

    def fingerprint(self) -> dict[str, Any]:
        """By every object's name, size and MD5."""
        text = json_lines(self._objects)
        return {"bytes": self.total, "index": hashlib.sha256(text).hexdigest()}

    def peek(self, name: str) -> bytes | None:
        """The list of labels."""
        return self._read(name) if name in (self.names or []) else None

    def entries(self) -> Iterator[Entry]:
        """By name."""
        from concurrent.futures import Future, ThreadPoolExecutor

        with ThreadPoolExecutor(READ_AHEAD) as pool:
            ahead: queue.SimpleQueue[tuple[str, int, Future[bytes]]] = queue.SimpleQueue()
            waiting = iter(self._objects)
            begun = 0
            while True:
                for name, size, _ in waiting:
                    ahead.put((name, size, pool.submit(self._read, name)))
                    begun += 1
                    if begun >= READ_AHEAD:
                        break
                if not begun:
                    return
                name, size, future = ahead.get()
                begun -= 1
                data = future.result()
                if len(data) != size:
                    raise self.refuse(f"{name} has {len(data)} bytes, the listing says {size}")
                self._position += size
                self._digest.update(data)
                yield Entry(name, size, io.BytesIO(data).read)

    def position(self) -> int:
        """Bytes of the objects."""
        return self._position

    def sha256(self) -> str:
        """Of the objects' bytes, one after the other."""
        return self._digest.hexdigest()


def json_lines(rows: list[tuple[str, int, str]]) -> bytes:
    """Rows as text."""
    return "".join(f"{name}\0{size}\0{md5}\n" for name, size, md5 in rows).encode()
