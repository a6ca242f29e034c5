"""Making a backup: the dump first, so that every artifact that a dumped run names is there when objects are read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from labctl_backup import host, prune
from labctl_backup.decide import BackupSet
from labctl_backup.errors import Failure
from labctl_backup.host import Settings
from labctl_backup.job import Job
from labctl_backup.model import (
    CONTENTS,
    DUMP,
    FORMAT,
    MANIFEST,
    SECRETS,
    SETS,
    VOLUME,
    Contents,
    Damaged,
    S3Object,
    Stored,
    WorkspaceEntry,
    iso,
    key_id,
    new_set_id,
    object_path,
    sealed,
)
from labctl_backup.rclone import NOT_FOUND, S3, Rclone, names_file
from labctl_backup.source import VERSION, Dump, digest, dump, s3_objects, workspace_entries
from labctl_backup.store import PARALLEL, Store

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


def take(here: Settings, job: Job, *, keep: int = 0, force: bool = False) -> dict[str, Any]:
    """Back the lab up. Returns what the new set is."""
    started = time.time()
    job.step("looking at volume, services and container")
    marker = host.marker(here)
    secrets = host.secrets_of(here)
    _refuse_without_services()
    with _locked_staging(here) as staging, host.remotes(here, s3=secrets, key=host.own_key(here, make=True)) as made:
        rclone, store, private = made
        store.ensure()
        store.take_lease(str(marker["volume_id"]), host.hostname(), force=force)
        sets = store.sets()
        taking = Taking(here, job, rclone, store, staging, new_set_id(started), started)
        previous = _previous(taking, sets)
        job.step("dumping the database")
        files = os.path.join(staging, "set")
        os.mkdir(files)
        dumped = dump(
            secrets["postgres_user"], secrets["postgres_database"], os.path.join(files, DUMP), host.free_bytes(staging)
        )
        _objects(taking, previous)
        _files(taking, previous)
        job.step("uploading the set")
        _small_files(taking, files, private, secrets, marker)
        manifest = _manifest(taking, files, marker, dumped)
        store.put_set(taking.set_id, files)
        job.step("uploading the manifest")
        store.put(f"{SETS}/{taking.set_id}/{MANIFEST}", json.dumps(manifest, indent=1).encode())
        result = _result(taking, manifest)
        if dumped.others:
            job.note(f"Other databases are not in the backup: {', '.join(dumped.others)}.")
        if keep:
            result |= prune.prune(store, job, keep, taking.contents)
        job.step("giving the lease back")
        store.drop_lease()
    return result


def _refuse_without_services() -> None:
    for name in ("postgres", "s3"):
        done = subprocess.run(
            ["docker", "inspect", "-f", "{{.State.Running}}", name], capture_output=True, text=True, check=False
        )
        if done.stdout.strip() != "true":
            raise Failure(
                f"The service {name} doesn't run; a backup reads through it.",
                expected="postgres and s3 running",
                found=done.stderr.strip() or f"{name} is stopped",
                next_step="labctl converge",
            )


@contextlib.contextmanager
def _locked_staging(here: Settings) -> Iterator[str]:
    """The volume's lock, and an empty folder on the server's own disk; what a killed run left there goes first."""
    from labctl_backup.job import locked

    with locked(here.data_dir):
        os.makedirs(host.STAGING, mode=0o700, exist_ok=True)
        for name in os.listdir(host.STAGING):
            shutil.rmtree(os.path.join(host.STAGING, name))
        with tempfile.TemporaryDirectory(dir=host.STAGING) as folder:
            yield folder


def _previous(taking: Taking, sets: list[BackupSet]) -> Contents:
    """What the newest complete set named; all that complete sets say of objects goes to `known`."""
    taking.job.step("reading what is stored already")
    newest = Contents()
    for one in reversed([one for one in sets if one.complete][:1]):
        try:
            newest = taking.store.contents(one)
        except Damaged as damaged:
            taking.job.note(f"The newest backup is damaged ({damaged}); nothing of it was taken for granted.")
    taking.known = newest.objects
    taking.stored = taking.store.objects(newest.objects)
    return newest


# -- objects -------------------------------------------------------------------------------------------------------


def _objects(taking: Taking, previous: Contents) -> None:
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
            taking.rclone.run(
                "copy",
                f"{S3}:",
                arrived,
                "--files-from-raw",
                names,
                "--no-traverse",
                *PARALLEL,
                accept=(0, 1, *NOT_FOUND),
            )
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
        if sha256 in taking.contents.objects or taking.has(sha256):
            return sha256, stored
        # an object that no set names is one that a killed run sent, or a listing that is behind: it is asked for
        there = taking.stored.get(sha256)
        kind = "perhaps" if there is not None and there.fits(stored) else "new"
        target = os.path.join(self._folder, kind, object_path(sha256))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.replace(path, target)
        taking.contents.objects[sha256] = stored
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


def _files(taking: Taking, previous: Contents) -> None:
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


# -- the set -------------------------------------------------------------------------------------------------------


def _small_files(taking: Taking, files: str, private: str, secrets: dict[str, str], marker: dict[str, Any]) -> None:
    encrypted = host.encrypt(taking.rclone, private, json.dumps(secrets).encode())
    shutil.copyfile(encrypted, os.path.join(files, SECRETS))
    for name, data in {CONTENTS: taking.contents.pack(), VOLUME: json.dumps(marker, indent=1).encode()}.items():
        with open(os.path.join(files, name), "wb") as handle:
            handle.write(data)


def _manifest(taking: Taking, files: str, marker: dict[str, Any], dumped: Dump) -> dict[str, Any]:
    here, contents = taking.here, taking.contents
    stack = marker.get("stack") or {}
    proofs = {}
    for name in sorted(os.listdir(files)):
        sha256, stored = digest(os.path.join(files, name))
        proofs[name] = {"size": stored.size, "sha256": sha256}
    return sealed(
        {
            "format": FORMAT,
            "id": taking.set_id,
            "lab": here.lab,
            "volume_id": marker["volume_id"],
            "host": host.hostname(),
            "labctl_version": here.labctl_version,
            "started": iso(taking.started),
            "finished": iso(time.time()),
            "postgres": {"major": dumped.major, "version": dumped.version, "bytes": dumped.bytes,
                         "other_databases": list(dumped.others)},
            "mlflow": {"version": _mlflow_version(), "schema": dumped.schema},
            "rows": dumped.rows,
            "s3": {"flavour": here.s3_flavour, "format": stack.get("s3_format", ""), "buckets": taking.buckets,
                   "objects": len(contents.s3), "bytes": sum(one.size for one in contents.s3)},
            "workspace": {"files": sum(entry.kind == "file" for entry in contents.workspace),
                          "bytes": sum(entry.size for entry in contents.workspace), "left_out": taking.left_out},
            "key_id": key_id(host.own_key(here)),
            "files": proofs,
        }
    )  # fmt: skip


def _mlflow_version() -> str:
    """What the running MLflow says; the database was last written by it."""
    program = "import importlib.metadata as m; print(m.version('mlflow'))"
    done = subprocess.run(
        ["docker", "exec", "mlflow", "python3", "-c", program], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def _result(taking: Taking, manifest: dict[str, Any]) -> dict[str, Any]:
    return {
        **prune.summary(BackupSet(taking.set_id, manifest), time.time()),
        "read": taking.read,
        "sent": taking.sent,
        "sent_bytes": taking.sent_bytes,
        "seconds": round(time.time() - taking.started, 1),
    }
