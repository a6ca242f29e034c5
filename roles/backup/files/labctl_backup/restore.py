"""Restoring a set into new directories, and switching to them in one step once everything is there and proven.

    <volume>/restored-<set id>/postgres_data   a new cluster, filled by pg_restore
                              /minio_data      a new S3 server's data, filled through it
                              /workspace       moved into place at the end, never over anything
                              /work            0700: dump and secrets while it is made
                              /restore.json    which parts are done; "served" once the marker points here

A restore that was killed finds its record, keeps the parts that are done, and begins the others anew. The marker is
written last, so nothing half-restored is ever served.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import stack_marker

from labctl_backup import decide, engine, host
from labctl_backup.decide import BackupSet, Plan, VolumeFacts, Wish
from labctl_backup.host import Settings
from labctl_backup.job import Job, locked
from labctl_backup.model import DUMP, OBJECTS, SECRETS, Contents, Damaged, S3Object, WorkspaceEntry, iso, object_path
from labctl_backup.prune import described
from labctl_backup.rclone import S3, VAULT, Rclone, s3_section, vault_section, write_config
from labctl_backup.send import BATCH_FILES, batch_limit
from labctl_backup.source import digest
from labctl_backup.store import PARALLEL, Store, hashes
from labctl_job.errors import Failure
from labctl_job.job import read_json, write_json

RECORD = "restore.json"
S3_FOLDERS = {"minio": "minio_data", "silo": "minio_data", "rclone": "rclone_s3_data"}
_DAMAGED = "labctl backup verify shows what is wrong; labctl backup list shows other sets"


@dataclass(frozen=True)
class Asked:
    """What the command line says."""

    set: str
    beside: bool = False
    into_new_major: bool = False
    new_secrets: bool = False
    again: bool = False


@dataclass
class Restoring:
    """One restore while it is made. `home` is its directory on the volume."""

    here: Settings
    job: Job
    rclone: Rclone
    store: Store
    private: str
    set: BackupSet
    contents: Contents
    plan: Plan
    home: str
    secrets: dict[str, str] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    def at(self, *parts: str) -> str:
        """A path in the restore's directory."""
        return os.path.join(self.home, *parts)

    def done(self, part: str, **facts: Any) -> None:
        """A part is complete and proven."""
        self.record["parts"][part] = {"at": iso(time.time()), **facts}
        write_json(self.at(RECORD), self.record)


def restore(here: Settings, job: Job, asked: Asked) -> dict[str, Any]:
    """Restore a set. Returns what the volume serves now; nothing is served before all of it is proven."""
    job.step("looking at volume and backup")
    marker = host.marker(here)
    with locked(here.data_dir), host.remotes(here) as (rclone, store, private):
        one = store.find(asked.set)
        try:
            contents = store.contents(one)
        except Damaged as damaged:
            raise _damaged(str(damaged)) from None
        stack = host.stack_of(here)
        home = _home(here, one.id)
        wish = _wish(here, asked)
        plan = decide.decide(_facts(here, stack, home), wish, one.manifest, contents)
        if plan.already:
            record = _close(here.at(str(stack["postgres_dir"]).partition("/")[0]))
            return {**record.get("result", {}), "id": one.id, "already": True, "stack": stack}
        if wrong := decide.missing_objects(contents, store.objects(contents.objects)):
            raise _damaged(f"{len(wrong)} objects are missing or differ: {described(contents, wrong)}")
        run = Restoring(here, job, rclone, store, private, one, contents, plan, home)
        with tempfile.TemporaryDirectory(dir=_staging()) as staging:
            job.step("downloading dump and secrets")
            _fetch_small(run, staging)
            _begin(run, stack, str(marker["volume_id"]))
            _database(run, staging)
            _objects(run, staging)
            _workspace(run, staging)
        return _switch(run, stack)


def _damaged(found: str) -> Failure:
    return decide.stop("The backup is damaged; nothing was restored.", "every byte as it was written", found, _DAMAGED)


def _staging() -> str:
    """The folder for downloads; what a killed run left there goes first (the volume's lock is held)."""
    os.makedirs(host.STAGING, mode=0o700, exist_ok=True)
    for name in os.listdir(host.STAGING):
        shutil.rmtree(os.path.join(host.STAGING, name))
    return host.STAGING


# -- before anything is written ------------------------------------------------------------------------------------


