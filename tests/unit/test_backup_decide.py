"""What would be lost if a decision about backups were wrong: a needed object, a whole set, the data on a volume."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROLES = Path(__file__).parents[2] / "roles"
sys.path[:0] = [str(ROLES / folder) for folder in ("backup/files", "common/files", "mlflow_stack/module_utils")]

from labctl_backup import decide, model  # noqa: E402
from labctl_backup.decide import BackupSet, VolumeFacts, Wish  # noqa: E402
from labctl_backup.model import Contents, Damaged, S3Object, Stored, WorkspaceEntry  # noqa: E402
from labctl_job.errors import Failure  # noqa: E402

A, B, C = "a" * 64, "b" * 64, "c" * 64
DAY = 24 * 3600
NOW = model.set_time("20261122T120000Z-000000")
FILES = {model.DUMP: {"size": 10, "sha256": A}, model.CONTENTS: {"size": 20, "sha256": B}}
GIB = 1 << 30


def manifest(set_id: str, **changes: Any) -> dict[str, Any]:
    """A whole manifest."""
    base = {
        "format": 1,
        "id": set_id,
        "lab": "ada",
        "postgres": {"major": "17", "version": "17.6", "bytes": 1000},
        "mlflow": {"version": "3.17.2", "schema": "abc"},
        "key_id": "k1",
        "files": FILES,
    }
    return model.sealed({**base, **changes})


def stored_set(set_id: str) -> tuple[dict[str, int], bytes]:
    """Names with sizes, and the manifest's bytes, as the container gives them."""
    return {model.DUMP: 10, model.CONTENTS: 20, model.MANIFEST: 1}, json.dumps(manifest(set_id)).encode()


def an_id(hours_ago: float, tail: str = "000000") -> str:
    """A set's id that many hours before NOW."""
    return model.new_set_id(NOW - hours_ago * 3600)[:-6] + tail


# -- what counts as complete ---------------------------------------------------------------------------------------


def test_a_whole_set_is_complete() -> None:
    set_id = an_id(1)
    names, data = stored_set(set_id)
    (found,) = decide.classify({set_id: names}, {set_id: data})
    assert found.complete
    assert not found.damaged


def test_a_set_without_a_manifest_is_never_complete() -> None:
    set_id = an_id(1)
    names, _ = stored_set(set_id)
    del names[model.MANIFEST]
    (found,) = decide.classify({set_id: names}, {})
    assert not found.complete
    assert not found.damaged
    assert "cut off" in found.problem


@pytest.mark.parametrize("at", range(0, 400, 7))
def test_a_manifest_with_any_byte_changed_is_damaged(at: int) -> None:
    set_id = an_id(1)
    names, data = stored_set(set_id)
    changed = bytearray(data)
    changed[at % len(data)] ^= 1
    (found,) = decide.classify({set_id: names}, {set_id: bytes(changed)})
    assert not found.complete
    assert found.damaged


@pytest.mark.parametrize("size", [None, 9, 0])
def test_a_set_that_lost_a_file_or_a_part_of_it_is_damaged(size: int | None) -> None:
    set_id = an_id(1)
    names, data = stored_set(set_id)
    del names[model.DUMP]
    if size is not None:
        names[model.DUMP] = size
    (found,) = decide.classify({set_id: names}, {set_id: data})
    assert not found.complete
    assert found.damaged
    assert model.DUMP in found.problem


def test_another_sets_manifest_is_damage() -> None:
    one, other = an_id(1), an_id(2)
    names, _ = stored_set(one)
    (found,) = decide.classify({one: names}, {one: stored_set(other)[1]})
    assert found.damaged


def test_what_is_not_named_like_a_set_is_nobodys_business() -> None:
    assert decide.classify({"notes": {model.MANIFEST: 1}, "20261122T120000Z": {}}, {}) == []


# -- what may go ---------------------------------------------------------------------------------------------------


def complete(hours_ago: float) -> BackupSet:
    set_id = an_id(hours_ago)
    return BackupSet(set_id, manifest(set_id))


def cut_off(hours_ago: float) -> BackupSet:
    return BackupSet(an_id(hours_ago, "111111"), problem="cut off")


def damaged(hours_ago: float) -> BackupSet:
    return BackupSet(an_id(hours_ago, "222222"), problem="damaged", damaged=True)


@pytest.mark.parametrize(
    ("sets", "keep", "doomed"),
    [
        ([], 1, []),
        ([complete(1)], 1, []),
        ([complete(1), complete(2)], 1, [1]),
        ([complete(2), complete(1)], 1, [0]),  # whatever their order
        ([complete(1), complete(2), complete(3)], 2, [2]),
        ([complete(1), complete(2)], 0, []),  # without --keep nothing goes
        ([complete(1), complete(2)], -1, []),
        ([complete(1), cut_off(23)], 1, []),  # may be one that is being made
        ([complete(1), cut_off(25)], 1, [1]),
        ([cut_off(1), complete(2)], 1, []),  # a cut-off set doesn't count as one that is kept
        ([complete(1), damaged(500)], 1, []),  # a person has to look at it
        ([damaged(1), complete(2)], 1, []),  # and it doesn't count as one that is kept
    ],
)
def test_keep_removes_only_what_is_beyond_it(sets: list[BackupSet], keep: int, doomed: list[int]) -> None:
    assert sorted(decide.doomed_sets(sets, keep, NOW)) == sorted(sets[n].id for n in doomed)


