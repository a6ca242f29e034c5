"""Sending what the container lacks: objects of the S3 server in batches, and the workspace's files."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from labctl_backup import host
from labctl_backup.host import Settings
from labctl_backup.job import Job
from labctl_backup.model import Contents, S3Object, Stored, WorkspaceEntry, object_path
from labctl_backup.rclone import NOT_FOUND, S3, Rclone, names_file
from labctl_backup.source import VERSION, digest, s3_objects, workspace_entries
from labctl_backup.store import Store, chosen
from labctl_job.errors import Failure

#: What is staged on the server's own disk at a time: big enough that starting rclone costs nothing, small enough for
#: the smallest flavor's disk; never more than a quarter of what is free there.
BATCH_BYTES, BATCH_FILES, FREE_SHARE = 256 * 1024 * 1024, 2000, 4


@dataclass
class Taking:
    """One backup while it is made. `stored` is what the container has, `known` what complete sets say of it."""

    here: Settings
    job: Job
    rclone: Rclone
    store: Store
    staging: str
    set_id: str
    started: float
    buckets: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    stored: dict[str, Stored] = field(default_factory=dict)
    known: dict[str, Stored] = field(default_factory=dict)
    contents: Contents = field(default_factory=Contents)
    sent: int = 0
    sent_bytes: int = 0
    read: int = 0

    def has(self, sha256: str) -> bool:
        """Whether the container has an object as the last complete set knew it."""
        known = self.known.get(sha256)
        return known is not None and sha256 in self.stored and self.stored[sha256].fits(known)


# -- objects -------------------------------------------------------------------------------------------------------


def send_objects(taking: Taking, previous: Contents) -> None:
    """Every object of the S3 server into the container."""
    taking.job.step("listing the S3 server's objects")
    taking.buckets, found = s3_objects(taking.rclone)
    before = {(one.bucket, one.key): one for one in previous.s3}
    changed = []
    for one in found:
        old = before.get((one.bucket, one.key))
        if old is not None and one.same_version(old) and taking.has(old.sha256):
            _name(taking, replace(one, sha256=old.sha256), taking.known[old.sha256])
        else:
            changed.append(one)
    taking.job.step("sending objects")
    total = len(changed)
    for batch in _batches(taking, changed):
        taking.job.tell(f"{taking.read} of {total} changed objects")
        _send_batch(taking, batch)
        taking.store.renew_lease()


def _name(taking: Taking, one: S3Object, stored: Stored) -> None:
    taking.contents.s3.append(one)
    taking.contents.objects[one.sha256] = stored


def batch_limit(free: int) -> int:
    """Bytes that may be staged at a time where that many are free."""
    return min(BATCH_BYTES, free // FREE_SHARE)


def _batches(taking: Taking, objects: list[S3Object]) -> Iterator[list[S3Object]]:
    """Objects in batches that fit the staging folder; what doesn't fit, or has a name for no list, is alone."""
    limit = batch_limit(host.free_bytes(taking.staging))
    batch: list[S3Object] = []
    size = 0
    for one in objects:
        if one.size > limit or "\n" in one.key or "\r" in one.key:
            yield [one]
            continue
        if batch and (size + one.size > limit or len(batch) >= BATCH_FILES):
            yield batch
            batch, size = [], 0
        batch.append(one)
        size += one.size
    if batch:
        yield batch


def _send_batch(taking: Taking, batch: list[S3Object]) -> None:
    limit = batch_limit(host.free_bytes(taking.staging))
    if len(batch) == 1 and (batch[0].size > limit or "\n" in batch[0].key or "\r" in batch[0].key):
        _stream(taking, batch[0])
        return
    with tempfile.TemporaryDirectory(dir=taking.staging) as folder:
        arrived = os.path.join(folder, "in")
        with names_file(f"{one.bucket}/{one.key}" for one in batch) as names:
            # what isn't there any more, or has a name that no folder can hold, is looked at below
            taking.rclone.run("copy", f"{S3}:", arrived, *chosen(names, len(batch)), accept=(0, 1, *NOT_FOUND))
        missed = []
        out = Outbox(taking, os.path.join(folder, "out"))
        for one in batch:
            path = os.path.join(arrived, one.bucket, one.key)
            if os.path.isfile(path):
                sha256, stored = out.add(path)
                _name(taking, replace(one, sha256=sha256, size=stored.size), stored)
                taking.read += 1
            else:
                missed.append(one)
        out.send()
    for one in missed:  # its name isn't one that a folder can have, or it was deleted meanwhile
        _stream(taking, one)


