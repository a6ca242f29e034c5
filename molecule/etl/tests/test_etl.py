"""What is lost if one of these fails: what was in the container before, or trust in what is there now."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from loads import NODE, PROJECT, SCENARIO, WORK, killed, load, nodes, small_set, store


def run(tmp_path: Path, layout: str, **dataset: str) -> subprocess.CompletedProcess[str]:
    """The role with that dataset."""
    extra = tmp_path / "extra.json"
    extra.write_text(json.dumps({"etl_dataset": {"name": "hostile", **dataset}, "etl_layout": layout}))
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


def test_nothing_is_left_on_the_disk_and_nothing_pending_in_the_container(objects: Any) -> None:
    assert nodes.execute(NODE, "find", "/var/lib/labctl/etl", "-type", "f").strip() == ""
    own = [name for name in objects() if name.startswith(".labctl/")]
    assert sorted(own) == [".labctl/manifest.json", own[1]]
    assert own[1].startswith(".labctl/tables/")


def test_the_secret_is_in_no_generated_file_or_inspection() -> None:
    secret = json.loads((WORK / "store.json").read_text())["application_credential_secret"]
    seen = nodes.execute(NODE, "sh", "-c", "cat /etc/labctl/* /run/labctl-etl/*.json; ps axww -o args")
    assert secret not in seen


@pytest.mark.parametrize("layout", ["files", "packed"])
@pytest.mark.parametrize("kind", ["traversal", "wrong hash", "damaged", "hostile in the middle"])
def test_a_bad_archive_leaves_the_store_as_it_was(
    kind: str, layout: str, tmp_path: Path, described: Any, objects: Any
) -> None:
    path = tmp_path / "bad.zip"
    if kind == "hostile in the middle":
        path = tmp_path / "bad.tar"
        with tarfile.open(path, "w") as tar:
            for n in range(40):  # more than are announced at a time: some have been sent when the link comes
                info = tarfile.TarInfo(f"training/0_h{n}.jpg")
                info.size = 5000
                tar.addfile(info, io.BytesIO(os.urandom(5000)))
            info = tarfile.TarInfo("training/0_link.jpg")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("training/0_1.jpg", os.urandom(5000))
            archive.writestr("training/0_x1.jpg", os.urandom(5000))
            if kind == "traversal":
                archive.writestr("../../etc/cron.d/evil", "x")
    if kind == "damaged":
        content = bytearray(path.read_bytes())
        content[9000] ^= 1
        path.write_bytes(content)
    before = objects()
    described(path, layout=layout, sha256="0" * 64 if kind == "wrong hash" else "")
    assert "Nothing was loaded" in load(check=False)["error"]["msg"]
    assert objects() == before


def test_the_role_fails_with_the_programs_own_words(tmp_path: Path, served: Any) -> None:
    path = tmp_path / "bad.zip"
    path.write_text("<html>sign in</html>")
    done = run(tmp_path, "files", url=served(path))
    assert done.returncode != 0
    assert "Nothing was loaded" in done.stdout + done.stderr


def test_what_another_put_there_is_never_overwritten_or_removed(tmp_path: Path, described: Any, objects: Any) -> None:
    cloud, container = store.connect(), json.loads((WORK / "store.json").read_text())["container"]
    cloud.object_store.upload_object(container=container, name="training/class_10/10_f1.jpg", data=b"somebody's own")
    small_set(tmp_path / "f.zip", "f", 4)
    before = objects()
    described(tmp_path / "f.zip")
    found = load(check=False)
    assert found["error"]["kind"] == "safety_stop"
    assert objects() == before
    cloud.object_store.delete_object("training/class_10/10_f1.jpg", container=container)


def test_a_killed_load_is_completed_by_the_next_which_sends_only_what_is_missing(
    tmp_path: Path, described: Any, objects: Any
) -> None:
    """And the set before it is replaced when the new one is there, but nothing that labctl didn't load."""
    foreign = {name for name in objects() if not name.startswith((".labctl/", "evaluation/", "validation/"))}
    foreign &= set(store.objects())
    small_set(tmp_path / "k.zip", "k", 300)
    described(tmp_path / "k.zip", workers=2)
    assert killed("files", "extract", images=40)
    there = {name for name in objects() if "/10_k" in name}
    assert 40 <= len(there) < 300
    assert "evaluation/class_00/0_0.jpg" in objects(), "what readers see stays until the new set is complete"
    found = load()["result"]
    assert found["images"] == 300
    assert 280 - len(there) <= found["sent"] <= 300 - len(there), "what was on its way may have arrived after the look"
    after = objects()
    assert {name for name in after if not name.startswith(".labctl/")} == foreign | {
        f"training/class_10/10_k{n}.jpg" for n in range(300)
    }
    again = load()["result"]
    assert (again["changed"], again["sent"]) == (False, 0)
    cloud, container = store.connect(), json.loads((WORK / "store.json").read_text())["container"]
    cloud.object_store.delete_object("training/class_10/10_k7.jpg", container=container)
    assert load()["result"]["sent"] == 1, "an object that the container lost is sent again"


def test_packed_holds_the_same_bytes_in_shards_and_replaces_the_files(
    tmp_path: Path, described: Any, objects: Any
) -> None:
    small_set(tmp_path / "p.zip", "p", 100)
    described(tmp_path / "p.zip", layout="packed", shard_bytes=100_000)
    found = load()["result"]
    assert found["shards"] > 2
    now = objects()
    assert not [name for name in now if "/10_k" in name], "the set before it was labctl's own"
    assert set(store.objects()) <= set(now)
    cloud, container = store.connect(), json.loads((WORK / "store.json").read_text())["container"]
    manifest = json.loads(cloud.object_store.download_object(".labctl/manifest.json", container=container))
    seen = {}
    nodes.execute(NODE, "mkdir", "/tmp/shards")
    for number, shard in enumerate(manifest["shards"]):
        data = cloud.object_store.download_object(shard["object"], container=container)
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]
        (tmp_path / "shard").write_bytes(data)
        nodes.execute(NODE, "sh", "-c", "cat > /tmp/shard", data=data)
        nodes.execute(NODE, "unsquashfs", "-q", "-n", "-d", f"/tmp/shards/{number}", "/tmp/shard")
        listing = nodes.execute(NODE, "sh", "-c", f"cd /tmp/shards/{number} && find . -type f | xargs md5sum")
        seen |= {name.removeprefix("./"): md5 for md5, name in (line.split("  ") for line in listing.splitlines())}
    nodes.execute(NODE, "rm", "-r", "/tmp/shards", "/tmp/shard")
    with zipfile.ZipFile(tmp_path / "p.zip") as archive:
        assert seen == {
            f"training/class_10/{name.split('/')[1]}": hashlib.md5(archive.read(name)).hexdigest()
            for name in archive.namelist()
        }
    lost = manifest["shards"][1]["object"]
    cloud.object_store.delete_object(lost, container=container)
    again = load()["result"]
    assert (again["sent"], again["version"]) == (1, found["version"]), "one image was missing, one was sent"
    assert objects() == {**now, **{name: md5 for name, md5 in objects().items() if name.endswith("json")}}
