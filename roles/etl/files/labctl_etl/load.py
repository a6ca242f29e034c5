"""A load from its beginning to its end: what is there, what is new, when readers see it, what goes afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from labctl_etl import layouts, sources
from labctl_etl.errors import Failure, Refused
from labctl_etl.job import Job, locked
from labctl_etl.model import (
    CONTROL,
    FORMAT,
    INCOMING,
    MANIFEST,
    PACKED,
    PENDING,
    TABLES,
    Counts,
    Dataset,
    Row,
    Shard,
    dataset,
    pack_table,
    version_of,
)
from labctl_etl.rclone import RUN, running
from labctl_etl.rules import Sorter
from labctl_etl.store import Store, Stored

SETTINGS = "/etc/labctl/etl.json"
SCRATCH = sources.SPOOL
VIEW = "/usr/local/lib/labctl/object-view"
MOUNT_UNIT = "rclone-object.service"
#: Up to so many objects, an unchanged set is compared with a whole listing; of a larger one only a folder is looked at.
LIST_WHOLE = 900
#: Free memory, in bytes, from which on files wait there for being sent.
MEMORY = 256 << 20


@dataclass(frozen=True)
class Settings:
    """What the role wrote for the program. `shard_bytes`: of files in an image, the smallest."""

    dataset: dict[str, Any]
    container: str
    layout: str = "files"
    remote: str = "chi_tacc"
    rclone_config: str = "/etc/rclone/rclone.conf"
    shard_bytes: int = 256 << 20
    workers: int = 32
    described: Dataset = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "described", dataset(self.dataset))


def settings(path: str = SETTINGS) -> Settings:
    """The settings."""
    with open(path, encoding="utf-8") as handle:
        return Settings(**json.load(handle))


@dataclass
class Found:
    """What the container holds when a load begins."""

    control: dict[str, Stored]
    manifest: dict[str, Any] | None
    pending: dict[str, Any] | None


def load(here: Settings, job: Job, *, restart: bool = False) -> dict[str, Any]:
    """Load the set unless the container has it. `restart`: forget what a run that was cut off has sent."""
    with locked(), _scratch() as scratch, running(here.rclone_config, scratch) as rclone:
        store = Store(rclone, here.remote, here.container)
        job.step(f"look into {here.container}")
        control = store.control()
        found = Found(control, store.manifest(control), store.document(PENDING, control))
        if restart and found.pending is not None:
            found.pending = {}
        described, recipe = here.described, here.described.recipe(here.layout)
        job.step(f"extract, transform, load: {described.name} from {described.where}")

        def is_known(fingerprint: dict[str, Any]) -> bool:
            manifest = found.manifest
            if manifest is None or found.pending is not None or manifest.get("recipe") != recipe:
                return False
            return same_source(manifest["source"], fingerprint) and _whole(store, found)

        try:
            opened = open_source(described, store, is_known)
        except sources.Known:
            return _unchanged(found.manifest or {}, here)
        with contextlib.closing(opened) as source:
            fingerprint = source.fingerprint()
            if is_known(fingerprint):
                return _unchanged(found.manifest or {}, here)
            return _Load(here, job, store, found, scratch).run(source, fingerprint)


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    """A folder on the disk, empty at the beginning: nobody else is in it, for the lock is held."""
    os.makedirs(SCRATCH, mode=0o700, exist_ok=True)
    path = os.path.join(SCRATCH, "staging")
    shutil.rmtree(path, ignore_errors=True)
    os.mkdir(path, 0o700)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(os.path.join(RUN, "outgoing"), ignore_errors=True)


def outgoing(scratch: str) -> str:
    """Where files wait for being sent: memory, or the disk of a host that has hardly any. Emptied with the scratch."""
    memory = os.statvfs(RUN)
    if memory.f_bavail * memory.f_frsize < MEMORY:
        return tempfile.mkdtemp(prefix="outgoing-", dir=scratch)
    path = os.path.join(RUN, "outgoing")
    shutil.rmtree(path, ignore_errors=True)
    os.mkdir(path, 0o700)
    return path


def open_source(described: Dataset, store: Store, is_known: Callable[[dict[str, Any]], bool]) -> sources.Source:
    """The source, with all checked that can be before its content is read."""
    if described.folder:
        return sources.Folder(described)
    if described.prefix:
        fs, path = store.other(described.prefix)
        rows = store.rows(fs, path)
        below = [{**row, "Path": row["Path"][len(path) :].lstrip("/") if path else row["Path"]} for row in rows]
        outside = [row for row in below if row["Path"].split("/")[0] != CONTROL]
        return sources.Prefix(described, outside, lambda name: store.rclone.get(fs, f"{path}/{name}".lstrip("/")))
    return sources.archive(described, is_known)


def same_source(known: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a source is the one that was loaded, by what is known of it without reading it."""
    identity = identity_of(now)
    return bool(identity) and {key: known.get(key) for key in identity} == identity