class Outbox:
    """Files on their way into the container, under their hashes; those that are there already don't go."""

    def __init__(self, taking: Taking, folder: str) -> None:
        self._taking, self._folder = taking, folder
        self._count = {"new": 0, "perhaps": 0}

    def add(self, path: str) -> tuple[str, Stored]:
        """Take a file (it is moved). Returns its SHA-256, and what the container will say of it."""
        sha256, stored = digest(path, os.O_NOFOLLOW)
        taking = self._taking
        named = sha256 in taking.contents.objects
        taking.contents.objects[sha256] = stored
        if named or taking.has(sha256):
            return sha256, stored
        # an object that no set names is one that a killed run sent, or a listing that is behind: it is asked for
        there = taking.stored.get(sha256)
        kind = "perhaps" if there is not None and there.fits(stored) else "new"
        target = os.path.join(self._folder, kind, object_path(sha256))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.replace(path, target)
        self._count[kind] += 1
        taking.sent += 1
        taking.sent_bytes += stored.size
        return sha256, stored

    def send(self) -> None:
        """Upload what was added."""
        for kind, count in self._count.items():
            if count:
                self._taking.store.put_objects(os.path.join(self._folder, kind), perhaps_there=kind == "perhaps")


def _stream(taking: Taking, one: S3Object) -> None:
    """An object that isn't staged: read once for its hash, and once more into the container.

    What was written between the two shows in the hash of the second reading's listing: then it is tried again.
    """
    path = f"{S3}:{one.bucket}/{one.key}"
    for _ in range(3):
        before = taking.rclone.listing(path, *VERSION)
        if not before:
            taking.job.note(f"{one.bucket}/{one.key} was deleted while the backup was made.")
            return
        sha256, stored = hash_stream(taking.rclone, path)
        if not taking.has(sha256) and sha256 not in taking.contents.objects:
            target = taking.store.path(object_path(sha256))
            taking.rclone.run("copyto", path, target, "--checksum")
            taking.sent += 1
            taking.sent_bytes += stored.size
        after = taking.rclone.listing(path, *VERSION)
        if [row["ModTime"] for row in before] == [row["ModTime"] for row in after]:
            _name(taking, replace(one, sha256=sha256, size=stored.size, modified=before[0]["ModTime"]), stored)
            taking.read += 1
            return
    raise Failure(
        f"{one.bucket}/{one.key} changes faster than it can be read.", next_step="run the backup when it is at rest"
    )


def hash_stream(rclone: Rclone, path: str) -> tuple[str, Stored]:
    """(SHA-256, size and MD5) of something that rclone reads."""
    sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
    with subprocess.Popen(["rclone", "--config", rclone.config, "cat", path], stdout=subprocess.PIPE) as process:
        assert process.stdout
        while block := process.stdout.read(1 << 20):
            sha256.update(block)
            md5.update(block)
            size += len(block)
    if process.returncode:
        raise Failure(f"{path.partition(':')[2]} can't be read.", found=f"rclone cat: {process.returncode}")
    return sha256.hexdigest(), Stored(size, md5.hexdigest())


# -- files ---------------------------------------------------------------------------------------------------------


def send_files(taking: Taking, previous: Contents) -> None:
    """The workspace into the container."""
    taking.job.step("sending the workspace")
    root = taking.here.at(host.WORKSPACE)
    entries, taking.left_out = workspace_entries(root)
    before = {entry.path: entry for entry in previous.workspace}
    changed = []
    for entry in entries:
        old = before.get(entry.path)
        if entry.kind != "file":
            taking.contents.workspace.append(entry)
        elif old is not None and entry.same_version(old) and taking.has(old.sha256):
            taking.contents.workspace.append(replace(entry, sha256=old.sha256))
            taking.contents.objects[old.sha256] = taking.known[old.sha256]
        else:
            changed.append(entry)
    limit = batch_limit(host.free_bytes(taking.staging))
    batch: list[WorkspaceEntry] = []
    for entry in changed:
        if batch and (sum(one.size for one in batch) + entry.size > limit or len(batch) >= BATCH_FILES):
            _send_files(taking, root, batch)
            batch = []
        batch.append(entry)
    _send_files(taking, root, batch)
    taking.contents.workspace.sort(key=lambda entry: entry.path)


def _send_files(taking: Taking, root: str, batch: list[WorkspaceEntry]) -> None:
    """Copied into the staging folder first: what is hashed there can't change on its way."""
    taking.job.tell(f"{len(batch)} changed files")
    with tempfile.TemporaryDirectory(dir=taking.staging) as folder:
        out = Outbox(taking, os.path.join(folder, "out"))
        for entry in batch:
            copy = os.path.join(folder, "copy")
            try:
                _copy(os.path.join(root, entry.path), copy)
            except OSError as error:
                if isinstance(error, FileNotFoundError):
                    continue  # deleted meanwhile
                raise Failure(
                    f"{entry.path} of the workspace can't be read.",
                    found=str(error),
                    next_step="look at it with labctl ssh",
                ) from None
            sha256, stored = out.add(copy)
            taking.contents.workspace.append(replace(entry, sha256=sha256, size=stored.size))
        out.send()
    taking.store.renew_lease()


def _copy(source: str, target: str) -> None:
    with os.fdopen(os.open(source, os.O_RDONLY | os.O_NOFOLLOW), "rb") as read, open(target, "wb") as write:
        shutil.copyfileobj(read, write, 1 << 20)
