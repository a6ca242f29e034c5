"""Every decision about data, as pure functions: what a set counts as, what may go, where a restore may write."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from labctl_backup.model import MANIFEST, SET_ID, SHA256, Contents, Damaged, Stored, read_manifest, set_time
from labctl_job.errors import Failure

#: A set without a manifest may be one that is being made now; after a day it was cut off.
CUT_OFF_SECONDS = 24 * 3600
#: A lease that wasn't renewed for that long belongs to a host that is gone.
LEASE_SECONDS = 6 * 3600
#: What a restore leaves free of the volume: an eighth on top of what it writes.
MARGIN = 1 / 8
#: A cluster takes more room than its dump: indexes, the write-ahead log, what initdb makes.
CLUSTER_BYTES = 128 * 1024 * 1024


@dataclass(frozen=True)
class BackupSet:
    """A set as the container shows it: `complete`, or why it isn't. `damaged`: there is a manifest that isn't whole."""

    id: str
    manifest: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    damaged: bool = False

    @property
    def complete(self) -> bool:
        """Whether all of it was written."""
        return bool(self.manifest)


def classify(files: Mapping[str, Mapping[str, int]], manifests: Mapping[str, bytes]) -> list[BackupSet]:
    """The sets, newest first, from {id: {file name: bytes}} and the manifests' bytes."""
    found = []
    for set_id, names in files.items():
        if not SET_ID.fullmatch(set_id):
            continue  # not ours, so not our business
        if MANIFEST not in names:
            found.append(BackupSet(set_id, problem="cut off: it has no manifest"))
            continue
        try:
            manifest = read_manifest(manifests.get(set_id, b""), set_id)
            wrong = [name for name, said in manifest["files"].items() if names.get(name) != said["size"]]
            if wrong:
                raise Damaged(f"{', '.join(sorted(wrong))}: missing, or not of the size that the manifest says")
            found.append(BackupSet(set_id, manifest))
        except (Damaged, KeyError, TypeError) as error:
            found.append(BackupSet(set_id, problem=f"damaged: {error}", damaged=True))
    return sorted(found, key=lambda one: one.id, reverse=True)


def doomed_sets(sets: Iterable[BackupSet], keep: int, now: float) -> list[str]:
    """Ids of the sets that `--keep` removes: complete ones beyond the newest `keep`, and old cut-off ones.

    A set whose manifest is damaged is never among them: a person has to look at it.
    """
    if keep < 1:
        return []
    ordered = sorted(sets, key=lambda one: one.id, reverse=True)
    complete = [one.id for one in ordered if one.complete]
    cut_off = [one.id for one in ordered if not one.complete and not one.damaged]
    return complete[keep:] + [set_id for set_id in cut_off if now - set_time(set_id) > CUT_OFF_SECONDS]


def doomed_objects(stored: Collection[str], remaining: Iterable[Contents]) -> list[str]:
    """Objects that no remaining set names. Whoever calls this has read the contents of every set that remains."""
    named = {sha for contents in remaining for sha in contents.objects}
    return sorted(sha for sha in stored if SHA256.fullmatch(sha) and sha not in named)


def lease_refusal(lease: Mapping[str, Any] | None, volume_id: str, now: float) -> str:
    """Why a backup must not begin, or "". A lease of this very volume is that of a run that was killed."""
    if not lease or lease.get("volume_id") == volume_id:
        return ""
    try:
        age = now - float(lease["renewed"])
    except (KeyError, TypeError, ValueError):
        return "a lease that can't be read"
    if age > LEASE_SECONDS:
        return ""
    return f"a lease of volume {lease.get('volume_id')} on {lease.get('host')}, renewed {age / 60:.0f} min ago"


# -- restore -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VolumeFacts:
    """What a restore finds. `holding` names the directories in which a stack keeps data, where there is any.

    `stack` is the marker's key, `unfinished` the records of restores that never came to be served.
    """

    mounted: bool = False
    marked: bool = False
    holding: tuple[str, ...] = ()
    stack: Mapping[str, Any] = field(default_factory=dict)
    secrets: bool = False
    free: int = 0
    written: int = 0  # bytes that an unfinished restore of the same set has written already


@dataclass(frozen=True)
class Wish:
    """What was asked for. `keys`: ids of the keys at hand. `majors`: {PostgreSQL major: image}."""

    beside: bool = False
    into_new_major: bool = False
    new_secrets: bool = False
    again: bool = False
    keys: Collection[str] = ()
    majors: Mapping[str, str] = field(default_factory=dict)
    default_major: str = ""
    flavour: str = ""
    mlflow_version: str = ""


@dataclass(frozen=True)
class Plan:
    """What a restore does: the PostgreSQL it makes, and where its secrets come from (volume, backup or new).

    `already`: the volume serves this very set, there is nothing to do.
    """

    major: str = ""
    image: str = ""
    secrets: str = "volume"
    already: bool = False


def stop(msg: str, expected: str, found: str, next_step: str) -> Failure:
    """A safety stop: nothing was written."""
    return Failure(msg, kind="safety_stop", expected=expected, found=found, next_step=next_step)


