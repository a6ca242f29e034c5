"""What may run on a volume: each wrong answer would open a database with the wrong server, or start an empty one."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest


def load(name: str) -> ModuleType:
    """A module of the role, which Ansible would put below ansible.module_utils."""
    path = Path(__file__).parents[2] / "roles/mlflow_stack/module_utils" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


plan = load("stack_plan")
Folder, State, Cluster = plan.Folder, plan.VolumeState, plan.Cluster
OWN = (999, 999)
MINIO = plan.Wanted("/mnt/block", "17", "minio")
RCLONE = replace(MINIO, s3_flavour="rclone")
NEW = State(mounted=True, marked=True)
USED = State(
    mounted=True,
    marked=True,
    postgres=Folder(("PG_VERSION", "base"), (999, 999)),
    clusters={"postgres_data": Cluster("17", OWN, frozenset([999]))},
    minio=Folder((".minio.sys", "mlflow-artifacts"), (10001, 10001)),
    minio_format="xl-single",
    secrets=True,
)


def test_a_new_volume_gets_its_folders() -> None:
    made = plan.decide(NEW, MINIO)
    assert made.create == (("postgres_data", 999, 0o700), ("minio_data", 10001, 0o750))
    assert (made.postgres_dir, made.s3_dir) == ("/mnt/block/postgres_data", "/mnt/block/minio_data")


def test_lost_and_found_is_no_data() -> None:
    assert plan.decide(replace(NEW, postgres=Folder(("lost+found",), (0, 0))), MINIO).create


def test_a_used_volume_is_taken_as_it_is() -> None:
    used = plan.decide(replace(USED, clusters={"postgres_data": Cluster("17", (1234, 1234))}), MINIO)
    assert used.create == ()
    assert used.postgres_owner == (1234, 1234)
    assert used.s3_owner == (10001, 10001)


@pytest.mark.parametrize("place", ["postgres_data", "postgres_data/data", "postgres_data/17/docker", "restored/pg"])
def test_the_cluster_is_served_from_where_it_is(place: str) -> None:
    used = plan.decide(replace(USED, clusters={place: Cluster("17", OWN)}), MINIO)
    assert (used.postgres_dir, used.postgres_place) == (f"/mnt/block/{place}", place)


def test_a_volume_gets_the_image_of_its_own_postgresql() -> None:
    images = {"postgres": "p", "postgres-15": "p15"}
    assert plan.postgres_image(NEW, images) == "postgres"
    assert plan.postgres_image(USED, images) == "postgres"
    old = replace(USED, clusters={"postgres_data": Cluster("15", OWN)})
    assert plan.postgres_image(old, images) == "postgres-15"
    assert plan.postgres_image(old, {"postgres": "p"}) == "postgres"
    assert plan.postgres_target("15") == plan.postgres_target("17") == "/var/lib/postgresql/data"
    assert plan.postgres_target("18") == "/var/lib/postgresql/18/docker"


def test_a_newer_postgresql_is_refused_with_the_way_to_it() -> None:
    for configured, way in (("18", "--into-new-major"), ("16", "image of PostgreSQL 17")):
        with pytest.raises(plan.Stop) as stopped:
            plan.decide(USED, replace(MINIO, postgres_major=configured))
        assert way in stopped.value.facts["next_step"]


def test_the_pointers_decide_what_is_served() -> None:
    stack = {"postgres_dir": "restored/pg", "s3_dir": "restored/s3", "origin": "restore:x"}
    used = plan.decide(replace(USED, stack=stack, clusters={"restored/pg": Cluster("17", OWN)}), MINIO)
    assert (used.postgres_dir, used.s3_dir) == ("/mnt/block/restored/pg", "/mnt/block/restored/s3")
    assert used.origin == "restore:x"
    with pytest.raises(plan.Stop, match="marker names isn't there"):
        plan.decide(replace(USED, stack=stack, clusters={}), MINIO)
    with pytest.raises(plan.Stop, match="marker names aren't there"):
        gone = replace(USED, stack=stack, clusters={"restored/pg": Cluster("17", OWN)}, minio=Folder())
        plan.decide(gone, MINIO)


def test_a_tutorial_volume_is_adopted_by_the_owner_of_its_database_and_root_for_its_objects() -> None:
    for owner in (OWN, (1000, 1000)):
        made = replace(USED, secrets=False, clusters={"postgres_data": Cluster("15", owner)})
        taken = plan.decide(made, replace(MINIO, postgres_major="15"))
        assert (taken.adopt, taken.origin, taken.create) == (True, "tutorial", ())
        assert (taken.postgres_owner, taken.s3_owner, taken.s3_as_root) == (owner, (0, 0), True)
    later = plan.decide(replace(USED, stack={"origin": "tutorial"}), MINIO)
    assert (later.adopt, later.s3_as_root) == (False, True)


TABLES = plan.Known("3.17.2", "new", frozenset(["old", "new"]))


def test_an_older_schema_is_upgraded_and_the_same_is_started() -> None:
    assert plan.decide_schema(plan.Schema(("old",), True), TABLES) == plan.UPGRADE
    assert plan.decide_schema(plan.Schema(("new",), True), TABLES) == plan.START
    assert plan.decide_schema(plan.Schema(), TABLES) == plan.START, "an empty database"


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (plan.Schema(("newer",), True), "newer MLflow"),
        (plan.Schema((), True), "doesn't say which version"),
        (plan.Schema(("old", "new"), True), "doesn't say which version"),
    ],
)
def test_runs_of_an_unknown_schema_are_left_alone(found: object, words: str) -> None:
    with pytest.raises(plan.Stop, match=words):
        plan.decide_schema(found, TABLES)


def with_cluster(place: str = "postgres_data", **changes: object) -> object:
    values = {"version": "17", "owner": OWN, **changes}
    return replace(USED, clusters={place: Cluster(**values)})


@pytest.mark.parametrize(
    ("state", "wanted", "words"),
    [
        (State(), MINIO, "no mount"),
        (State(mounted=True), MINIO, "without .labctl"),
        (replace(USED, read_only=True), MINIO, "read-only"),
        (replace(USED, marker_problem="there is no marker"), MINIO, "there is no marker"),
        (with_cluster(version="15"), MINIO, "PostgreSQL 17"),
        (with_cluster("postgres_data/18/docker", version="18"), MINIO, "PostgreSQL 17"),
        (with_cluster(version=""), MINIO, "PostgreSQL 17"),
        (with_cluster(owner=(0, 0)), MINIO, "uid 0"),
        (with_cluster(uids=frozenset([999, 1000])), MINIO, "1000"),
        (with_cluster(mode=0o755), MINIO, "0755"),
        (USED, replace(MINIO, postgres_major=""), "unknown version"),
        (USED, replace(MINIO, postgres_major="18"), "PostgreSQL 18"),
        (
            replace(USED, clusters={place: Cluster("17", OWN) for place in ("postgres_data", "postgres_data/data")}),
            MINIO,
            "postgres_data/data",
        ),
        (replace(NEW, postgres=Folder(("base", "global"), OWN)), MINIO, "base, global"),
        (replace(USED, minio_format="fs"), MINIO, "the format fs"),
        (replace(USED, minio_format="xl"), MINIO, "the format xl"),
        (replace(USED, minio_format=""), MINIO, "can't be understood"),
        (replace(USED, minio_format=None), MINIO, "no .minio.sys/format.json"),
        (USED, RCLONE, "minio_data only"),
        (replace(NEW, rclone=Folder(("mlflow-artifacts",), (1, 1)), secrets=True), MINIO, "rclone_s3_data only"),
        (replace(USED, secrets=False, clusters={}, postgres=Folder()), MINIO, "objects only"),
    ],
)
def test_unknown_or_unfitting_data_stops_with_its_reason(state: object, wanted: object, words: str) -> None:
    with pytest.raises(plan.Stop) as stopped:
        plan.decide(state, wanted)
    assert words in stopped.value.facts["found"] + stopped.value.facts["msg"]
    assert all(stopped.value.facts.values())


def test_rclone_has_a_folder_of_its_own() -> None:
    assert plan.decide(NEW, RCLONE).s3_dir == "/mnt/block/rclone_s3_data"


def test_no_secret_survives_in_a_message() -> None:
    keys = load("stack_secrets")
    values = keys.generate()
    text = " ".join(values.values())
    scrubbed = keys.scrub(text, values)
    assert not any(values[name] in scrubbed for name in ("postgres_password", "s3_password", "jupyter_token"))


def test_each_container_gets_only_its_own_secrets() -> None:
    keys = load("stack_secrets")
    readers = {name: uid for name, (_, uid) in keys.files(keys.generate(), 999, 10002, 10001).items()}
    assert {name for name, uid in readers.items() if uid == 1000} == {"jupyter_token", "jupyter_aws_credentials"}
    assert {name for name, uid in readers.items() if uid == 10001} == {"pgpass", "aws_credentials"}


def test_adopted_credentials_are_all_or_none() -> None:
    keys = load("stack_secrets")
    tutorial = keys.adopted({})
    assert {key: tutorial[key] for key in keys.TUTORIAL} == keys.TUTORIAL
    own = {**keys.TUTORIAL, "postgres_password": "s3cret"}
    assert keys.adopted(own)["postgres_password"] == "s3cret"
    for wrong in ({"postgres_user": "x"}, {**own, "postgres_user": "a b"}, {**own, "s3_password": 'a"b'}):
        with pytest.raises(ValueError) as refused:
            keys.adopted(wrong)
        assert "s3cret" not in str(refused.value)
