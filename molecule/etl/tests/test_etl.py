"""What is lost if one of these fails: what was in the container before, or trust in what is there now."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCENARIO = Path(__file__).parents[1]
PROJECT = SCENARIO.parents[1]
sys.path[:0] = [str(PROJECT / "tests"), str(SCENARIO.parent / "rclone")]

import food11  # noqa: E402
import nodes  # noqa: E402
import store  # noqa: E402

NODE = "etl"
WORK = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"])
GATEWAY = os.environ.get("LABCTL_TEST_GATEWAY", "172.29.0.1")


@pytest.fixture(scope="module")
def objects() -> Any:
    """A function that lists the container: {name: MD5}."""
    cloud = store.connect()
    container = json.loads((WORK / "store.json").read_text())["container"]
    return lambda: {item.name: item.etag for item in cloud.object_store.objects(container)}


@pytest.fixture
def served() -> Iterator[Any]:
    """`served(path)` puts a file on an HTTP server that the node reaches; returns its URL."""
    running = []

    def serve(path: Path) -> str:
        server = food11.server(path, GATEWAY, 0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"http://{GATEWAY}:{server.server_address[1]}/{path.name}"

    yield serve
    for server in running:
        server.shutdown()


def run(tmp_path: Path, **dataset: str) -> subprocess.CompletedProcess[str]:
    """The role with that dataset."""
    extra = tmp_path / "extra.json"
    extra.write_text(json.dumps({"etl_dataset": {"name": "hostile", **dataset}}))
    return subprocess.run(
        ["ansible-playbook", "-i", str(WORK / "inventory"), "-e", f"@{extra}", str(SCENARIO / "etl.yml")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "ANSIBLE_ROLES_PATH": str(PROJECT / "roles"), "ANSIBLE_PIPELINING": "1"},
    )


def test_every_image_is_in_its_class_folder_byte_for_byte(objects: Any) -> None:
    found = objects()
    with zipfile.ZipFile(WORK / "Food-11.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")]
        expected = {}
        for name in names:
            split, file = name.split("/")
            content = hashlib.md5(archive.read(name), usedforsecurity=False).hexdigest()
            expected[f"{split}/class_{int(file.split('_')[0]):02d}/{file}"] = content
    assert len(expected) == 330
    assert {name: found.get(name) for name in expected} == expected


def test_what_was_in_the_container_before_is_still_there(objects: Any) -> None:
    before = {
        name: hashlib.md5(content, usedforsecurity=False).hexdigest() for name, content in store.objects().items()
    }
    found = objects()
    assert {name: found.get(name) for name in before} == before


def test_no_staging_volume_or_container_is_left() -> None:
    assert nodes.execute(NODE, "docker", "volume", "ls", "-q").strip() == ""
    assert nodes.execute(NODE, "docker", "ps", "-aq").strip() == ""


def test_the_secret_is_in_no_generated_file_or_inspection() -> None:
    secret = json.loads((WORK / "store.json").read_text())["application_credential_secret"]
    seen = nodes.execute(NODE, "sh", "-c", "grep -rl . /etc/labctl | xargs cat; ps axww -o args")
    assert secret not in seen


@pytest.mark.parametrize("kind", ["traversal", "wrong hash", "damaged"])
def test_a_bad_archive_stops_before_the_load(kind: str, tmp_path: Path, served: Any, objects: Any) -> None:
    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("training/0_1.jpg", os.urandom(5000))
        if kind == "traversal":
            archive.writestr("../../etc/cron.d/evil", "x")
    if kind == "damaged":
        content = bytearray(path.read_bytes())
        content[200] ^= 1
        path.write_bytes(content)
    before = objects()
    done = run(tmp_path, url=served(path), **({"sha256": "0" * 64} if kind == "wrong hash" else {}))
    assert done.returncode != 0
    assert "Nothing was loaded" in done.stdout + done.stderr
    assert objects() == before
    assert nodes.execute(NODE, "docker", "volume", "ls", "-q").strip() == ""


def test_a_load_that_was_cut_off_is_completed_by_the_next(tmp_path: Path, served: Any, objects: Any) -> None:
    """Half of a set is there, as after a crash: the next run sends the rest and nothing else."""
    path = tmp_path / "part.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for n in range(6):
            archive.writestr(zipfile.ZipInfo(f"training/10_part{n}.jpg", food11.TIMESTAMP), bytes([n]) * 3000)
    url = served(path)
    assert run(tmp_path, url=url).returncode == 0
    cloud = store.connect()
    container = json.loads((WORK / "store.json").read_text())["container"]
    cloud.object_store.delete_object("training/class_10/10_part3.jpg", container=container)
    done = run(tmp_path, url=url)
    assert done.returncode == 0, done.stdout
    assert "training/class_10/10_part3.jpg" in objects()
