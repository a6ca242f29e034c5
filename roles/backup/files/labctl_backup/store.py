"""The backup container: its sets, its objects, its lease."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from labctl_backup import decide
from labctl_backup.decide import BackupSet
from labctl_backup.model import (
    CONTENTS,
    LEASE,
    MANIFEST,
    OBJECTS,
    SETS,
    Contents,
    Damaged,
    Stored,
    iso,
    object_path,
)
from labctl_backup.rclone import NOT_FOUND, Rclone, names_file
from labctl_backup.source import digest
from labctl_job.errors import Failure

#: Requests at a time, as the tutorial has them (1,000 objects: 20 s with 32, 29 s with 16, on a busy machine).
PARALLEL = ("--transfers", "32", "--checkers", "16")
#: One listing instead of one a folder.
LIST_ALL = ("-R", "--files-only", "--fast-list", "--no-modtime")
#: Above this rclone cuts an object into segments, and the listing says 0 bytes.
SEGMENT_BYTES = 5 * 1024**3
#: A lease is renewed when it is older than this.
RENEW_SECONDS = 600
#: As many objects are found by one listing rather than by a request each.
LISTING_PAYS = 200


class Store:
    """One lab's container. `swift`: the remote speaks Swift, whose listing then needs a hint."""

    def __init__(self, rclone: Rclone, remote: str, container: str, swift: bool = True) -> None:
        self.rclone, self.container = rclone, container
        self._root = f"{remote}:{container}"
        # Without the hint every hash of a listing costs a request of its own.
        self._hint = ("--swift-no-large-objects",) if swift else ()
        self._lease: dict[str, Any] = {}

    def path(self, *parts: str) -> str:
        """A path in the container, as rclone takes it."""
        return "/".join((self._root, *parts))

    def ensure(self) -> None:
        """Make the container unless it is there."""
        self.rclone.run("mkdir", self._root)

    # -- sets ------------------------------------------------------------------------------------------------------

    def sets(self) -> list[BackupSet]:
        """All sets, newest first, with the manifests of the complete ones."""
        files: dict[str, dict[str, int]] = {}
        for row in self.rclone.listing(self.path(SETS), *LIST_ALL):
            set_id, _, name = row["Path"].partition("/")
            files.setdefault(set_id, {})[name] = row["Size"]
        with tempfile.TemporaryDirectory() as folder:
            names = [f"{set_id}/{MANIFEST}" for set_id, names in files.items() if MANIFEST in names]
            self.fetch(SETS, names, folder)
            manifests = {}
            for name in names:
                with open(os.path.join(folder, name), "rb") as handle:
                    manifests[name.partition("/")[0]] = handle.read()
        return decide.classify(files, manifests)

    def find(self, wanted: str) -> BackupSet:
        """A complete set by its id, or the newest for `latest`. Failure where there is none, or a damaged one."""
        sets = self.sets()
        if wanted == "latest":
            found = next((one for one in sets if one.complete), None)
        else:
            found = next((one for one in sets if one.id == wanted), None)
        if found is None:
            raise Failure(
                f"There is no {'complete backup' if wanted == 'latest' else f'backup {wanted}'} in {self.container}.",
                kind="usage",
                found=", ".join(one.id for one in sets) or "no sets",
                next_step="labctl backup list",
            )
        if not found.complete:
            raise decide.stop(
                f"The backup {found.id} can't be used.", "a complete set", found.problem, "labctl backup list"
            )
        return found

    def contents(self, one: BackupSet) -> Contents:
        """What a complete set names. Damaged if it isn't what the manifest promises."""
        data = self.get(one, CONTENTS)
        try:
            return Contents.unpack(data)
        except Damaged as damaged:
            raise Damaged(f"{one.id}: {damaged}") from None

    def get(self, one: BackupSet, name: str) -> bytes:
        """A small file of a set, proven by the manifest's hash; Damaged otherwise."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, name)
            self.get_file(one, name, path)
            with open(path, "rb") as handle:
                return handle.read()

    def get_file(self, one: BackupSet, name: str, path: str) -> None:
        """A file of a set, written to `path` and proven by the manifest's hash; Damaged otherwise."""
        said = one.manifest["files"][name]
        done = self.rclone.run("copyto", self.path(SETS, one.id, name), path, accept=(0, *NOT_FOUND))
        if done.returncode or not os.path.exists(path):
            raise Damaged(f"{one.id}: {name} is missing")
        sha256, stored = digest(path)
        if (sha256, stored.size) != (said["sha256"], said["size"]):
            raise Damaged(f"{one.id}: {name} has SHA-256 {sha256[:12]}…, the manifest says {said['sha256'][:12]}…")

    def put_set(self, set_id: str, folder: str) -> None:
        """The files of a set; the manifest isn't among them."""
        self.rclone.run("copy", folder, self.path(SETS, set_id), *PARALLEL, "--no-traverse", "--no-check-dest")

    def put(self, path: str, data: bytes) -> None:
        """One small object."""
        with tempfile.NamedTemporaryFile() as handle:
            handle.write(data)
            handle.flush()
            self.rclone.run("copyto", handle.name, self.path(path), "--no-check-dest")

    def remove_set(self, set_id: str) -> None:
        """Its manifest first: from then on the set isn't complete, whatever happens next."""
        self.rclone.run("deletefile", self.path(SETS, set_id, MANIFEST), accept=(0, *NOT_FOUND))
        self.rclone.run("delete", self.path(SETS, set_id), accept=(0, *NOT_FOUND))

    # -- objects ---------------------------------------------------------------------------------------------------

    def objects(self, known: Mapping[str, Stored]) -> dict[str, Stored]:
        """Every object by its hash, by the container's listing; `known` says which of them are cut into segments."""
        rows = self.rclone.listing(self.path(OBJECTS), *LIST_ALL, "--hash", "--hash-type", "md5", *self._hint)
        found = {row["Path"].rpartition("/")[2]: Stored(row["Size"], _md5(row)) for row in rows}
        for sha256, one in known.items():
            if one.size >= SEGMENT_BYTES and sha256 in found:
                whole = self.rclone.listing(self.path(object_path(sha256)))
                found[sha256] = Stored(whole[0]["Size"] if whole else 0)
        return found

    def put_objects(self, folder: str, *, perhaps_there: bool = False) -> None:
        """Objects laid out as in the container; with `perhaps_there` each is asked for first and sent if it differs."""
        how = ("--checksum", "--no-traverse") if perhaps_there else ("--no-check-dest", "--no-traverse")
        self.rclone.run("copy", folder, self._root, *PARALLEL, *how)

    def fetch(self, below: str, names: Sequence[str], folder: str) -> None:
        """Download names below a path into a folder. A name that isn't there is left out."""
        if not names:
            return
        with names_file(names) as file:
            self.rclone.run("copy", self.path(below), folder, *chosen(file, len(names)))

    def remove_objects(self, hashes: Collection[str]) -> None:
        """Objects that no set names."""
        if not hashes:
            return
        with names_file(f"{sha[:2]}/{sha}" for sha in hashes) as file:
            self.rclone.run("delete", self.path(OBJECTS), "--files-from-raw", file, "--no-traverse", *PARALLEL)

    # -- the lease -------------------------------------------------------------------------------------------------

    def take_lease(self, volume_id: str, host: str, *, force: bool = False) -> None:
        """Make sure that no other volume's backup runs into this container. Failure if one does."""
        found = self.read_lease()
        if (why := decide.lease_refusal(found, volume_id, time.time())) and not force:
            raise Failure(
                f"Another host backs up into {self.container}.",
                kind="refused",
                expected="no lease, or this volume's",
                found=why,
                next_step="wait until it is done; if that host is gone for good: labctl backup --force",
            )
        self._lease = {"volume_id": volume_id, "host": host}
        self._write_lease()
        if (read := self.read_lease()) is None or read.get("volume_id") != volume_id:
            raise Failure(
                f"Another host took the lease of {self.container}.", kind="refused", next_step="try again later"
            )

    def renew_lease(self) -> None:
        """Say that this host is still at it; called often, writes seldom."""
        if self._lease and time.time() - self._lease["renewed"] > RENEW_SECONDS:
            self._write_lease()

    def drop_lease(self) -> None:
        """The backup is over."""
        self._lease = {}
        self.rclone.run("deletefile", self.path(LEASE), accept=(0, *NOT_FOUND))

    def read_lease(self) -> dict[str, Any] | None:
        """The lease, None where there is none."""
        done = self.rclone.run("cat", self.path(LEASE), accept=(0, *NOT_FOUND))
        if done.returncode or not done.stdout:
            return None
        try:
            lease = json.loads(done.stdout)
        except ValueError:
            lease = None
        return lease if isinstance(lease, dict) else {"host": "?"}

    def _write_lease(self) -> None:
        now = time.time()
        self._lease |= {"renewed": now, "until": iso(now + decide.LEASE_SECONDS)}
        self.put(LEASE, json.dumps(self._lease).encode())


def chosen(names: str, count: int) -> list[str]:
    """Options for a copy of `count` names that a file lists: many are found by one listing, few by a request each."""
    how = "--fast-list" if count > LISTING_PAYS else "--no-traverse"
    return ["--files-from-raw", names, how, *PARALLEL]


def _md5(row: Mapping[str, Any]) -> str:
    return str(row.get("Hashes", {}).get("md5", ""))


def hashes(rclone: Rclone, path: str, names: Sequence[str] = ()) -> dict[str, str]:
    """{name below path: SHA-256} of all that is there, or of `names`, read in full. What can't be read is missing."""
    how = ["hashsum", "SHA256", "--download", path, *PARALLEL, "--fast-list"]
    with names_file(names) as file:
        chosen = ["--files-from-raw", file] if names else []
        done = rclone.run(*how, *chosen, accept=(0, 1, *NOT_FOUND))
    lines = done.stdout.decode(errors="surrogateescape").splitlines()
    return {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}