def _home(here: Settings, set_id: str) -> str:
    """The directory to restore into: that of a restore of this set which was cut off, else a new name."""
    number = 1
    while True:
        path = here.at(f"restored-{set_id}" + (f"-{number}" if number > 1 else ""))
        record = read_json(os.path.join(path, RECORD))
        if not os.path.lexists(path) or (isinstance(record, dict) and not record.get("served")):
            return path
        if record is None and not os.listdir(path):
            return path  # killed between the directory and its record
        number += 1


def _facts(here: Settings, stack: dict[str, Any], home: str) -> VolumeFacts:
    places = dict.fromkeys([*host.DATA_PLACES, *(str(stack[key]) for key in stack_marker.POINTERS if key in stack)])
    return VolumeFacts(
        mounted=True,
        marked=True,
        holding=tuple(here.at(place) for place in places if _holds_something(here.at(place))),
        stack=stack,
        secrets=os.path.exists(here.at(host.SECRETS_FILE)),
        free=host.free_bytes(here.data_dir),
        written=_size(home),
    )


def _holds_something(path: str) -> bool:
    """What can't be read counts as data."""
    try:
        return bool(os.listdir(path))
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _size(path: str) -> int:
    total = 0
    for folder, _, names in os.walk(path):
        total += sum(os.lstat(os.path.join(folder, name)).st_blocks * 512 for name in names)
    return total


def _wish(here: Settings, asked: Asked) -> Wish:
    majors, default = engine.majors(here.images)
    return Wish(
        beside=asked.beside,
        into_new_major=asked.into_new_major,
        new_secrets=asked.new_secrets,
        again=asked.again,
        keys=tuple(host.keys_at_hand(here)),
        majors=majors,
        default_major=default,
        flavour=here.s3_flavour,
        mlflow_version=engine.mlflow_version(here.images),
    )


def _fetch_small(run: Restoring, staging: str) -> None:
    """Dump and secrets, proven by the manifest's hashes while the volume is untouched."""
    here, plan = run.here, run.plan
    try:
        run.store.get_file(run.set, DUMP, os.path.join(staging, DUMP))
        if plan.secrets == "backup":
            encrypted = run.store.get(run.set, SECRETS)
            key = host.keys_at_hand(here)[str(run.set.manifest["key_id"])]
            with tempfile.TemporaryDirectory(dir=run.private) as folder:
                os.mkdir(vault := os.path.join(folder, "vault"), 0o700)
                opened = write_config(folder, {VAULT: vault_section(vault, key)})
                run.secrets = json.loads(host.decrypt(opened, folder, encrypted))
    except Damaged as damaged:
        raise _damaged(str(damaged)) from None
    if plan.secrets == "volume" or (plan.secrets == "new" and os.path.exists(here.at(host.SECRETS_FILE))):
        run.secrets = host.secrets_of(here)
    elif plan.secrets == "new":
        run.secrets = _new_secrets()


def _new_secrets() -> dict[str, str]:
    """As role mlflow_stack makes them for a new volume."""
    import stack_secrets

    return dict(stack_secrets.generate())


# -- the parts -----------------------------------------------------------------------------------------------------


def _begin(run: Restoring, stack: dict[str, Any], volume_id: str) -> None:
    """The restore's directory with its record; one that was cut off goes on with its own secrets and PostgreSQL."""
    engine.remove(engine.POSTGRES, engine.S3)
    os.makedirs(run.home, mode=0o711, exist_ok=True)
    os.makedirs(run.at("work"), mode=0o700, exist_ok=True)
    kept = run.at("work", "secrets.json")
    record = read_json(run.at(RECORD))
    wanted = {"set": run.set.id, "volume_id": volume_id, "major": run.plan.major, "secrets": run.plan.secrets}
    if isinstance(record, dict) and all(record.get(key) == value for key, value in wanted.items()):
        run.record = {**record, "before": stack}
        if run.plan.secrets == "new" and (found := read_json(kept)):
            run.secrets = found
    else:
        run.record = {**wanted, "begun": iso(time.time()), "before": stack, "parts": {}}
    write_json(kept, run.secrets)
    write_json(run.at(RECORD), run.record)


def _discard(run: Restoring, path: str) -> None:
    """Remove a part that a killed restore half made; nothing else, ever."""
    if not os.path.lexists(path):
        return
    record = read_json(run.at(RECORD))
    why = decide.discard_refusal(path, run.here.data_dir, host.stack_of(run.here), record)
    if os.path.islink(path) or os.path.ismount(path):
        why = why or "it is a link or a mount"
    if why:
        raise decide.stop(f"{path} is in the way of the restore.", "a new directory", why, "look at it with labctl ssh")
    shutil.rmtree(path)


