"""How a set lies in the container: an object for each file, or a few filesystem images of the same tree.

Both take files as they come and send while more come. What was sent by a run that was cut off isn't sent again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from labctl_etl.job import Job
from labctl_etl.model import INCOMING, TABLES, Counts, Refused, Row, Shard, pack_table, version_of
from labctl_etl.sources import Entry
from labctl_etl.store import Store, Stored
from labctl_job.errors import Failure

CHUNK = 1 << 20
#: A file up to that size is held in memory, a larger one is put on the disk for a moment.
IN_MEMORY = 32 << 20
#: Files are announced in the container before they are sent, so many and so many bytes at a time; so many batches are
#: under way.
FIRST_BATCH, LAST_BATCH, BATCH_BYTES, BATCHES = 32, 512, 16 << 20, 2
#: The largest object that every store takes in one piece.
OBJECT_LIMIT = 5_000_000_000
#: A shard is at least so large; of a large set the later ones grow, so that there are never very many.
SHARDS_OF_A_SIZE = 8
#: Finished images that wait on the disk for being sent, beside the one that is made.
SHARDS_WAITING = 2


class Layout(Protocol):
    """What a load needs of a layout."""

    rows: list[Row]
    shards: list[Shard]
    moves: list[tuple[str, str]]
    known: dict[str, Shard]
    sent: int
    sent_bytes: int

    def add(self, entry: Entry, path: str) -> None:
        """One more file."""

    def finish(self) -> None:
        """All files came: send the rest and wait until it is there."""

    def abort(self) -> None:
        """Remove what this load sent: the source was refused."""

    def stop(self) -> None:
        """Give up what is under way; what was sent stays for the next run."""


class Hashes:
    """SHA-256 and MD5 of the same bytes."""

    def __init__(self) -> None:
        self._sha256, self._md5, self.size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0

    def update(self, block: bytes) -> None:
        """More bytes."""
        self._sha256.update(block)
        self._md5.update(block)
        self.size += len(block)

    def row(self, path: str, kept: bool = False) -> Row:
        """The table's row for them."""
        return Row(path, self.size, self._sha256.hexdigest(), self._md5.hexdigest(), kept)


def read_all(entry: Entry, hashes: Hashes) -> bytes:
    """An entry's content. Refused if it isn't as long as was said."""
    parts = []
    while block := entry.read(CHUNK):
        hashes.update(block)
        parts.append(block)
    if hashes.size != entry.size:
        raise Refused(entry.name, f"it has {hashes.size} bytes instead of {entry.size}")
    return b"".join(parts)