def identity_of(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The strongest that is known of a source: its hash, its directory, or its server's word."""
    key = next((key for key in ("sha256", "index", "etag", "modified") if fingerprint.get(key)), "")
    return {"bytes": fingerprint.get("bytes"), key: fingerprint[key]} if key else {}


def _whole(store: Store, found: Found) -> bool:
    """Whether the container still has what the manifest says, as far as a few requests tell."""
    manifest = found.manifest
    assert manifest is not None
    if manifest["table"] not in found.control:
        return False
    if manifest["layout"] == "packed":
        shards = [Row(one["object"], one["bytes"], one["sha256"], one["md5"]) for one in manifest["shards"]]
        return not layouts.unmatched(shards, found.control)
    rows = store.table(manifest["table"])
    if len(rows) <= LIST_WHOLE:
        return not layouts.unmatched(rows, store.listing())
    folder = os.path.dirname(rows[uuid.uuid4().int % len(rows)].path)
    part = [row for row in rows if os.path.dirname(row.path) == folder]
    return not layouts.unmatched(part, store.listing(folder))


def _unchanged(manifest: Mapping[str, Any], here: Settings) -> dict[str, Any]:
    return {**_told(manifest), "changed": False, "sent": 0, "sent_bytes": 0, "container": here.container}


def _told(manifest: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("dataset", "layout", "version", "images", "bytes", "counts", "classes", "splits", "source")
    return {**{key: manifest[key] for key in keys}, "shards": len(manifest["shards"])}


class _Load:
    """One load that has something to do."""

    def __init__(self, here: Settings, job: Job, store: Store, found: Found, scratch: str) -> None:
        self.here, self.job, self.store, self.found, self.scratch = here, job, store, found, scratch

    def run(self, source: sources.Source, fingerprint: dict[str, Any]) -> dict[str, Any]:
        """Read, send, prove, show, clean up."""
        described = self.here.described
        sorter = Sorter(described, source.names)
        if sorter.needs_labels:
            self._read_labels(source, sorter)
        places = self._plan(source, sorter)
        self.load_id = self._id(fingerprint)
        layout = self._layout()
        self._announce(layout.known.values())
        try:
            counts = self._read(source, sorter, places, layout)
            layout.finish()
            sha256 = self._prove_source(source)
            self._prove(layout)
        except Failure as failure:
            if isinstance(failure, Refused) or failure.kind == "safety_stop":
                layout.abort()
                self._forget()
            else:
                layout.stop()
            raise
        except BaseException:
            layout.stop()
            raise
        return self._commit(layout, counts, sorter, {**fingerprint, "sha256": sha256, "bytes": source.position()})

    def _read_labels(self, source: sources.Source, sorter: Sorter) -> None:
        data = source.peek(self.here.described.labels_entry)
        if data is None:
            raise Failure(
                "The labels of a tar must be known before it is read.", kind="usage",
                next_step="put the CSV beside lab.yaml and name it: dataset: {labels: FILE}",
            )  # fmt: skip
        sorter.labels(data.decode("utf-8-sig", "replace"))

    def _plan(self, source: sources.Source, sorter: Sorter) -> dict[str, tuple[str, int, str] | None] | None:
        """Every entry's place, where the names are known: what is wrong with one stops the load before it begins."""
        if source.names is None:
            return None
        places = {name: sorter.place(name) for name in source.names}
        images = sum(place is not None for place in places.values())
        if not images:
            raise _no_images(source)
        for stage in ("transform", "load"):
            self.job.stages[stage].total_images = images
        return places

    def _id(self, fingerprint: Mapping[str, Any]) -> str:
        """The same for the same source and recipe, so that a load that was cut off is found again."""
        identity = identity_of(fingerprint)
        if not identity:
            return uuid.uuid4().hex[:16]
        parts = [self.here.described.recipe(self.here.layout), self.here.shard_bytes, sorted(identity.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _layout(self) -> Any:
        pending = self.found.pending
        if self.here.layout == "packed":
            prefix = f"{PACKED}/{self.load_id}/"
            committed = (self.found.manifest or {}).get("shards", [])
            known = layouts.known_shards([*committed, *(pending or {}).get("shards", [])], prefix, self.found.control)
            keep = {shard["object"] for shard in committed}
            return layouts.Packed(
                self.store, self.job, prefix=prefix, known=known, keep=keep,
                shard_bytes=self.here.shard_bytes, scratch=self.scratch, announce=self._announce,
            )  # fmt: skip
        before = {path: one for path, one in self.store.listing().items() if not path.startswith(f"{CONTROL}/")}
        begun = {row.path: row for row in self._begun() if layouts.has(before, row)}
        return layouts.Files(
            self.store, self.job, load_id=self.load_id, journals=layouts.next_journal(self.load_id, self.found.control),
            before=before, committed=self._committed(), begun=begun, workers=self.here.workers, scratch=self.scratch,
            outgoing=outgoing(self.scratch),
        )  # fmt: skip

    def _committed(self) -> dict[str, Row]:
        """The rows of the load that readers see, where its files are objects."""
        manifest = self.found.manifest
        if manifest is None or manifest["layout"] != "files":
            return {}
        return {row.path: row for row in self.store.table(manifest["table"])}

    def _begun(self) -> list[Row]:
        """What loads that were cut off have announced."""
        names = [name for name in self.found.control if name.startswith(f"{TABLES}/pending-")]
        rows = [row for name in names for row in self.store.table(name)]
        if self.found.pending is None and rows:
            self.job.note("The container has traces of an unfinished load; they are cleaned up.")
        return rows

    def _announce(self, shards: Iterable[Shard]) -> None:
        """Say in the container that a load is under way, and which images of it are there."""
        described = self.here.described
        self.store.put_json(PENDING, {
            "format": FORMAT, "dataset": described.name, "layout": self.here.layout, "load": self.load_id,
            "recipe": described.recipe(self.here.layout), "source": {"url": described.where},
            "table": f"{TABLES}/pending-{self.load_id}-*.jsonl.gz", "shards": [asdict(shard) for shard in shards],
        })  # fmt: skip

    def _read(self, source: sources.Source, sorter: Sorter, places: Any, layout: layouts.Layout) -> Counts:
        """Every entry, once: from the source through its hashes into the layout."""
        counts = Counts(len(sorter.classes))
        extract, transform = self.job.stages["extract"], self.job.stages["transform"]
        extract.total_bytes = source.total
        for entry in source.entries():
            place = places[entry.name] if places is not None else sorter.place(entry.name)
            if place is None:
                counts.left_out += 1
            else:
                split, number, path = place
                layout.add(entry, path)
                counts.add(split, number, entry.size)
                transform.add(entry.size)
            extract.add(source.position() - extract.bytes, 1 if place else 0)
        if not counts.images:
            raise _no_images(source)
        return counts

    def _prove_source(self, source: sources.Source) -> str:
        """Its SHA-256. Refused if the description says another."""
        sha256 = source.sha256()
        wanted = self.here.described.sha256
        if wanted and sha256 != wanted:
            raise source.refuse(f"its SHA-256 is {sha256}, and the dataset's description says {wanted}")
        self.job.stages["extract"].add(source.position() - self.job.stages["extract"].bytes, 0)
        return sha256

    def _prove(self, layout: Any) -> None:
        """The store has every byte, by its own listing."""
        self.job.step("compare with the store's listing")
        if self.here.layout == "packed":
            rows = [Row(one.object, one.bytes, one.sha256, one.md5) for one in layout.shards]
            self.listing = self.store.listing(CONTROL)
        else:
            rows = layout.rows
            self.listing = self.store.listing()
            moved = {target: source for source, target in layout.moves}
            rows = [Row(moved.get(row.path, row.path), row.size, row.sha256, row.md5) for row in rows]
        if wrong := layouts.unmatched(rows, self.listing):
            raise Failure(
                f"{len(wrong)} objects aren't in {self.here.container} as they were sent, {wrong[0]} for one."
                " Readers still see what they saw.",
                next_step="labctl etl again: it sends them again",
            )

    def _commit(self, layout: Any, counts: Counts, sorter: Sorter, source: dict[str, Any]) -> dict[str, Any]:
        """Show the load to readers, then remove what it replaces."""
        here, version = self.here, version_of(layout.rows)
        table = f"{TABLES}/{version}.jsonl.gz"
        old = self.found.manifest
        before = replaced(old, table, self.found.control)
        old_rows = {row.path: row for name in before for row in self.store.table(name)}
        shards = [asdict(shard) for shard in layout.shards] if here.layout == "packed" else []
        manifest = {
            "format": FORMAT, "dataset": here.described.name, "layout": here.layout, "version": version,
            "classes": list(sorter.classes), "splits": list(counts.by_split), "counts": counts.by_split,
            "images": counts.images, "bytes": counts.bytes,
            "source": {"url": here.described.where, **source}, "table": table, "shards": shards,
            "recipe": here.described.recipe(here.layout), "superseded": superseded(old, shards),
            "replaced": before,
        }  # fmt: skip
        self.job.step(f"show version {version} to readers")
        self.store.put(table, pack_table(layout.rows))
        if here.layout == "files":
            layout.publish()
        self.store.put_json(MANIFEST, manifest)
        self.store.remove([PENDING])
        in_use = refresh_view(self.job)
        self._clean(manifest, old_rows, layout, in_use)
        return {
            **_told(manifest), "changed": True, "sent": layout.sent, "sent_bytes": layout.sent_bytes,
            "left_out": counts.left_out, "container": here.container,
        }  # fmt: skip

    def _clean(
        self, manifest: dict[str, Any], old_rows: Mapping[str, Row], layout: Any, in_use: set[str] | None
    ) -> None:
        """Remove what nothing names any more: replaced files by the old tables, and then our own folder's leftovers."""
        self.job.step("remove what was replaced")
        wanted = {row.path for row in layout.rows} if self.here.layout == "files" else set()
        gone = {
            row.path: row for row in [*old_rows.values(), *self._begun()] if row.path not in wanted and not row.kept
        }
        if gone:
            there = self.store.listing()
            for path, row in gone.items():
                if path in there and not layouts.has(there, row):
                    self.job.note(f"{path} isn't what labctl loaded any more, so it stays.")
            # before the tables that name them: as long as one is left, it is known whose it is, and hidden from readers
            self.store.remove([path for path, row in gone.items() if layouts.has(there, row)])
        kept = {MANIFEST, manifest["table"], *(shard["object"] for shard in manifest["shards"])}
        if in_use is None:
            kept |= set(manifest["superseded"])
        else:
            kept |= set(manifest["superseded"]) & in_use
        own = (f"{PACKED}/", f"{TABLES}/", f"{INCOMING}/")
        self.store.remove([path for path in self.store.control() if path.startswith(own) and path not in kept])

    def _forget(self) -> None:
        """After a refused source: no trace of this load."""
        control = self.store.control()
        names = (f"{TABLES}/pending-", f"{INCOMING}/{self.load_id}/")
        self.store.remove([path for path in control if path.startswith(names)])
        self.store.remove([PENDING])


def replaced(old: Mapping[str, Any] | None, table: str, control: Mapping[str, Any]) -> list[str]:
    """Tables of loads of files that this one replaces: the one before, and those that it didn't come to remove."""
    tables = list((old or {}).get("replaced", []))
    if old and old["layout"] == "files":
        tables.append(old["table"])
    return [name for name in dict.fromkeys(tables) if name != table and name in control]


def superseded(old: Mapping[str, Any] | None, shards: list[dict[str, Any]]) -> list[str]:
    """Images of the load that is replaced: a reader may still have them open, so they go one load later."""
    current = {shard["object"] for shard in shards}
    return [shard["object"] for shard in (old or {}).get("shards", []) if shard["object"] not in current]


def refresh_view(job: Job) -> set[str] | None:
    """Let the host's mount show the committed load. Returns the images still in use, None where nobody knows."""
    if os.path.exists(VIEW):
        done = subprocess.run([VIEW, "refresh"], capture_output=True, text=True, check=False)
        if done.returncode:
            job.note(f"The mount doesn't show it yet: {(done.stderr or done.stdout).strip()[-300:]}")
            return None
        try:
            found = json.loads(done.stdout)
            return set(found["in_use"])
        except (ValueError, KeyError, TypeError):
            return None
    subprocess.run(["systemctl", "try-reload-or-restart", MOUNT_UNIT], capture_output=True, check=False)
    return None


def _no_images(source: sources.Source) -> Refused:
    described = source.described
    rule = {"prefix": "named <class>_<name>", "folder": "in a folder of its class", "csv": "in its list of labels"}
    return source.refuse(
        f"it has no image {rule[described.rule]} in any of {', '.join(described.splits) or 'its folders'}"
    )