def _directory(path: str, uid: int, mode: int) -> None:
    os.mkdir(path, 0o700)
    os.chown(path, uid, uid)
    os.chmod(path, mode)


def _database(run: Restoring, staging: str) -> None:
    """A new cluster with the dump in it, as many rows in every table as the backup counted, cleanly shut down."""
    if "postgres" in run.record["parts"]:
        return
    run.job.step("restoring the database")
    directory = run.at("postgres_data")
    _discard(run, directory)
    _directory(directory, engine.POSTGRES_UID, 0o700)
    database = engine.start_postgres(run.plan.image, directory, run.at("work"), run.secrets)
    run.job.tell("pg_restore")
    engine.pg_restore(database, os.path.join(staging, DUMP))
    run.job.tell("counting rows")
    with database:
        found = database.row_counts()
        database.ask("ANALYZE;")
        database.ask("CHECKPOINT;")
    expected = run.set.manifest["rows"]
    if found != expected:
        differing = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise Failure(
            "The restored database differs from the backup; it isn't served.",
            expected=", ".join(f"{name}: {expected.get(name)}" for name in differing[:5]),
            found=", ".join(f"{name}: {found.get(name)}" for name in differing[:5]),
            next_step="labctl backup verify, then run the same command again",
        )
    engine.remove(engine.POSTGRES)
    if os.path.exists(os.path.join(directory, "postmaster.pid")):
        raise Failure("The restored PostgreSQL didn't stop cleanly.", next_step="run the same command again")
    run.done("postgres", rows=sum(found.values()))


def _objects(run: Restoring, staging: str) -> None:
    """Every object into a new S3 server, then every object read back from it and compared by hash."""
    if "s3" in run.record["parts"]:
        return
    run.job.step("restoring the objects")
    flavour = run.here.s3_flavour
    directory = run.at(S3_FOLDERS[flavour])
    if not os.path.isdir(directory):
        _directory(directory, engine.S3_UID, 0o750)
    elif os.stat(directory).st_uid != engine.S3_UID:
        os.rmdir(directory)  # killed between making it and giving it away, so it is empty
        _directory(directory, engine.S3_UID, 0o750)
    url = engine.start_s3(run.here.images["s3"], flavour, directory, run.at("work"), run.secrets)
    section = s3_section(url, run.secrets["s3_user"], run.secrets["s3_password"])
    with tempfile.TemporaryDirectory(dir=run.private) as folder:
        server = write_config(folder, {S3: section, **_store_section(run)})
        for bucket in run.set.manifest["s3"]["buckets"]:
            server.run("mkdir", f"{S3}:{bucket}", "--s3-no-check-bucket=false")
        there = {name for name, _ in _arrived(run, server)}
        missing = [one for one in run.contents.s3 if f"{one.bucket}/{one.key}" not in there]
        sent = 0
        for batch in _batches(missing, staging):
            run.job.tell(f"{sent} of {len(missing)} objects")
            _put_batch(run, server, batch, staging)
            sent += len(batch)
        run.job.step("reading back the restored objects")
        arrived = dict(_arrived(run, server))
    wrong = [one.sha256 for one in run.contents.s3 if arrived.get(f"{one.bucket}/{one.key}") != one.sha256]
    if wrong:
        raise _damaged(f"{len(wrong)} objects differ after the restore: {described(run.contents, wrong)}")
    engine.remove(engine.S3)
    run.done("s3", objects=len(run.contents.s3))


def _store_section(run: Restoring) -> dict[str, dict[str, str]]:
    from labctl_backup.rclone import remote_section

    return {run.here.remote: remote_section(run.here.rclone_config, run.here.remote)}


def _arrived(run: Restoring, server: Rclone) -> Iterator[tuple[str, str]]:
    """(bucket/key, SHA-256) of what the new S3 server gives back as the backup has it."""
    expected = {f"{one.bucket}/{one.key}": one.sha256 for one in run.contents.s3}
    for bucket in run.set.manifest["s3"]["buckets"]:
        for name, sha256 in hashes(server, f"{S3}:{bucket}").items():
            if expected.get(f"{bucket}/{name}") == sha256:
                yield f"{bucket}/{name}", sha256