class Files:
    """One object a file. `before`: what the container holds; of that only what the `committed` load or one that was cut
    off (`begun`) put there is ever replaced.

    Files are sent by the batch, while the next is filled: rclone takes a folder of memory (`outgoing`) at the store's
    own speed, where a call for each file costs as much as the file. A file that replaces one of the committed load
    goes beside it first (`moves`).
    """

    def __init__(
        self,
        store: Store,
        job: Job,
        *,
        load_id: str,
        journals: int,
        before: Mapping[str, Stored],
        committed: Mapping[str, Row],
        begun: Mapping[str, Row],
        workers: int,
        scratch: str,
        outgoing: str,
    ) -> None:
        self.rows: list[Row] = []
        self.sent = self.sent_bytes = 0
        self.moves: list[tuple[str, str]] = []
        self.shards: list[Shard] = []
        self.known: dict[str, Shard] = {}
        self._store, self._job, self._load_id = store, job, load_id
        self._scratch, self._outgoing = scratch, outgoing
        self._before, self._committed, self._begun = before, committed, begun
        self._batch = _Batch(outgoing)
        self._limit, self._journals = FIRST_BATCH, journals
        self._put: list[str] = []
        self._stopped, self._lock = threading.Event(), threading.Lock()
        self._transfers = max(1, workers // BATCHES)
        self._pool = ThreadPoolExecutor(BATCHES)
        self._room = threading.Semaphore(BATCHES)
        self._errors: list[BaseException] = []

    def add(self, entry: Entry, path: str) -> None:
        """Read it, and send it unless the container has it."""
        self._raise()
        hashes = Hashes()
        data: bytes | str = read_all(entry, hashes) if entry.size <= IN_MEMORY else self._spill(entry, hashes)
        row, target = self._placed(hashes.row(path))
        self.rows.append(row)
        if target is None:
            self._job.stages["load"].add(row.size)
            if isinstance(data, str):
                os.unlink(data)
            return
        self._batch.add(row, target, data, is_new=row.path not in self._before)
        if len(self._batch.targets) >= self._limit or self._batch.bytes >= BATCH_BYTES:
            self._flush()

    def _placed(self, row: Row) -> tuple[Row, str | None]:
        """The row, and where its content is to be sent, None for nowhere."""
        there = self._before.get(row.path)
        if there is None:
            return row, row.path
        ours = row.path in self._committed or row.path in self._begun
        kept = self._committed[row.path].kept if row.path in self._committed else not ours
        if there.md5 and there.is_it(row.size, row.md5):
            return Row(row.path, row.size, row.sha256, row.md5, kept), None
        if kept:
            raise Failure(
                f"{row.path} is in {self._store.container} with another content, and wasn't loaded by labctl."
                " Nothing was overwritten.",
                kind="safety_stop",
                expected=f"no such object, or one with MD5 {row.md5}",
                found=f"{there.size} bytes, MD5 {there.md5 or 'unknown'}",
                next_step="move it away, or load into another container (object_store.container in lab.yaml)",
            )
        if row.path in self._committed:
            incoming = f"{INCOMING}/{self._load_id}/{row.path}"
            self.moves.append((incoming, row.path))
            return row, incoming
        return row, row.path

    def _spill(self, entry: Entry, hashes: Hashes) -> str:
        if entry.size >= OBJECT_LIMIT:
            raise Refused(entry.name, f"its {entry.size} bytes are more than the store takes as one object")
        descriptor, path = tempfile.mkstemp(dir=self._scratch)
        with os.fdopen(descriptor, "wb") as file:
            while block := entry.read(CHUNK):
                hashes.update(block)
                file.write(block)
        if hashes.size != entry.size:
            raise Refused(entry.name, f"it has {hashes.size} bytes instead of {entry.size}")
        return path

    def _flush(self) -> None:
        """Send the batch in the background, as soon as there is room for it."""
        batch = self._batch
        if not batch.targets:
            return
        while not self._room.acquire(timeout=0.5):
            self._raise()
        self._batch = _Batch(self._outgoing)
        self._limit = min(self._limit * 4, LAST_BATCH)
        self._put += batch.targets
        self._pool.submit(self._send, batch, journal(self._load_id, self._journals))
        self._journals += 1

    def _send(self, batch: _Batch, announcement: str) -> None:
        """Say in the container what is about to be sent, then send it."""
        try:
            if self._stopped.is_set():
                return
            if batch.new:
                self._store.put(announcement, pack_table(batch.new), self._stopped)
            for path, target, size in batch.large:
                self._store.put_file(path, target, self._stopped)
                self._told(size, 1)
            self._store.send_folder(batch.folder, self._transfers, self._stopped, self._told)
        except BaseException as error:
            self._errors.append(error)
            self._stopped.set()
        finally:
            batch.discard()
            self._room.release()

    def _told(self, size: int, files: int) -> None:
        with self._lock:
            self.sent += files
            self.sent_bytes += size
        self._job.stages["load"].add(size, files)

    def finish(self) -> None:
        """Send what is left and wait for it."""
        self._flush()
        self._pool.shutdown()
        self._raise()

    def _raise(self) -> None:
        for error in self._errors:
            raise error

    def stop(self) -> None:
        """Let what is being sent end."""
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)
        self._batch.discard()

    def abort(self) -> None:
        """Remove what was not there before, of this run and of the one that it continued."""
        self.stop()
        begun = [row.path for row in self._begun.values() if row.path not in self._committed]
        self._store.remove({*self._put, *begun})


