"""A load from its beginning to its end: what is there, what is new, when readers see it, what goes afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from labctl_etl import archives, layouts, sources
from labctl_etl.job import Job, locked
from labctl_etl.layouts import Loaded, identity_of
from labctl_etl.lease import LEASES, Lease, host_id
from labctl_etl.model import (
    CONTROL,
    FORMAT,
    INCOMING,
    MANIFEST,
    PACKED,
    PARTS,
    PENDING,
    TABLES,
    Counts,
    Dataset,
    Refused,
    Row,
    Shard,
    dataset,
    pack_table,
    version_of,
)
from labctl_etl.rclone import RUN, running
from labctl_etl.rules import Sorter
from labctl_etl.store import Store, Stored
from labctl_job.errors import Failure

SETTINGS = "/etc/labctl/etl.json"
SCRATCH = archives.SPOOL
VIEW = "/usr/local/lib/labctl/object-view"
MOUNT_UNIT = "rclone-object.service"
#: Up to so many objects, an unchanged set is compared with a whole listing; of a larger one only a folder is looked at.
LIST_WHOLE = 900
#: Free memory, in bytes, from which on files wait there for being sent.
MEMORY = 256 << 20
#: Files that are moved to their place at the same time.
MOVERS = 16


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

    @property
    def leftovers(self) -> bool:
        """Whether the load that readers see replaced something that wasn't removed yet."""
        tables = {name for name in self.control if name.startswith(f"{TABLES}/pending-")}
        return bool(self.manifest and (tables or set(self.manifest.get("replaced", [])) & self.control.keys()))


def load(
    here: Settings, job: Job, *, restart: bool = False, first: float = 0, commit: bool = True
) -> dict[str, Any]:  # fmt: skip
    """Load the set unless the container has it. `restart`: forget what a run that was cut off has sent.

    Of a list of archives, several hosts may load at the same time: each begins at its own place (`first`, 0 to 1), and
    all but one without `commit`.
    """
    with locked(), _scratch() as scratch, running(here.rclone_config, scratch) as rclone:
        store = Store(rclone, here.remote, here.container)
        job.step(f"look into {here.container}")
        control = store.control()
        found = Found(control, store.manifest(control), store.document(PENDING, control))
        if found.pending is None and found.leftovers:
            # of a load that was shown, and cut off while it removed what it replaced
            SingleLoad(here, job, store, found, scratch).finish_cleaning()
            found = Found(store.control(), found.manifest, None)
        if restart and found.pending is not None:
            found.pending = {}
        described, recipe = here.described, here.described.recipe(here.layout)
        job.step(f"extract, transform, load: {described.name} from {described.where}")

        def is_known(fingerprint: dict[str, Any]) -> bool:
            manifest = found.manifest
            if manifest is None or found.pending is not None or manifest.get("recipe") != recipe:
                return False
            return same_source(manifest["source"], fingerprint) and _whole(store, found)

        if described.urls:
            from labctl_etl import spread

            return spread.load(here, job, store, found, scratch, first=first, commit=commit, is_known=is_known)
        if not commit:
            return {"changed": False, "parts": 0, "container": here.container}
        try:
            opened = open_source(described, store, is_known)
        except archives.Known:
            return unchanged(found.manifest or {}, here)
        with contextlib.closing(opened) as source:
            fingerprint = source.fingerprint()
            if is_known(fingerprint):
                return unchanged(found.manifest or {}, here)
            return SingleLoad(here, job, store, found, scratch).run(source, fingerprint)


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
    return archives.archive(described, is_known)