def test_an_object_goes_only_when_no_remaining_set_names_it() -> None:
    one, other = Contents({A: Stored(1)}), Contents({B: Stored(1)})
    assert decide.doomed_objects({A, B, C}, [one, other]) == [C]
    assert decide.doomed_objects({A, B}, [one, other]) == []


def test_what_is_not_an_object_of_ours_never_goes() -> None:
    assert decide.doomed_objects({"README", "a" * 63, C}, []) == [C]


@pytest.mark.parametrize(
    ("lease", "refused"),
    [
        (None, False),
        ({"volume_id": "v1", "host": "h", "renewed": NOW}, False),  # this volume's own, of a run that was killed
        ({"volume_id": "v2", "host": "h", "renewed": NOW - 60}, True),
        ({"volume_id": "v2", "host": "h", "renewed": NOW - 7 * 3600}, False),
        ({"host": "?"}, True),
        ({"volume_id": "v2", "renewed": "yesterday"}, True),
    ],
)
def test_a_second_host_never_runs_into_the_same_container(lease: dict[str, Any] | None, refused: bool) -> None:
    assert bool(decide.lease_refusal(lease, "v1", NOW)) is refused


# -- restore -------------------------------------------------------------------------------------------------------

SET = an_id(5)
EMPTY = VolumeFacts(mounted=True, marked=True, free=10 * GIB)
FULL = replace(
    EMPTY, holding=("/mnt/block/postgres_data",), secrets=True, stack={"postgres_major": "17", "origin": "labctl"}
)
WISH = Wish(keys=("k1",), majors={"15": "pg15", "17": "pg17"}, default_major="17", mlflow_version="3.17.2")


def test_an_empty_volume_gets_the_backups_secrets_and_its_postgres() -> None:
    assert decide.decide(EMPTY, WISH, manifest(SET), Contents()) == decide.Plan("17", "pg17", "backup")


def test_data_beside_keeps_the_volumes_secrets() -> None:
    plan = decide.decide(FULL, replace(WISH, beside=True, keys=()), manifest(SET), Contents())
    assert plan == decide.Plan("17", "pg17", "volume")


def test_a_lost_key_loses_no_data() -> None:
    plan = decide.decide(EMPTY, replace(WISH, keys=(), new_secrets=True), manifest(SET), Contents())
    assert plan.secrets == "new"


def test_a_restore_that_is_served_is_not_made_twice() -> None:
    served = replace(FULL, stack={"origin": f"restore:{SET}"})
    assert decide.decide(served, WISH, manifest(SET), Contents()).already
    assert not decide.decide(served, replace(WISH, again=True, beside=True), manifest(SET), Contents()).already


@pytest.mark.parametrize(
    ("held", "major"), [("17", "18"), ("15", "17")], ids=["the next one", "what a new volume gets, if it is newer"]
)
def test_into_a_newer_major(held: str, major: str) -> None:
    wish = replace(WISH, into_new_major=True, majors={"15": "pg15", "17": "pg17", "18": "pg18"})
    facts = replace(FULL, stack={"postgres_major": held})
    document = manifest(SET, postgres={"major": held, "version": f"{held}.1", "bytes": 1})
    assert decide.decide(facts, wish, document, Contents()).major == major


def test_a_dump_of_an_older_major_goes_into_an_empty_volume() -> None:
    document = manifest(SET, postgres={"major": "14", "version": "14.1", "bytes": 1})
    assert decide.decide(EMPTY, WISH, document, Contents()).major == "17"


BIG = Contents({A: Stored(4 * GIB)}, [S3Object("b", "k", 4 * GIB, "", "", A), S3Object("b", "l", 4 * GIB, "", "", A)])


@pytest.mark.parametrize(
    ("facts", "wish", "document", "contents", "kind"),
    [
        (VolumeFacts(), WISH, {}, Contents(), "safety_stop"),
        (VolumeFacts(mounted=True), WISH, {}, Contents(), "safety_stop"),
        (FULL, WISH, {}, Contents(), "safety_stop"),
        (replace(FULL, holding=("/mnt/block/minio_data",)), WISH, {}, Contents(), "safety_stop"),
        (replace(FULL, holding=("/mnt/block/restored-x/minio_data",)), WISH, {}, Contents(), "safety_stop"),
        (replace(FULL, stack={}), WISH, {}, Contents(), "safety_stop"),
        (EMPTY, replace(WISH, keys=()), {}, Contents(), "usage"),
        (EMPTY, replace(WISH, keys=("k2",)), {}, Contents(), "usage"),
        (EMPTY, replace(WISH, mlflow_version="2.22.0"), {}, Contents(), "safety_stop"),
        (EMPTY, WISH, {"postgres": {"major": "18", "version": "18.0", "bytes": 1}}, Contents(), "safety_stop"),
        (FULL, replace(WISH, beside=True, majors={"15": "pg15"}, default_major="15"), {}, Contents(), "safety_stop"),
        (FULL, replace(WISH, into_new_major=True), {}, Contents(), "usage"),
        (replace(EMPTY, free=GIB), WISH, {}, BIG, "safety_stop"),
        (replace(EMPTY, free=5 * GIB), WISH, {}, BIG, "safety_stop"),  # each of its names takes room
    ],
)
def test_a_restore_is_refused(
    facts: VolumeFacts, wish: Wish, document: dict[str, Any], contents: Contents, kind: str
) -> None:
    with pytest.raises(Failure) as refused:
        decide.decide(facts, wish, manifest(SET, **document), contents)
    assert refused.value.kind == kind
    assert refused.value.next_step
    assert refused.value.found


