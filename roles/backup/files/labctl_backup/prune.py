"""What there is, and what may go: listing, verifying, deleting."""

from __future__ import annotations

import time
from typing import Any

from labctl_backup import decide
from labctl_backup.decide import BackupSet
from labctl_backup.job import Job
from labctl_backup.model import OBJECTS, Contents, Damaged, set_time
from labctl_backup.store import Store, hashes


def summary(one: BackupSet, now: float) -> dict[str, Any]:
    """A set as a line of `labctl backup list`."""
    manifest = one.manifest
    known: dict[str, Any] = {"id": one.id, "complete": one.complete, "age_seconds": int(now - set_time(one.id))}
    if not one.complete:
        return {**known, "problem": one.problem}
    return {
        **known,
        "lab": manifest["lab"],
        "started": manifest["started"],
        "finished": manifest["finished"],
        "objects": manifest["s3"]["objects"],
        "files": manifest["workspace"]["files"],
        "bytes": manifest["s3"]["bytes"]
        + manifest["workspace"]["bytes"]
        + sum(said["size"] for said in manifest["files"].values()),
        "rows": sum(manifest["rows"].values()),
        "postgres": manifest["postgres"]["version"],
        "mlflow": manifest["mlflow"]["version"],
        "key_id": manifest["key_id"],
    }


def list_sets(store: Store) -> dict[str, Any]:
    """Every set, newest first."""
    now = time.time()
    return {"container": store.container, "sets": [summary(one, now) for one in store.sets()]}


def prune(store: Store, job: Job, keep: int, newest: Contents) -> dict[str, Any]:
    """Remove complete sets beyond the newest `keep`, old cut-off ones, and the objects that no set names any more.

    `newest` is what was just uploaded: the store's listing may show it later.
    """
    job.step("removing older sets")
    sets = store.sets()
    doomed = decide.doomed_sets(sets, keep, time.time())
    return remove(store, job, sets, doomed, newest)


def remove(
    store: Store, job: Job, sets: list[BackupSet], doomed: list[str], needed: Contents | None = None
) -> dict[str, Any]:
    """Remove these sets, then what no remaining one names. In doubt about a remaining set, no object goes."""
    remaining = [needed] if needed else []
    doubt = ""
    for one in sets:
        if one.id in doomed:
            continue
        if one.damaged:
            doubt = doubt or f"{one.id}: {one.problem}"
        elif one.complete:
            try:
                remaining.append(store.contents(one))
            except Damaged as damaged:
                doubt = doubt or str(damaged)
    for set_id in doomed:
        job.tell(set_id)
        store.remove_set(set_id)
    result: dict[str, Any] = {"removed_sets": doomed, "removed_objects": 0}
    if doubt:
        job.note(f"No object was removed, for it can't be known which ones are needed: {doubt}.")
        return result
    if doomed:
        job.step("removing objects that no set names")
        objects = decide.doomed_objects(store.objects({}), remaining)
        store.remove_objects(objects)
        result["removed_objects"] = len(objects)
    return result


def verify(store: Store, job: Job, wanted: str) -> dict[str, Any]:
    """Read back every byte of a set. A safety stop if anything isn't what it was."""
    job.step("reading the manifest")
    one = store.find(wanted)
    job.step("reading back the set")
    try:
        for name in one.manifest["files"]:
            store.get(one, name)
        contents = store.contents(one)
    except Damaged as damaged:
        raise decide.stop("The backup is damaged.", "every byte as it was written", str(damaged), _MEND) from None
    job.step("reading back the objects")
    job.tell(f"{len(contents.objects)} objects")
    names = [f"{sha[:2]}/{sha}" for sha in contents.objects]
    found = hashes(store.rclone, store.path(OBJECTS), names) if names else {}
    wrong = sorted(sha for sha in contents.objects if found.get(f"{sha[:2]}/{sha}") != sha)
    if wrong:
        raise decide.stop(
            "The backup is damaged.",
            f"{len(contents.objects)} objects as they were written",
            f"{len(wrong)} are missing or differ: {described(contents, wrong)}",
            _MEND,
        )
    return {**summary(one, time.time()), "verified_objects": len(contents.objects)}


_MEND = "labctl backup sends what is damaged again, if the lab still has it; labctl backup list shows older sets"


def described(contents: Contents, wrong: list[str]) -> str:
    """What those hashes are called in the lab, the first few."""
    names = {one.sha256: f"{one.bucket}/{one.key}" for one in contents.s3}
    names |= {entry.sha256: f"workspace/{entry.path}" for entry in contents.workspace if entry.kind == "file"}
    return ", ".join(names.get(sha, sha) for sha in wrong[:5]) + (" …" if len(wrong) > 5 else "")
