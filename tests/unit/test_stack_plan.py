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
Folder, State = plan.Folder, plan.VolumeState
MINIO = plan.Wanted("/mnt/block", "17", "minio")
RCLONE = replace(MINIO, s3_flavour="rclone")
NEW = State(mounted=True, marked=True)
USED = State(
    mounted=True,
    marked=True,
    postgres=Folder(("PG_VERSION", "base"), (999, 999)),
    postgres_versions={"": ("17", (999, 999))},
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
    used = plan.decide(replace(USED, postgres_versions={"": ("17", (1234, 1234))}), MINIO)
    assert used.create == ()
    assert used.postgres_owner == (1234, 1234)
    assert used.s3_owner == (10001, 10001)


@pytest.mark.parametrize("place", plan.POSTGRES_PLACES)
def test_the_cluster_is_found_in_each_place_that_images_have_used(place: str) -> None:
    used = plan.decide(replace(USED, postgres_versions={place: ("17", (999, 999))}), MINIO)
    assert used.postgres_dir == f"/mnt/block/postgres_data/{place}".rstrip("/")


@pytest.mark.parametrize(
    ("state", "wanted", "words"),
    [
        (State(), MINIO, "no mount"),
        (State(mounted=True), MINIO, "without .labctl"),
        (replace(USED, postgres_versions={"": ("15", (999, 999))}), MINIO, "PostgreSQL 17"),
        (replace(USED, postgres_versions={"18/docker": ("18", (999, 999))}), MINIO, "PostgreSQL 17"),
        (replace(USED, postgres_versions={"": ("", (999, 999))}), MINIO, "PostgreSQL 17"),
        (USED, replace(MINIO, postgres_major=""), "unknown version"),
        (USED, replace(MINIO, postgres_major="18"), "PostgreSQL 18"),
        (replace(USED, postgres_versions={"": ("17", (9, 9)), "data": ("17", (9, 9))}), MINIO, "postgres_data/data"),
        (replace(NEW, postgres=Folder(("base", "global"), (999, 999))), MINIO, "base, global"),
        (replace(USED, minio_format="fs"), MINIO, "the format fs"),
        (replace(USED, minio_format="xl"), MINIO, "the format xl"),
        (replace(USED, minio_format=""), MINIO, "can't be understood"),
        (replace(USED, minio_format=None), MINIO, "no .minio.sys/format.json"),
        (USED, RCLONE, "minio_data only"),
        (replace(NEW, rclone=Folder(("mlflow-artifacts",), (1, 1)), secrets=True), MINIO, "rclone_s3_data only"),
        (replace(USED, secrets=False), MINIO, "by the tutorial's commands"),
    ],
)
def test_unknown_or_unfitting_data_stops_with_its_reason(state: object, wanted: object, words: str) -> None:
    with pytest.raises(plan.Stop) as stopped:
        plan.decide(state, wanted)
    assert words in stopped.value.facts["found"]
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
    assert {name for name, uid in readers.items() if uid == 1000} == {"jupyter_token"}
    assert {name for name, uid in readers.items() if uid == 10001} == {"pgpass", "aws_credentials"}