class _Batch:
    """Files that are announced and sent together: in a folder as they are to lie in the container, but large ones."""

    def __init__(self, parent: str) -> None:
        self.folder = tempfile.mkdtemp(prefix="batch-", dir=parent)
        self.targets: list[str] = []
        self.new: list[Row] = []
        self.large: list[tuple[str, str, int]] = []
        self.bytes = 0
        self._made = set[str]()

    def add(self, row: Row, target: str, data: bytes | str, *, is_new: bool) -> None:
        """One more: its content, or the file with it, which goes with the batch."""
        self.targets.append(target)
        if is_new:
            self.new.append(row)
        if isinstance(data, str):
            self.large.append((data, target, row.size))
            return
        below = os.path.dirname(target)
        if below not in self._made:
            os.makedirs(os.path.join(self.folder, below), exist_ok=True)
            self._made.add(below)
        with open(os.path.join(self.folder, target), "xb") as file:
            file.write(data)
        self.bytes += row.size

    def discard(self) -> None:
        """Nothing of it is left on this host."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for path, _, _ in self.large:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def journal(load_id: str, number: int) -> str:
    """Where a load says which objects it is about to send."""
    return f"{TABLES}/pending-{load_id}-{number:05d}.jsonl.gz"


def next_journal(load_id: str, control: Iterable[str]) -> int:
    """The first number that no journal of the load has: what a run before this one announced must not be forgotten."""
    names = [re.fullmatch(rf"{TABLES}/pending-{re.escape(load_id)}-(\d+)\.jsonl\.gz", path) for path in control]
    return max((int(name[1]) + 1 for name in names if name), default=0)


class Packed:
    """Filesystem images (squashfs), written as the files come; a finished one is sent while the next is made.

    `known`: the images that a run before this one has sent, by their object names. Image and order are decided by the
    source alone, so the same source makes the same images.
    """

    def __init__(
        self,
        store: Store,
        job: Job,
        *,
        prefix: str,
        known: Mapping[str, Shard],
        keep: Collection[str],
        shard_bytes: int,
        scratch: str,
        announce: Callable[[Iterable[Shard]], None],
    ) -> None:
        self.rows: list[Row] = []
        self.shards: list[Shard] = []
        self.moves: list[tuple[str, str]] = []
        self.sent = self.sent_bytes = 0
        self._store, self._job, self._prefix, self.known = store, job, prefix, dict(known)
        self._keep = keep
        self._limit, self._scratch, self._announce = shard_bytes, scratch, announce
        self._image: _Image | None = None
        self._number, self._first = 0, 0
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(SHARDS_WAITING)
        self._sending: list[Future[Shard]] = []
        self._room = threading.Semaphore(SHARDS_WAITING)
        self._lock = threading.Lock()

    def _size_limit(self) -> int:
        """How many bytes of files the image under way takes."""
        return int(min(self._limit << (self._number // SHARDS_OF_A_SIZE), OBJECT_LIMIT * 9 // 10))

    def add(self, entry: Entry, path: str) -> None:
        """Write it into the image under way; begin another one if it doesn't fit."""
        if entry.size >= OBJECT_LIMIT * 9 // 10:
            raise Refused(entry.name, f"its {entry.size} bytes don't fit an image of {OBJECT_LIMIT * 9 // 10}")
        if self._image is not None and self._image.bytes + entry.size > self._size_limit():
            self._close()
        if self._image is None:
            object_name = self._object()
            self._image = _Image(self._scratch, skip=object_name in self.known)
        hashes = Hashes()
        self._image.begin(path, entry.size)
        while block := entry.read(CHUNK):
            hashes.update(block)
            self._image.write(block)
        if hashes.size != entry.size:
            raise Refused(entry.name, f"it has {hashes.size} bytes instead of {entry.size}")
        self._image.pad()
        self.rows.append(hashes.row(path))

    def _object(self) -> str:
        return f"{self._prefix}{self._number:03d}.squashfs"

    def _close(self) -> None:
        """The image is complete: send it, in the background."""
        image, self._image = self._image, None
        if image is None:
            return
        rows, object_name = self.rows[self._first :], self._object()
        self._first, self._number = len(self.rows), self._number + 1
        content = version_of(rows)
        for future in self._sending:
            if future.done():
                future.result()  # what failed is told now rather than at the end
        if image.skip:
            shard = self.known[object_name]
            if shard.content != content:
                raise Failure(
                    "The source isn't the one that the load before this was cut off from.",
                    found=f"{object_name} holds other files",
                    next_step="labctl etl --restart",
                )
            self._job.stages["load"].add(sum(row.size for row in rows), len(rows))
            self.shards.append(shard)
            return
        path = image.close()
        self._room.acquire()
        self._sending.append(self._pool.submit(self._send, path, object_name, rows, content))

    def _send(self, path: str, object_name: str, rows: list[Row], content: str) -> Shard:
        try:
            hashes = Hashes()
            with open(path, "rb") as file:
                while block := file.read(CHUNK):
                    hashes.update(block)
            row = hashes.row(object_name)
            if row.size >= OBJECT_LIMIT:
                raise Failure(f"The image {object_name} has {row.size} bytes, more than the store takes.")
            self._store.put_file(path, object_name, self._stopped)
            shard = Shard(object_name, row.size, row.sha256, row.md5, len(rows), content)
            with self._lock:
                self.known[object_name] = shard
                self.sent += 1
                self.sent_bytes += row.size
                self._announce(self.known.values())
            self._job.stages["load"].add(sum(one.size for one in rows), len(rows))
            return shard
        finally:
            os.unlink(path)
            self._room.release()

    def finish(self) -> None:
        """Send the last image and wait for all."""
        self._close()
        self.shards += [future.result() for future in self._sending]
        self.shards.sort(key=lambda one: one.object)
        self._pool.shutdown()

    def stop(self) -> None:
        """End what is under way."""
        self._stopped.set()
        if self._image is not None:
            self._image.kill()
            self._image = None
        self._pool.shutdown(cancel_futures=True)

    def abort(self) -> None:
        """Remove what this load sent, but what readers see."""
        self.stop()
        there = self._store.listing(os.path.dirname(self._prefix))
        self._store.remove(path for path in there if path.startswith(self._prefix) and path not in self._keep)


