"""A zip: its directory is at its end and is checked before the content, which comes in one pass."""

from __future__ import annotations

import bz2
import hashlib
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

from labctl_etl import rules
from labctl_etl.fetch import CHUNK
from labctl_etl.model import Dataset, Refused
from labctl_etl.sources import Entry, Source

LOCAL_HEADER = struct.Struct("<4s5H3L2H")


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