def _batches(objects: list[S3Object], staging: str) -> Iterator[list[S3Object]]:
    limit = batch_limit(host.free_bytes(staging))
    batch: list[S3Object] = []
    size = 0
    for one in objects:
        if batch and (size + one.size > limit or len(batch) >= BATCH_FILES):
            yield batch
            batch, size = [], 0
        batch.append(one)
        size += one.size
    if batch:
        yield batch


def _put_batch(run: Restoring, server: Rclone, batch: list[S3Object], staging: str) -> None:
    """Objects downloaded, proven, laid out under their names, and sent into the S3 server."""
    limit = batch_limit(host.free_bytes(staging))
    if len(batch) == 1 and batch[0].size > limit:
        _put_alone(run, server, batch[0])
        return
    with tempfile.TemporaryDirectory(dir=staging) as folder:
        fetched = _fetched(run, {one.sha256 for one in batch}, os.path.join(folder, "in"))
        tree = os.path.join(folder, "tree")
        alone = []
        for one in batch:
            target = os.path.join(tree, one.bucket, one.key)
            try:
                os.makedirs(os.path.dirname(target), exist_ok=True)
                os.link(fetched[one.sha256], target)
            except OSError:  # S3 knows names that no folder can hold
                alone.append(one)
        if len(alone) < len(batch):
            server.run("copy", tree, f"{S3}:", *PARALLEL, "--no-check-dest", "--no-traverse")
    for one in alone:
        _put_alone(run, server, one)


def _put_alone(run: Restoring, server: Rclone, one: S3Object) -> None:
    server.run("copyto", run.store.path(object_path(one.sha256)), f"{S3}:{one.bucket}/{one.key}", "--ignore-times")


def _fetched(run: Restoring, wanted: set[str], folder: str) -> dict[str, str]:
    """{hash: path} of downloaded objects, each proven by its name."""
    run.store.fetch(OBJECTS, [f"{sha[:2]}/{sha}" for sha in sorted(wanted)], folder)
    paths = {sha: os.path.join(folder, sha[:2], sha) for sha in wanted}
    wrong = [sha for sha, path in paths.items() if not os.path.isfile(path) or digest(path)[0] != sha]
    if wrong:
        raise _damaged(f"{len(wrong)} objects differ from their names: {described(run.contents, wrong)}")
    return paths


def _workspace(run: Restoring, staging: str) -> None:
    """The workspace's files under the restore's directory, with owners, modes and times as they were."""
    if "workspace" in run.record["parts"]:
        return
    run.job.step("restoring the workspace")
    root = run.at(host.WORKSPACE)
    _discard(run, root)
    _directory(root, 1000, 0o755)
    entries = run.contents.workspace
    for entry in entries:
        if not _inside(root, entry.path):
            raise _damaged(f"the workspace's {entry.path!r} leads out of it")
        if entry.kind == "folder":
            os.mkdir(os.path.join(root, entry.path), 0o700)
        elif entry.kind == "link":
            os.symlink(entry.target, os.path.join(root, entry.path))
    files = [entry for entry in entries if entry.kind == "file"]
    for start in range(0, len(files), BATCH_FILES):
        _put_files(run, root, files[start : start + BATCH_FILES], staging)
    for entry in reversed(entries):  # a folder after what is in it, or its times would change again
        _dress(os.path.join(root, entry.path), entry)
    run.done("workspace", files=len(files))


def _inside(root: str, path: str) -> bool:
    """Whether a path of a backup stays below root, through real folders only."""
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return False
    return not any(os.path.islink(os.path.join(root, *parts[:n])) for n in range(1, len(parts)))


def _put_files(run: Restoring, root: str, files: list[WorkspaceEntry], staging: str) -> None:
    with tempfile.TemporaryDirectory(dir=staging) as folder:
        fetched = _fetched(run, {entry.sha256 for entry in files}, os.path.join(folder, "in"))
        for entry in files:
            shutil.copyfile(fetched[entry.sha256], os.path.join(root, entry.path))


def _dress(path: str, entry: WorkspaceEntry) -> None:
    os.chown(path, entry.uid, entry.gid, follow_symlinks=False)
    if entry.kind != "link":
        os.chmod(path, entry.mode)
    os.utime(path, ns=(entry.modified, entry.modified), follow_symlinks=False)


# -- the switch ----------------------------------------------------------------------------------------------------


