"""A load that is cut off, in whatever way: readers keep a whole set, and the next run completes it."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from loads import NODE, PROGRAM, WORK, Container, killed, load, nodes, progress, small_set, store, until

LAYOUTS = ("files", "packed")
#: Steps of a load as it names them, and how many images must have been sent when it is killed.
MOMENTS = {"look": 0, "extract": 0, "extract half": 30, "compare": 0, "show": 0, "remove": 0}
#: Of the sandbox, whose Swift remembers for minutes that a token was good.
CLOUD = "labctl-sandbox"
FORGET = "import socket; s = socket.create_connection(('127.0.0.1', 11211)); s.send(b'flush_all\\r\\n'); s.recv(9)"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two sets that have some names in common, with other contents: {letter: (file, {path: MD5})}."""
    folder = tmp_path_factory.mktemp("sets")
    return {letter: (folder / f"{letter}.zip", small_set(folder / f"{letter}.zip", letter, 50, "s")) for letter in "AB"}


def start(job: str, *arguments: str) -> None:
    nodes.execute(NODE, "rm", "-f", f"/run/labctl-etl/job-{job}.json")
    nodes.execute(NODE, "systemd-run", "--quiet", "--collect", f"--unit=labctl-test-{job}", "python3", PROGRAM, "load",
                  "--job", job, *arguments)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_at_each_step_readers_keep_a_whole_set_and_the_next_run_completes(
    layout: str, sets: dict[str, Any], described: Any, container: Container
) -> None:
    settings = {"workers": 2, "shard_bytes": 60_000, "layout": layout}
    described(sets["B"][0], **settings)
    load()
    seen, shown = [], sets["B"][1]
    for number, (moment, images) in enumerate(MOMENTS.items()):
        path, wanted = sets["AB"[number % 2]]
        described(path, **settings)
        if not killed(layout, moment.split()[0], images):
            shown = wanted
            continue
        seen.append(moment)
        # files that replace others of the same name are moved one by one, just before the manifest
        if moment in ("look", "extract", "extract half", "compare"):
            assert container.shown() == shown, moment
        elif not (layout == "files" and moment == "show"):
            assert container.shown() in (shown, wanted), moment
        there = container.objects()
        found = load()["result"]
        if layout == "files":
            missing = {name for name, md5 in wanted.items() if there.get(name) != md5}
            assert found["sent"] <= len(missing), f"{moment}: sent again what was there"
        assert container.shown() == wanted, moment
        left = {name for name in container.objects() if name.startswith((".labctl/pending", ".labctl/tables/pending"))}
        assert not left, moment
        shown = wanted
    assert {"extract", "extract half", "show"} <= set(seen), f"of the steps, only {seen} were met"


@contextmanager
def cut_off() -> Iterator[None]:
    """The node's way to the store (and to Keystone) lets nothing through; nobody else's is touched."""
    known = json.loads((WORK / "store.json").read_text())
    address = urlsplit(known["auth_url"]).hostname
    rules = f"table ip labctl_test {{ chain out {{ type filter hook output priority 0; ip daddr {address} drop; }}; }}"
    nodes.execute(NODE, "nft", "-f", "-", data=rules.encode())
    try:
        yield
    finally:
        nodes.execute(NODE, "nft", "delete", "table", "ip", "labctl_test")


@pytest.mark.parametrize(("layout", "seconds"), [("files", 30), ("packed", 5)])
def test_a_store_that_is_away_for_a_while_is_waited_for(
    layout: str, seconds: int, tmp_path: Path, described: Any, container: Container
) -> None:
    wanted = small_set(tmp_path / "away.zip", f"away{layout}", 300)
    described(tmp_path / "away.zip", layout=layout, workers=2, shard_bytes=100_000)
    before = container.shown()
    start("away")
    until(lambda: progress("away").get("stages", {}).get("load", {}).get("images", 0) >= 20, "image sent")
    with cut_off():
        threading.Event().wait(seconds)
        assert progress("away")["state"] == "running"
    assert container.shown() in (before, wanted)
    until(lambda: progress("away")["state"] != "running", "end", 120)
    assert progress("away")["state"] == "done", progress("away").get("error")
    assert container.shown() == wanted


