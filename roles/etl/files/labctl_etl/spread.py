"""A list of archives: each is loaded once, by one host or by several at the same time, and all are shown together.

The store is all that the hosts share. A host takes a part that nobody has (a lease), loads it, and writes what it was
into the part's record. The host that commits loads whatever is left, that of a host that died too, and then writes the
one manifest. A run after a cut finds the records, and does only what has none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from labctl_etl import archives
from labctl_etl.job import Job
from labctl_etl.layouts import Loaded, identity_of
from labctl_etl.lease import Lease, host_id
from labctl_etl.load import Found, Settings, SingleLoad, known_by, open_source, unchanged
from labctl_etl.model import PARTS, Counts, Dataset, Refused, Row, Shard, pack_table
from labctl_etl.store import Store
from labctl_job.errors import Failure


class Parts:
    """The list, what is known of each archive, and which have been loaded."""

    def __init__(self, here: Settings, job: Job, store: Store, found: Found, scratch: str) -> None:
        self.here, self.job, self.store, self.found, self.scratch = here, job, store, found, scratch
        self.parts = here.described.parts
        self.identities = [self._identity(part) for part in self.parts]
        known = sum(int(one.get("bytes") or 0) for one in self.identities)
        digest = hashlib.sha256(json.dumps(self.identities, sort_keys=True).encode()).hexdigest()
        self.fingerprint = {"bytes": known, "index": digest}
        self.whole = SingleLoad(here, job, store, found, scratch)
        self.load_id = self.whole.load_id = self.whole.id_of(self.fingerprint)
        self.host = host_id(os.path.dirname(archives.SPOOL))
        self.mine = 0

    def _identity(self, part: Dataset) -> dict[str, Any]:
        with contextlib.closing(open_source(part, self.store, lambda _: False)) as source:
            found = identity_of(source.fingerprint())
        if not found:
            raise Failure(
                f"Nothing tells one version of {part.where} from another, so it can't be one of a list.", kind="usage",
                expected="a server that sends ETag or Last-Modified, or the archives' hashes",
                next_step="dataset: {sha256: [one for each url]} in lab.yaml",
            )  # fmt: skip
        return found

    def _record(self, number: int) -> str:
        return f"{PARTS}/{self.load_id}/{number:04d}.json"

    def _is_done(self, number: int) -> bool:
        return self.store.get(self._record(number)) is not None

    def work(self, first: int) -> int:
        """Load every part that nobody has, from `first` on. Returns how many this host has loaded."""
        for step in range(len(self.parts)):
            number = (first + step) % len(self.parts)
            if not self._is_done(number):
                self._part(number, wait=False)
        return self.mine

    def rest(self) -> None:
        """Wait for what others have under way, and load what they left."""
        for number in range(len(self.parts)):
            while not self._is_done(number):
                self._part(number, wait=True)

    def _part(self, number: int, *, wait: bool) -> None:
        lease = Lease(self.store, f"{self.load_id}-{number:04d}", self.host)
        self.job.step(f"extract, transform, load: part {number + 1} of {len(self.parts)}")
        if not lease.take(wait=wait):
            return
        try:
            if self._is_done(number):
                return
            with contextlib.closing(open_source(self.parts[number], self.store, lambda _: False)) as source:
                identity = identity_of(source.fingerprint())
                if identity != self.identities[number]:
                    raise Failure(f"{self.parts[number].where} changed while it was loaded.", next_step="labctl etl")
                loaded = SingleLoad(
                    self.here, self.job, self.store, self.found, self.scratch,
                    described=self.parts[number], part=(self.load_id, number), check=lease.check,
                ).fill(source, source.fingerprint())  # fmt: skip
            lease.check()
            self._write(number, loaded)
            self.mine += 1
        finally:
            lease.release()

    def _write(self, number: int, loaded: Loaded) -> None:
        record = self._record(number)
        self.store.put(f"{record[:-5]}.jsonl.gz", pack_table(loaded.rows))
        self.store.put_json(record, {
            "source": loaded.source, "left_out": loaded.counts.left_out, "by_split": loaded.counts.by_split,
            "classes": list(loaded.classes), "moves": loaded.moves, "shards": [asdict(one) for one in loaded.shards],
        })  # fmt: skip

    def gather(self) -> Loaded:
        """All parts as one load. Refused where two of them have a file of the same path."""
        rows: dict[str, Row] = {}
        whole = Loaded([], [], [], Counts(0), (), {}, 0, 0)
        digests = []
        for number, part in enumerate(self.parts):
            record = json.loads(self.store.get(self._record(number)) or b"{}")
            found = self.store.table(f"{self._record(number)[:-5]}.jsonl.gz")
            if both := next((row.path for row in found if row.path in rows), ""):
                raise Refused(part.where, f"the file {both} is in another archive of the list, too")
            rows |= {row.path: row for row in found}
            whole.shards += [Shard(**one) for one in record["shards"]]
            whole.moves += [(source, target) for source, target in record["moves"]]
            whole.classes = tuple(record["classes"])
            whole.counts.merge(len(whole.classes), record["by_split"], record["left_out"])
            digests.append(record["source"]["sha256"])
        whole.rows = list(rows.values())
        whole.counts.bytes = sum(row.size for row in whole.rows)
        # of a list: over the archives' own
        total = hashlib.sha256("".join(f"{one}\n" for one in digests).encode()).hexdigest()
        whole.source = {**self.fingerprint, "sha256": total, "parts": digests}
        return whole


def load(
    here: Settings, job: Job, store: Store, found: Found, scratch: str, *, first: float, commit: bool,
    is_known: Callable[[dict[str, Any]], bool],
) -> dict[str, Any]:  # fmt: skip
    """Load a list. Without `commit` only what nobody else has, beginning at that share of the list (0 to 1)."""
    if here.described.rule == "folder" and not here.described.classes:
        raise Failure("The classes of a list of archives must be named.", kind="usage",
                      next_step="dataset: {classes: [a, b, …]} in lab.yaml")  # fmt: skip
    parts = Parts(here, job, store, found, scratch)
    if is_known(parts.fingerprint):
        return unchanged(found.manifest or {}, here)
    lease = known_by(store, f"load {parts.load_id}")
    try:
        if found.pending is None or found.pending.get("load") != parts.load_id:
            parts.whole.announce([])
        mine = parts.work(int(first * len(parts.parts)))
        if not commit:
            return {"changed": mine > 0, "parts": mine, "container": here.container}
        parts.rest()
        loaded = parts.gather()
        loaded.sent = mine
        return {**parts.whole.conclude(loaded), "parts": mine}
    except Refused:
        if commit:
            parts.whole.withdraw()
        raise
    finally:
        (lease.release if commit else lease.leave)()