def same_source(known: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a source is the one that was loaded, by what is known of it without reading it."""
    identity = identity_of(now)
    return bool(identity) and {key: known.get(key) for key in identity} == identity


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


def unchanged(manifest: Mapping[str, Any], here: Settings) -> dict[str, Any]:
    """The answer where there was nothing to do."""
    return {**_told(manifest), "changed": False, "sent": 0, "sent_bytes": 0, "container": here.container}


def _told(manifest: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("dataset", "layout", "version", "images", "bytes", "counts", "classes", "splits", "source")
    return {**{key: manifest[key] for key in keys}, "shards": len(manifest["shards"])}


def known_by(store: Store, holder: str) -> Lease:
    """The container's lease: one load at a time works in it, of one host or of several that load the same list."""
    lease = Lease(store, "load", holder)
    if not lease.take(wait=True, settle=holder.startswith("load ")):
        raise AssertionError("waiting ends with the lease")
    return lease


class SingleLoad:
    """A load of one source that has something to do; `part` (load, number): it is one of a list."""

    def __init__(
        self, here: Settings, job: Job, store: Store, found: Found, scratch: str, *,
        described: Dataset | None = None, part: tuple[str, int] | None = None, check: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self.here, self.job, self.store, self.found, self.scratch = here, job, store, found, scratch
        self.described, self.part, self._check = described or here.described, part, check or (lambda: None)
        self.load_id = "" if part is None else f"{part[0]}-{part[1]:04d}"

    def run(self, source: sources.Source, fingerprint: dict[str, Any]) -> dict[str, Any]:
        """Read, send, prove, show, clean up."""
        lease = known_by(self.store, host_id(os.path.dirname(archives.SPOOL)))
        self._check = lease.check
        try:
            self.load_id = self.id_of(fingerprint)
            return self.conclude(self.fill(source, fingerprint))
        except Refused:
            self.forget()
            raise
        except Failure as failure:
            if failure.kind == "safety_stop":
                self.forget()
            raise
        finally:
            lease.release()

    def fill(self, source: sources.Source, fingerprint: dict[str, Any]) -> Loaded:
        """Send all of the source that isn't there. What was sent is taken back where the source is refused."""
        sorter = Sorter(self.described, source.names)
        if sorter.needs_labels:
            self._read_labels(source, sorter)
        places = self._plan(source, sorter)
        layout = self._layout()
        self.announce(layout.known.values())
        try:
            counts = self._read(source, sorter, places, layout)
            layout.finish()
            sha256 = self._prove_source(source)
        except Failure as failure:
            if isinstance(failure, Refused) or failure.kind == "safety_stop":
                layout.abort()
            else:
                layout.stop()
            raise
        except BaseException:
            layout.stop()
            raise
        known = {**fingerprint, "sha256": sha256, "bytes": source.position()}
        return Loaded(layout.rows, layout.shards, layout.moves, counts, tuple(sorter.classes), known,
                      layout.sent, layout.sent_bytes)  # fmt: skip

    def _read_labels(self, source: sources.Source, sorter: Sorter) -> None:
        data = source.peek(self.described.labels_entry)
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

    def id_of(self, fingerprint: Mapping[str, Any]) -> str:
        """The same for the same source and recipe, so that a load that was cut off is found again."""
        identity = identity_of(fingerprint)
        if not identity:
            return uuid.uuid4().hex[:16]
        parts = [self.here.described.recipe(self.here.layout), self.here.shard_bytes, sorted(identity.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _layout(self) -> Any:
        pending = self.found.pending
        if self.here.layout == "packed":
            prefix = f"{PACKED}/{self.part[0]}/{self.part[1]:04d}-" if self.part else f"{PACKED}/{self.load_id}/"
            committed = (self.found.manifest or {}).get("shards", [])
            begun = (self._announced_shards() if self.part else pending) or {}
            known = layouts.known_shards([*committed, *begun.get("shards", [])], prefix, self.found.control)
            keep = {shard["object"] for shard in committed}
            return layouts.Packed(
                self.store, self.job, prefix=prefix, known=known, keep=keep,
                shard_bytes=self.here.shard_bytes, scratch=self.scratch, announce=self.announce,
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
        names = [name for name in self.found.control if re.match(rf"{TABLES}/pending-.*\.jsonl\.gz$", name)]
        rows = [row for name in names for row in self.store.table(name)]
        if self.found.pending is None and rows:
            self.job.note("The container has traces of an unfinished load; they are cleaned up.")
        return rows

    def _shards_path(self) -> str:
        load, number = self.part or ("", 0)
        return f"{PARTS}/{load}/{number:04d}-shards.json"

    def _announced_shards(self) -> dict[str, Any]:
        """What a run that was cut off says of this part's images."""
        path = self._shards_path()
        with contextlib.suppress(ValueError):
            return dict(json.loads(self.store.get(path) or b"{}")) if path in self.found.control else {}
        return {}

    def announce(self, shards: Iterable[Shard]) -> None:
        """Say in the container that a load is under way, and which images of it are there; of a part, beside that."""
        self._check()
        described, sent = self.here.described, [asdict(shard) for shard in shards]
        if self.part is not None:
            if sent:
                self.store.put_json(self._shards_path(), {"shards": sent})
            return
        self.store.put_json(PENDING, {
            "format": FORMAT, "dataset": described.name, "layout": self.here.layout, "load": self.load_id,
            "recipe": described.recipe(self.here.layout), "source": {"url": described.where},
            "table": f"{TABLES}/pending-{self.load_id}-*.jsonl.gz", "shards": sent,
        })  # fmt: skip

    def _read(self, source: sources.Source, sorter: Sorter, places: Any, layout: layouts.Layout) -> Counts:
        """Every entry, once: from the source through its hashes into the layout."""
        counts = Counts(len(sorter.classes))
        extract, transform = self.job.stages["extract"], self.job.stages["transform"]
        extract.total_bytes = source.total
        for entry in source.entries():
            self._check()
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
        wanted = self.described.sha256
        if wanted and sha256 != wanted:
            raise source.refuse(f"its SHA-256 is {sha256}, and the dataset's description says {wanted}")
        self.job.stages["extract"].add(source.position() - self.job.stages["extract"].bytes, 0)
        return sha256

    def _prove(self, loaded: Loaded) -> None:
        """The store has every byte, by its own listing."""
        self.job.step("compare with the store's listing")
        if self.here.layout == "packed":
            rows = [Row(one.object, one.bytes, one.sha256, one.md5) for one in loaded.shards]
            listing = self.store.listing(CONTROL)
        else:
            listing = self.store.listing()
            # what was moved to its place by a run that was killed then isn't to be moved any more
            moved = {target: source for source, target in loaded.moves if source in listing}
            rows = [Row(moved.get(row.path, row.path), row.size, row.sha256, row.md5) for row in loaded.rows]
        if wrong := layouts.unmatched(rows, listing):
            raise Failure(
                f"{len(wrong)} objects aren't in {self.here.container} as they were sent, {wrong[0]} for one."
                " Readers still see what they saw.",
                next_step="labctl etl again: it sends them again",
            )

    def conclude(self, loaded: Loaded) -> dict[str, Any]:
        """Prove the load, show it to readers, then remove what it replaces."""
        self._prove(loaded)
        here, version, counts = self.here, version_of(loaded.rows), loaded.counts
        table = f"{TABLES}/{version}.jsonl.gz"
        old = self.found.manifest
        before = replaced(old, table, self.found.control)
        old_rows = {row.path: row for name in before for row in self.store.table(name)}
        shards = [asdict(shard) for shard in loaded.shards]
        manifest = {
            "format": FORMAT, "dataset": here.described.name, "layout": here.layout, "version": version,
            "classes": list(loaded.classes), "splits": list(counts.by_split), "counts": counts.by_split,
            "images": counts.images, "bytes": counts.bytes,
            "source": {"url": here.described.where, **loaded.source}, "table": table, "shards": shards,
            "recipe": here.described.recipe(here.layout), "superseded": superseded(old, shards), "load": self.load_id,
            "replaced": before,
        }  # fmt: skip
        self.job.step(f"show version {version} to readers")
        self.store.put(table, pack_table(loaded.rows))
        self._publish(loaded.moves)
        self.store.put_json(MANIFEST, manifest)
        # what is shown needs no announcement, and the mount would look for what of it isn't shown
        mine = [path for path in self.store.control() if path.startswith(f"{TABLES}/pending-{self.load_id}-")]
        self.store.remove([PENDING, *mine])
        self.found.control = {path: one for path, one in self.found.control.items() if path not in mine}
        self._clean(manifest, loaded.rows, old_rows, refresh_view(self.job))
        return {
            **_told(manifest), "changed": True, "sent": loaded.sent, "sent_bytes": loaded.sent_bytes,
            "left_out": counts.left_out, "container": here.container,
        }  # fmt: skip

    def _publish(self, moves: Iterable[tuple[str, str]]) -> None:
        """Put what replaces committed files in their place."""
        with ThreadPoolExecutor(MOVERS) as pool:
            list(pool.map(lambda move: self.store.move(*move), moves))

    def finish_cleaning(self) -> None:
        """What a load that was cut off after it was shown still had to remove."""
        manifest = self.found.manifest or {}
        tables = [name for name in manifest.get("replaced", []) if name in self.found.control]
        old = {row.path: row for name in tables for row in self.store.table(name)}
        self._clean(manifest, self.store.table(manifest["table"]), old, refresh_view(self.job))

    def _clean(
        self, manifest: dict[str, Any], rows: Iterable[Row], old_rows: Mapping[str, Row], in_use: set[str] | None
    ) -> None:
        """Remove what nothing names any more: replaced files by the old tables, then our own leftovers."""
        self.job.step("remove what was replaced")
        wanted = {row.path for row in rows} if manifest["layout"] == "files" else set()
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
        own = (f"{PACKED}/", f"{TABLES}/", f"{INCOMING}/", f"{PARTS}/", f"{LEASES}/{manifest.get('load', '-')}-")
        self.store.remove(path for path in self.store.control() if path.startswith(own) and path not in kept)

    def forget(self) -> None:
        """After a refused source: no trace of this load."""
        control = self.store.control()
        names = (f"{TABLES}/pending-", f"{INCOMING}/{self.load_id}", f"{PARTS}/{self.load_id}/")
        self.store.remove([PENDING, *(path for path in control if path.startswith(names))])

    def withdraw(self) -> None:
        """Of a list of which one archive was refused: take back what all hosts have sent, then all traces of it."""
        self.found.control = self.store.control()
        committed = {shard["object"] for shard in (self.found.manifest or {}).get("shards", [])}
        shown, there = self._committed(), self.store.listing()
        begun = [row.path for row in self._begun() if row.path not in shown and layouts.has(there, row)]
        images = [path for path in there if path.startswith(f"{PACKED}/{self.load_id}/") and path not in committed]
        self.store.remove([*begun, *images])
        self.forget()


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