@pytest.fixture
def renewed() -> Iterator[Any]:
    """A function that gives the node a valid credential again, as converge does; done in any case."""
    done = []

    def renew() -> None:
        done.append(True)
        former = json.loads((WORK / "store.json").read_text())
        store.renew(WORK / "store.json")
        new = json.loads((WORK / "store.json").read_text())
        text = nodes.execute(NODE, "cat", "/etc/rclone/rclone.conf")
        for key in ("application_credential_id", "application_credential_secret"):
            assert former[key] in text
            text = text.replace(former[key], new[key])
        nodes.execute(NODE, "tee", "/etc/rclone/rclone.conf", data=text.encode())

    yield renew
    if not done:
        renew()


def test_a_credential_that_is_revoked_meanwhile_is_told_and_the_next_run_completes(
    tmp_path: Path, described: Any, container: Container, renewed: Any
) -> None:
    if subprocess.run(["docker", "inspect", CLOUD], capture_output=True, check=False).returncode:
        pytest.skip("another cloud's Swift can't be told to forget a token")
    wanted = small_set(tmp_path / "revoked.zip", "revoked", 400)
    described(tmp_path / "revoked.zip", layout="files", workers=2)
    before = container.shown()
    start("revoked")
    until(lambda: progress("revoked").get("stages", {}).get("load", {}).get("images", 0) >= 20, "image sent")
    cloud, known = store.connect(), json.loads((WORK / "store.json").read_text())
    cloud.identity.delete_application_credential(cloud.current_user_id, known["application_credential_id"])
    subprocess.run(["docker", "exec", CLOUD, "python3", "-c", FORGET], check=True)
    until(lambda: progress("revoked")["state"] != "running", "end", 120)
    error = progress("revoked")["error"]
    assert error["kind"] == "refused"
    assert "labctl up" in error["next_step"]
    assert container.shown() == before
    renewed()
    there = set(container.objects())
    found = load()["result"]
    assert found["sent"] == len(set(wanted) - there) < len(wanted)
    assert container.shown() == wanted


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_disk_is_told_and_the_next_run_completes(
    layout: str, tmp_path: Path, described: Any, container: Container
) -> None:
    wanted = small_set(tmp_path / "full.zip", f"full{layout}", 60, size=64_000)
    described(tmp_path / "full.zip", layout=layout)
    before = container.shown()
    places = ["/var/lib/labctl/etl", "/run/labctl-etl"]
    for place in places:
        nodes.execute(NODE, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place)
    try:
        found = load(check=False)
        assert "disk is full" in found["error"]["msg"]
        assert container.shown() == before
    finally:
        for place in places:
            nodes.execute(NODE, "umount", place)
    assert load()["state"] == "done"
    assert container.shown() == wanted


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prefix_of_the_store_is_a_source_like_any_other(layout: str, described: Any, container: Container) -> None:
    contents = {f"raw/pets/{kind}/{n} ö.jpg": f"{kind}{n}".encode() * 300 for kind in ("cat", "dog") for n in range(8)}
    for name, data in contents.items():
        container.cloud.object_store.upload_object(container=container.name, name=name, data=data)
    pets = {"prefix": f"{container.name}/raw/pets", "rule": "folder", "classes": [], "splits": []}
    try:
        described(None, dataset=pets, layout=layout)
        found = load()["result"]
        assert (found["images"], found["classes"]) == (16, ["cat", "dog"])
        assert {path.removeprefix("all/") for path in container.shown()} == {
            f"class_{number:02d}/{n} ö.jpg" for number in (0, 1) for n in range(8)
        }
        assert set(contents) <= set(container.objects()), "the source stays"
        again = load()["result"]
        assert (again["changed"], again["sent"]) == (False, 0)
    finally:
        for name in contents:
            container.cloud.object_store.delete_object(name, container=container.name)