def _switch(run: Restoring, before: dict[str, Any]) -> dict[str, Any]:
    """Stop what is served, move workspace and secrets into place, point the marker at the new directories."""
    run.job.step("switching to the restored data")
    here, manifest = run.here, run.set.manifest
    engine.stop_lab()
    workspace = _place_workspace(run)
    if run.plan.secrets != "volume":
        _place_secrets(run)
    os.sync()
    relative = os.path.relpath(run.home, here.data_dir)
    stack = {
        **{key: value for key, value in before.items() if key not in ("s3_format",)},
        "postgres_major": run.plan.major,
        "postgres_dir": f"{relative}/postgres_data",
        "s3_dir": f"{relative}/{S3_FOLDERS[here.s3_flavour]}",
        "mlflow_version": manifest["mlflow"]["version"],
        "mlflow_schema": manifest["mlflow"]["schema"],
        "origin": f"restore:{run.set.id}",
    }
    if S3_FOLDERS[here.s3_flavour] == "minio_data":
        stack["s3_format"] = "xl-single"
    result = {
        "id": run.set.id,
        "already": False,
        "lab": manifest["lab"],
        "stack": stack,
        "workspace": workspace,
        "secrets": run.plan.secrets,
        "rows": sum(manifest["rows"].values()),
        "objects": len(run.contents.s3),
        "files": manifest["workspace"]["files"],
    }
    # for a run that is killed after the switch: the next one only closes, and tells the same
    run.record["result"] = result
    write_json(run.at(RECORD), run.record)
    stack_marker.write(here.data_dir, stack)
    run.job.step("cleaning up")
    _close(run.home)
    return result


def _close(home: str) -> dict[str, Any]:
    """The restore is served: its record, which is returned, says so, and what was needed to make it goes."""
    found = read_json(os.path.join(home, RECORD))
    record: dict[str, Any] = found if isinstance(found, dict) else {}
    if record and not record.get("served"):
        record["served"] = iso(time.time())
        write_json(os.path.join(home, RECORD), record)
    work = os.path.join(home, "work")
    if os.path.isdir(work) and not os.path.islink(work):
        shutil.rmtree(work)
    if os.path.exists(host.KEYS):
        os.unlink(host.KEYS)
    return record


def _place_workspace(run: Restoring) -> str:
    """Where the workspace's files are in the end: in its own place if that is empty, else in a folder of their own."""
    source, target = run.at(host.WORKSPACE), run.here.at(host.WORKSPACE)
    beside = os.path.join(target, os.path.basename(run.home))
    if not os.path.isdir(source):  # a restore that was killed after the move
        return beside if os.path.isdir(beside) else target
    if os.path.isdir(target) and os.listdir(target):
        target = beside
    os.rename(source, target)
    return target


def _place_secrets(run: Restoring) -> None:
    """The secrets of an empty volume, as role mlflow_stack writes them; what was there is kept beside."""
    import stack_secrets

    here = run.here
    os.makedirs(here.at(host.SECRETS_DIR), mode=0o700, exist_ok=True)
    path = here.at(host.SECRETS_FILE)
    found = read_json(path)
    if found is not None and found != run.secrets:
        os.replace(path, f"{path}.before-{run.set.id}")
    stack_secrets.keep(here.at(host.SECRETS_DIR), run.secrets)
    key = host.keys_at_hand(here).get(str(run.set.manifest["key_id"]))
    if key:
        host.keep_key(here, key)


def undo(here: Settings, job: Job) -> dict[str, Any]:
    """Point the marker at what was served before the restore. What was logged since stays where it is."""
    job.step("looking at the volume")
    host.marker(here)
    with locked(here.data_dir):
        stack = host.stack_of(here)
        home = here.at(str(stack.get("postgres_dir", "")).partition("/")[0])
        record = read_json(os.path.join(home, RECORD)) if "restored-" in os.path.basename(home) else None
        if not str(stack.get("origin", "")).startswith("restore:") or not isinstance(record, dict):
            raise Failure("The volume doesn't serve a restore.", kind="usage", next_step="labctl status")
        before = dict(record.get("before") or {})
        places = [str(before.get("postgres_dir", "postgres_data"))]
        if not all(_holds_something(here.at(place)) for place in places):
            raise Failure(
                "There was no data before the restore to go back to.",
                kind="usage",
                found=f"nothing in {', '.join(places)}",
            )
        job.step("switching back")
        engine.stop_lab()
        stack_marker.write(here.data_dir, before)
        return {"id": record["set"], "stack": before, "kept": home}