class _Image:
    """A squashfs that is made out of a tar stream; `skip`: only its size counts, for the store has it."""

    def __init__(self, scratch: str, *, skip: bool) -> None:
        self.skip, self.bytes = skip, 0
        self._folders = set[str]()
        self._process: subprocess.Popen[bytes] | None = None
        if skip:
            return
        if not shutil.which("mksquashfs"):
            raise Failure("mksquashfs is missing on the server.", next_step="labctl etl installs it (squashfs-tools)")
        descriptor, self._path = tempfile.mkstemp(dir=scratch, suffix=".squashfs")
        os.close(descriptor)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the image)
        # images are compressed already; no times and one owner, so that the same files make the same image
        self._process = subprocess.Popen(
            ["mksquashfs", "-", self._path, "-tar", "-noappend", "-quiet", "-no-progress", "-no-xattrs", "-noD", "-noF",
             "-no-fragments", "-no-duplicates", "-all-root", "-mkfs-time", "0", "-all-time", "0", "-root-mode", "0755"],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._errors,
        )  # fmt: skip

    def begin(self, path: str, size: int) -> None:
        """A file's header, and those of the folders that it is the first in."""
        parts = path.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            folder = "/".join(parts[:depth])
            if folder not in self._folders:
                self._folders.add(folder)
                self._header(folder, 0, tarfile.DIRTYPE, 0o755)
        self._header(path, size, tarfile.REGTYPE, 0o644)
        self.bytes += size
        self._size = size

    def _header(self, path: str, size: int, kind: bytes, mode: int) -> None:
        info = tarfile.TarInfo(path)
        info.size, info.type, info.mode = size, kind, mode
        self.write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict"))

    def write(self, block: bytes) -> None:
        """Content."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(block)
        except BrokenPipeError:
            raise self._failed() from None

    def pad(self) -> None:
        """The end of a file."""
        if self._size % 512:
            self.write(bytes(512 - self._size % 512))

    def close(self) -> str:
        """The image's path, once it is written; the caller removes it."""
        assert self._process is not None
        self.write(bytes(1024))
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            raise self._failed() from None
        if self._process.wait():
            raise self._failed()
        self._errors.close()
        return self._path

    def kill(self) -> None:
        """Give it up."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        if os.path.exists(self._path):
            os.unlink(self._path)

    def _failed(self) -> Failure:
        self.kill()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip()
        full = "No space left" in said
        return Failure(
            "The server's disk is full." if full else "mksquashfs failed.",
            found=said[-300:],
            next_step="make room on the server (df -h), then labctl etl again" if full else "labctl etl again",
        )


@dataclass
class Loaded:
    """What a source (or a list of them) came to: it is in the store, and nobody sees it yet."""

    rows: list[Row]
    shards: list[Shard]
    moves: list[tuple[str, str]]
    counts: Counts
    classes: tuple[str, ...]
    source: dict[str, Any]
    sent: int
    sent_bytes: int


def identity_of(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The strongest that is known of a source: its hash, its directory, or its server's word."""
    key = next((key for key in ("sha256", "index", "etag", "modified") if fingerprint.get(key)), "")
    return {"bytes": fingerprint.get("bytes"), key: fingerprint[key]} if key else {}


def known_shards(shards: Iterable[Mapping[str, Any]], prefix: str, stored: Mapping[str, Stored]) -> dict[str, Shard]:
    """Images of this very load that the container has as they were sent."""
    found = [Shard(**row) for row in shards if row["object"].startswith(prefix)]
    return {one.object: one for one in found if one.object in stored and stored[one.object].is_it(one.bytes, one.md5)}


def has(stored: Mapping[str, Stored], row: Row) -> bool:
    """Whether the container provably has a file with that content."""
    there = stored.get(row.path)
    return there is not None and bool(there.md5) and there.is_it(row.size, row.md5)


def unmatched(rows: Collection[Row], stored: Mapping[str, Stored]) -> list[str]:
    """Paths of files that the container hasn't, or not with that content."""
    return [row.path for row in rows if row.path not in stored or not stored[row.path].is_it(row.size, row.md5)]
