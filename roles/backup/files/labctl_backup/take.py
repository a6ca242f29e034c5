"""Making a backup: the dump first, so that every artifact that a dumped run names is there when objects are read."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from labctl_backup import host, prune
from labctl_backup.decide import BackupSet
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
    iso,
    key_id,
    new_set_id,
    sealed,
)
from labctl_backup.send import Taking, send_files, send_objects
from labctl_backup.source import Dump, digest, dump
from labctl_job.errors import Failure


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
        try:
            sets = store.sets()
            taking = Taking(here, job, rclone, store, staging, new_set_id(started), started)
            return _take(taking, sets, private, secrets, marker, keep)
        finally:
            with contextlib.suppress(Failure):  # another error is on its way out, or the lease ends by itself
                store.drop_lease()


def _take(  # noqa: PLR0917 (the parts of one backup)
    taking: Taking, sets: list[BackupSet], private: str, secrets: dict[str, str], marker: dict[str, Any], keep: int
) -> dict[str, Any]:
    """The steps between lease and lease."""
    job, store = taking.job, taking.store
    previous = _previous(taking, sets)
    job.step("dumping the database")
    files = os.path.join(taking.staging, "set")
    os.mkdir(files)
    user, database = secrets["postgres_user"], secrets["postgres_database"]
    dumped = dump(user, database, os.path.join(files, DUMP), host.free_bytes(taking.staging))
    send_objects(taking, previous)
    send_files(taking, previous)
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


# -- the set -------------------------------------------------------------------------------------------------------


def _small_files(taking: Taking, files: str, private: str, secrets: dict[str, str], marker: dict[str, Any]) -> None:
    encrypted = host.encrypt(taking.rclone, private, json.dumps(secrets).encode())
    shutil.copyfile(encrypted, os.path.join(files, SECRETS))
    contents = taking.contents.pack()
    Contents.unpack(contents)  # what a restore couldn't read must never get a manifest
    for name, data in {CONTENTS: contents, VOLUME: json.dumps(marker, indent=1).encode()}.items():
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