def decide(facts: VolumeFacts, wish: Wish, manifest: Mapping[str, Any], contents: Contents) -> Plan:
    """Where a restore goes, or Failure: then nothing has been written."""
    if not facts.mounted or not facts.marked:
        raise stop(
            "There is no labctl volume to restore to.",
            "the lab's volume, mounted and with its marker",
            "a mount without a marker" if facts.mounted else "no mount",
            "labctl converge --only block_volume",
        )
    if facts.stack.get("origin") == f"restore:{manifest['id']}" and not wish.again:
        return Plan(already=True)
    beside = wish.beside or wish.into_new_major
    if facts.holding and not beside:
        raise stop(
            "The volume holds data; a restore never writes over any.",
            "a volume without databases and objects",
            f"data in {', '.join(facts.holding)}",
            f"labctl restore {manifest['id']} --beside keeps what is there and serves the restored data next to it",
        )
    major, image = _postgres(facts, wish, manifest)
    _refuse_older_mlflow(wish, manifest)
    _refuse_if_full(facts, manifest, contents)
    return Plan(major, image, _secrets(facts, wish, manifest))


def _postgres(facts: VolumeFacts, wish: Wish, manifest: Mapping[str, Any]) -> tuple[str, str]:
    """The major version to make a cluster of, and its image."""
    of_backup = str(manifest["postgres"]["major"])
    if wish.into_new_major:
        floor = max(int(of_backup), int(facts.stack.get("postgres_major") or 0))
        newer = sorted((int(major) for major in wish.majors if int(major) > floor))
        if not newer:
            raise Failure(
                f"There is no PostgreSQL image newer than {floor}.",
                kind="usage",
                expected=f"an image of PostgreSQL {floor + 1} or newer",
                found=f"images of PostgreSQL {', '.join(sorted(wish.majors)) or '(none)'}",
                next_step="name one in lab.yaml (images: {postgres: …}), then run the command again",
            )
        default = int(wish.default_major or 0)
        chosen = str(default if default in newer else newer[0])
        return chosen, wish.majors[chosen]
    if of_backup in wish.majors:
        return of_backup, wish.majors[of_backup]
    of_new_volumes = wish.default_major
    if not facts.holding and of_new_volumes and int(of_new_volumes) >= int(of_backup):
        return of_new_volumes, wish.majors[of_new_volumes]  # a dump goes into any newer PostgreSQL
    raise stop(
        f"There is no image for the backup's PostgreSQL {of_backup}.",
        f"an image of PostgreSQL {of_backup}",
        f"images of PostgreSQL {', '.join(sorted(wish.majors)) or '(none)'}",
        "name one in lab.yaml, or restore with --into-new-major into a newer one",
    )


def version_of(text: str) -> tuple[int, ...]:
    """Numbers of a version, for comparing; () where there is none."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _refuse_older_mlflow(wish: Wish, manifest: Mapping[str, Any]) -> None:
    of_backup = str(manifest.get("mlflow", {}).get("version", ""))
    here = version_of(wish.mlflow_version)
    if here and version_of(of_backup) > here:
        raise stop(
            "The lab's MLflow is older than the one that wrote the backup; it couldn't open the database.",
            f"MLflow {of_backup} or newer",
            f"MLflow {wish.mlflow_version}",
            "name a newer image in lab.yaml (images: {mlflow: …}), converge, and run the command again",
        )


def needed_bytes(manifest: Mapping[str, Any], contents: Contents) -> int:
    """What a restore writes, roughly: the database as big as it was, every object under each of its names."""
    named = sum(one.size for one in contents.s3) + sum(entry.size for entry in contents.workspace)
    return int((int(manifest["postgres"]["bytes"]) + CLUSTER_BYTES + named) * (1 + MARGIN))


def _refuse_if_full(facts: VolumeFacts, manifest: Mapping[str, Any], contents: Contents) -> None:
    needed = needed_bytes(manifest, contents) - facts.written
    if needed > facts.free:
        raise stop(
            "The volume has too little room for the restore.",
            f"{needed / 1e6:,.0f} MB free",
            f"{facts.free / 1e6:,.0f} MB free",
            "labctl volume extend, then run the command again",
        )


def _secrets(facts: VolumeFacts, wish: Wish, manifest: Mapping[str, Any]) -> str:
    """Data beside other data gets the volume's secrets; an empty volume those of the backup, or new ones."""
    if facts.secrets and facts.holding:
        return "volume"
    if wish.new_secrets:
        return "new"
    wanted = str(manifest.get("key_id", ""))
    if wanted in wish.keys:
        return "backup"
    raise Failure(
        "The backup's passwords are encrypted, and the key isn't here.",
        kind="usage",
        expected=f"the key {wanted} (made with the lab's first backup, and kept on the machine that asked for it)",
        found=f"{', '.join(sorted(wish.keys)) or 'no key'}",
        next_step="--key-file FILE, or --new-secrets: all data comes back, with new passwords",
    )


def missing_objects(contents: Contents, stored: Mapping[str, Stored]) -> list[str]:
    """Hashes that a set names and the container doesn't have as they should be, by the container's listing."""
    return sorted(sha for sha, known in contents.objects.items() if sha not in stored or not stored[sha].fits(known))


def discard_refusal(path: str, data_dir: str, stack: Mapping[str, Any], record: Mapping[str, Any] | None) -> str:
    """Why a half-made directory must not be removed, or "". Only what an unserved restore of ours made may go."""
    relative = path[len(data_dir) :].strip("/") if path.startswith(data_dir.rstrip("/") + "/") else ""
    parts = relative.split("/")
    if len(parts) != 2 or not re.fullmatch(r"restored-[0-9A-Za-z-]+", parts[0]) or parts[1] in ("", ".", ".."):
        return "it isn't a part of a restore"
    if not record or record.get("served"):
        return "no record says that an unfinished restore made it"
    for key in ("postgres_dir", "s3_dir"):
        if str(stack.get(key, "")).split("/")[0] == parts[0]:
            return "the lab's services use it"
    return ""