def test_what_a_killed_restore_has_written_counts_as_room() -> None:
    facts = replace(EMPTY, free=GIB, written=9 * GIB)
    assert decide.decide(facts, WISH, manifest(SET), BIG).image == "pg17"


@pytest.mark.parametrize(
    ("stored", "missing"),
    [
        ({A: Stored(5, "m")}, []),
        ({A: Stored(5)}, []),  # a store that says no MD5
        ({A: Stored(4, "m")}, [A]),
        ({A: Stored(5, "n")}, [A]),
        ({}, [A]),
    ],
)
def test_a_set_whose_objects_are_gone_or_differ_shows_before_anything_is_written(
    stored: dict[str, Stored], missing: list[str]
) -> None:
    assert decide.missing_objects(Contents({A: Stored(5, "m")}), stored) == missing


UNSERVED = {"set": SET, "parts": {}}


@pytest.mark.parametrize(
    ("path", "stack", "record", "allowed"),
    [
        ("/mnt/block/restored-x/postgres_data", {}, UNSERVED, True),
        ("/mnt/block/restored-x/postgres_data", {"postgres_dir": "postgres_data"}, UNSERVED, True),
        ("/mnt/block/restored-x/postgres_data", {"postgres_dir": "restored-x/postgres_data"}, UNSERVED, False),
        ("/mnt/block/restored-x/workspace", {"s3_dir": "restored-x/minio_data"}, UNSERVED, False),
        ("/mnt/block/restored-x/postgres_data", {}, {**UNSERVED, "served": "2026"}, False),
        ("/mnt/block/restored-x/postgres_data", {}, None, False),
        ("/mnt/block/postgres_data", {}, UNSERVED, False),
        ("/mnt/block/restored-x", {}, UNSERVED, False),
        ("/mnt/block/restored-x/..", {}, UNSERVED, False),
        ("/mnt/block/restored-x/a/b", {}, UNSERVED, False),
        ("/mnt/block/workspace/restored-x", {}, UNSERVED, False),
        ("/mnt/blocked/restored-x/postgres_data", {}, UNSERVED, False),
        ("/mnt/block", {}, UNSERVED, False),
        ("/", {}, UNSERVED, False),
    ],
)
def test_only_what_an_unserved_restore_made_is_ever_removed(
    path: str, stack: dict[str, Any], record: dict[str, Any] | None, allowed: bool
) -> None:
    assert (decide.discard_refusal(path, "/mnt/block", stack, record) == "") is allowed


# -- contents ------------------------------------------------------------------------------------------------------


def test_contents_come_back_as_they_were() -> None:
    entry = WorkspaceEntry("sub/naïve \udcff.txt", "file", 0o640, 1000, 1000, 5, 6, 7, B)
    contents = Contents({A: Stored(5, "m"), B: Stored(7)}, [S3Object("b", "k", 5, "t", "e", A)], [entry])
    assert Contents.unpack(contents.pack()) == contents
    assert contents.pack() == contents.pack()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no gzip",
        Contents({A: Stored(1)}).pack()[:-9],
        Contents({}, [S3Object("b", "k", 5, "t", "e", A)]).pack(),  # an object that nothing describes
        Contents({"../../etc": Stored(1)}).pack(),
    ],
)
def test_contents_that_are_not_whole_are_refused(data: bytes) -> None:
    with pytest.raises(Damaged):
        Contents.unpack(data)


def test_an_object_that_was_written_again_is_read_again() -> None:
    before = S3Object("b", "k", 5, "2026-11-22T12:00:00.123Z", "etag", A)
    assert replace(before, sha256="").same_version(before)
    assert not replace(before, modified="2026-11-22T12:00:00.124Z").same_version(before)
    assert not replace(before, etag="other").same_version(before)
    assert not replace(before, size=6).same_version(before)
    assert not before.same_version(None)


def test_a_file_that_was_written_again_is_read_again() -> None:
    before = WorkspaceEntry("f", "file", 0o644, 0, 0, 5, 6, 7, A)
    assert before.same_version(before)
    assert not replace(before, changed=7).same_version(before)  # its old time was put back
    assert not replace(before, kind="link").same_version(before)
