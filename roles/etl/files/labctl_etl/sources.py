"""Where a dataset comes from: a zip, a tar (plain, gz, zstd), a folder of this host, a prefix of the same store.

A source yields its entries in the order in which it has them, each read once. What a source knows before its first
byte is read (a zip's directory, a listing), it checks before; what it meets on the way raises Refused there.
"""

from __future__ import annotations

import bz2
import contextlib
import hashlib
import os
import queue
import shutil
import stat
import struct
import subprocess
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from labctl_etl import fetch, rules
from labctl_etl.model import Dataset, Refused
from labctl_job.errors import Failure

SPOOL = "/var/lib/labctl/etl"
CHUNK = 1 << 20
#: Of a tar; it ends with two blocks of zeros.
BLOCK = 512
LOCAL_HEADER = struct.Struct("<4s5H3L2H")
ZSTD_MAGIC, GZIP_MAGIC, ZIP_MAGIC = b"\x28\xb5\x2f\xfd", b"\x1f\x8b", b"PK"
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


class Zip(Source):
    """A zip whose directory was read and checked first; its content comes in one pass."""

    def __init__(self, described: Dataset, directory: Any, stream: Any, size: int, extra: dict[str, Any]) -> None:
        super().__init__(described)
        self._stream, self.total, self._extra, self._directory = stream, size, extra, directory
        try:
            with zipfile.ZipFile(directory) as archive:
                self._infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
                self._labels = archive.read(described.labels_entry) if described.labels_entry else None
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, ValueError) as error:
            raise self.refuse(str(error)) from None
        except KeyError:
            raise self.refuse(f"it has no {described.labels_entry}") from None
        self._check()
        self.names = [info.filename for info in self._infos if not info.is_dir()]

    def _check(self) -> None:
        """Refuse what leads elsewhere, before anything is read or sent."""
        seen, total, end = set[str](), 0, 0
        for info in self._infos:
            name = info.orig_filename
            if why := bad_entry(info):
                raise self.refuse(why)
            if info.header_offset < end:
                raise self.refuse(f"the entry {name!r} overlaps the one before it")
            end = info.header_offset + LOCAL_HEADER.size + info.compress_size
            if info.is_dir():
                continue
            if name in seen:
                raise self.refuse(f"the entry {name!r} is there twice")
            seen.add(name)
            total += info.file_size
        if not seen:
            raise self.refuse("the archive holds no file")
        if rules.is_bomb(self.total, total):
            raise self.refuse(f"its {self.total} bytes unpack to {total}")

    def fingerprint(self) -> dict[str, Any]:
        """By the directory, which has every entry's name, size and CRC."""
        digest = hashlib.sha256()
        for info in self._infos:
            digest.update(f"{info.orig_filename}\0{info.file_size}\0{info.CRC}\n".encode(errors="surrogatepass"))
        return {**self._extra, "bytes": self.total, "index": digest.hexdigest()}

    def peek(self, name: str) -> bytes | None:
        """The list of labels; it was read along with the directory."""
        return self._labels if name == self.described.labels_entry else None

    def entries(self) -> Iterator[Entry]:
        """In the order of the file."""
        for info in self._infos:
            self._skip(info.header_offset - self._stream.position)
            header = LOCAL_HEADER.unpack(self._exactly(LOCAL_HEADER.size))
            if header[0] != b"PK\3\4":
                raise self.refuse(f"where the entry {info.filename!r} should begin is something else")
            name = self._exactly(header[9])
            self._exactly(header[10])
            if name.decode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace") != info.orig_filename:
                raise self.refuse(f"the entry {info.filename!r} has another name in the archive's directory")
            if not info.is_dir():
                reader = _ZipEntry(self, info)
                yield Entry(info.filename, info.file_size, reader.read)
                reader.finish()

    def sha256(self) -> str:
        """Of the archive."""
        return str(self._stream.sha256())

    def position(self) -> int:
        """Bytes of the archive."""
        return int(self._stream.position)

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()
        if hasattr(self._directory, "close"):
            self._directory.close()

    def _skip(self, count: int) -> None:
        if count < 0:
            raise self.refuse("its entries overlap")
        while count:
            count -= len(self.take(min(count, CHUNK)))

    def _exactly(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            found += self.take(count - len(found))
        return found

    def take(self, count: int) -> bytes:
        """At least one byte, at most `count`."""
        block: bytes = self._stream.read(count)
        if not block:
            raise self.refuse(f"it ends after {self._stream.position} bytes, in the middle of an entry")
        return block


def bad_entry(info: zipfile.ZipInfo) -> str:
    """Why an entry of a zip is refused whatever else is in it, or ""."""
    # the name as it is in the file: zipfile's own has been cut at a NUL
    name = info.orig_filename
    if why := rules.bad_name(name):
        return why
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return f"the entry {name!r} is a symbolic link or a special file"
    if info.flag_bits & 0x41:
        return f"the entry {name!r} is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        return f"the entry {name!r} is compressed by method {info.compress_type}"
    if rules.is_bomb(info.compress_size, info.file_size):
        return f"the entry {name!r} unpacks to {info.file_size} bytes"
    return ""


class _ZipEntry:
    """One entry of a zip while it is read: unpacked, and never more than the directory says."""

    def __init__(self, source: Zip, info: zipfile.ZipInfo) -> None:
        self._source, self._info = source, info
        self._left, self._size, self._crc = info.compress_size, 0, 0
        self._decoder: Any = None
        if info.compress_type == zipfile.ZIP_DEFLATED:
            self._decoder = zlib.decompressobj(-15)
        elif info.compress_type == zipfile.ZIP_BZIP2:
            self._decoder = bz2.BZ2Decompressor()
        self._waiting = b""

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; b"" at the end, where the checksum has been compared."""
        block = self._stored(size) if self._decoder is None else self._unpacked(size)
        self._size += len(block)
        self._crc = zlib.crc32(block, self._crc)
        if self._size > self._info.file_size:
            raise self._bad("unpacks to more than the archive's directory says")
        if not block:
            self._compare()
        return block

    def finish(self) -> None:
        """Read what was not, so that the next entry comes, and compare the checksum."""
        while self.read(CHUNK):
            pass

    def _stored(self, size: int) -> bytes:
        if not self._left:
            return b""
        block = self._source.take(min(size, self._left))
        self._left -= len(block)
        return block

    def _unpacked(self, size: int) -> bytes:
        try:
            while not self._decoder.eof:
                block: bytes = self._decoder.decompress(self._waiting, size)
                self._waiting = getattr(self._decoder, "unconsumed_tail", b"")
                if block:
                    return block
                if not self._waiting:
                    if not self._left:
                        break
                    self._waiting = self._source.take(min(CHUNK, self._left))
                    self._left -= len(self._waiting)
        except (zlib.error, OSError, EOFError) as error:
            raise self._bad(f"can't be unpacked ({error})") from None
        while self._left:
            self._left -= len(self._source.take(min(CHUNK, self._left)))
        return b""

    def _compare(self) -> None:
        if self._size != self._info.file_size or self._crc != self._info.CRC:
            raise self._bad("is damaged: its size or checksum isn't what the archive says")

    def _bad(self, why: str) -> Refused:
        return self._source.refuse(f"the entry {self._info.filename!r} {why}")


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
                yield Entry(name, size, _Pushed(data, _Empty()).read)

    def position(self) -> int:
        """Bytes of the objects."""
        return self._position

    def sha256(self) -> str:
        """Of the objects' bytes, one after the other."""
        return self._digest.hexdigest()


class _Empty:
    def read(self, size: int) -> bytes:
        """Nothing."""
        del size
        return b""


def json_lines(rows: list[tuple[str, int, str]]) -> bytes:
    """Rows as text."""
    return "".join(f"{name}\0{size}\0{md5}\n" for name, size, md5 in rows).encode()


class Known(Exception):
    """The source is one that the caller has already; it need not be read."""


def archive(described: Dataset, is_known: Callable[[dict[str, Any]], bool]) -> Source:
    """The archive that `url` names, by its first bytes. The caller closes it.

    Raises Known instead of reading all of an archive of which its server's word is enough.
    """
    if path := fetch.local_path(described.url):
        return _local(described, path, {})
    remote = fetch.Remote(described.url)
    extra = remote.validators()
    if described.sha256:
        extra["sha256"] = described.sha256
    if not remote.ranges:
        if extra and is_known({**extra, "bytes": remote.size}):
            raise Known
        return _without_ranges(described, remote, extra)
    with remote.open(0, 4) as answer:
        head = answer.read(4)
    stream = fetch.Stream(remote)
    if head.startswith(ZIP_MAGIC):
        return Zip(described, fetch.Seekable(remote), stream, remote.size, extra)
    return Tar(described, stream, remote.size, extra)


def _without_ranges(described: Dataset, remote: fetch.Remote, extra: dict[str, Any]) -> Source:
    """A zip's directory is at its end: it has to be on the disk first. A tar isn't asked for twice either way."""
    stream = fetch.Stream(remote)
    head = stream.read(4)
    stream.close()
    if not head.startswith(ZIP_MAGIC):
        return Tar(described, fetch.Stream(remote), remote.size, extra)
    path = fetch.spool(remote, SPOOL)
    try:
        return _local(described, path, extra)
    finally:
        os.unlink(path)  # the open file stays readable, and goes with the process


def _local(described: Dataset, path: str, extra: dict[str, Any]) -> Source:
    stream = fetch.File(path)
    found = os.stat(path)
    extra = extra or {"modified": str(found.st_mtime_ns)}
    with open(path, "rb") as file:
        if file.read(2) == ZIP_MAGIC:
            return Zip(described, open(path, "rb"), stream, found.st_size, extra)
    return Tar(described, stream, found.st_size, extra)
