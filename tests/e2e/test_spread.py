"""A list of archives over two hosts: if one of these fails, a dataset is sent twice, or shown with a part missing."""

from __future__ import annotations

import collections
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "molecule" / "rclone")]

import food11  # noqa: E402
import nodes  # noqa: E402
import store  # noqa: E402

HOSTS = ("spread-a", "spread-b")
GATEWAY = os.environ.get("LABCTL_TEST_GATEWAY", "172.29.0.1")
CLOUD = "labctl-sandbox"
PLAY = """
- hosts: all
  become: true
  gather_facts: true
  gather_subset: ["!all", "!min", distribution, pkg_mgr]
  roles: [{roles}]
"""


@dataclass
class Lab:
    """Two hosts with the role rclone, one container, and archives on an HTTP server."""

    home: Path
    container: str
    archives: list[Path] = field(default_factory=list)

    def play(self, roles: str, **variables: Any) -> subprocess.CompletedProcess[str]:
        """A play over both hosts."""
        (self.home / "play.yml").write_text(PLAY.format(roles=roles))
        (self.home / "vars.json").write_text(json.dumps(variables))
        return subprocess.run(
            ["ansible-playbook", "-i", str(self.home / "inventory"), str(self.home / "play.yml"),
             "-e", f"@{self.home / 'store-vars.json'}", "-e", f"@{self.home / 'vars.json'}"],
            capture_output=True, text=True, check=False,
            env={**os.environ, "ANSIBLE_ROLES_PATH": str(REPOSITORY / "roles"), "ANSIBLE_PIPELINING": "1"},
        )  # fmt: skip

    def load(self, urls: list[str], layout: str = "files") -> subprocess.CompletedProcess[str]:
        """The role etl with a list."""
        dataset = {"name": "many", "url": urls, "splits": ["training"], "classes": 11, "class_rule": "prefix"}
        return self.play("etl", etl_dataset=dataset, etl_layout=layout, etl_workers=2)

    def get(self, name: str) -> bytes:
        """An object's content."""
        return bytes(store.connect().object_store.download_object(name, container=self.container))

    def objects(self) -> dict[str, str]:
        """{name: MD5}."""
        return {item.name: item.etag for item in store.connect().object_store.objects(self.container)}

    def shown(self) -> set[str]:
        """The paths that readers see; all of them are there."""
        if ".labctl/manifest.json" not in (there := self.objects()):
            return set()
        manifest = json.loads(self.get(".labctl/manifest.json"))
        rows = [json.loads(line) for line in gzip.decompress(self.get(manifest["table"])).splitlines()]
        if manifest["layout"] == "files":
            assert all(there.get(row["path"]) == row["md5"] for row in rows)
        else:
            assert all(there.get(one["object"]) == one["md5"] for one in manifest["shards"])
        return {row["path"] for row in rows}

    def sent(self, since: float) -> collections.Counter[str]:
        """How often each image was sent since then, by Swift's own log."""
        log = subprocess.run(
            ["docker", "exec", CLOUD, "journalctl", "-u", "swift-proxy", "--no-pager", "-o", "cat",
             f"--since=@{since:.0f}"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        return collections.Counter(re.findall(rf"PUT /v1/[^/]+/{self.container}/(training/\S+) ", log))


def archives(folder: Path, name: str, count: int, images: int) -> tuple[list[Path], set[str]]:
    made, paths = [], set()
    for number in range(count):
        made.append(folder / f"{name}{number}.zip")
        with zipfile.ZipFile(made[-1], "w") as archive:
            for image in range(images):
                info = zipfile.ZipInfo(f"training/{number}_{name}{image}.jpg", food11.TIMESTAMP)
                archive.writestr(info, hashlib.sha256(f"{name}{number}-{image}".encode()).digest() * 100)
                paths.add(f"training/class_{number:02d}/{number}_{name}{image}.jpg")
    return made, paths


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    home = tmp_path_factory.mktemp("spread")
    try:
        lines = []
        for name in HOSTS:
            record = nodes.create(name)
            lines.append(
                f"{name} ansible_host={record['address']} ansible_user=cc"
                f" ansible_ssh_private_key_file={record['ssh_key']}"
                " ansible_ssh_common_args='-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null'"
            )
        (home / "inventory").write_text("\n".join(lines) + "\n")
        store.make(home / "store.json")
        known = json.loads((home / "store.json").read_text())
        (home / "store-vars.json").touch(mode=0o600)
        (home / "store-vars.json").write_text(json.dumps({
            "rclone_auth_url": known["auth_url"], "rclone_region": known["region"],
            "rclone_container": known["container"], "etl_container": known["container"],
            "rclone_application_credential_id": known["application_credential_id"],
            "rclone_application_credential_secret": known["application_credential_secret"],
        }))  # fmt: skip
        made = Lab(home, known["container"])
        done = made.play("rclone")
        assert done.returncode == 0, done.stdout[-3000:]
        yield made
    finally:
        for name in HOSTS:
            nodes.destroy(name)
        store.remove(home / "store.json")


@pytest.fixture
def served() -> Iterator[Any]:
    running = []

    def serve(path: Path) -> str:
        server = food11.server(path, GATEWAY, 0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"http://{GATEWAY}:{server.server_address[1]}/{path.name}"

    yield serve
    for server in running:
        server.shutdown()


def progress(host: str) -> dict[str, Any]:
    said = nodes.execute(host, "sh", "-c", 'cat "$(ls -t /run/labctl-etl/job-*.json | head -1)"', check=False)
    return dict(json.loads(said)) if said.strip() else {}


def shares(done: subprocess.CompletedProcess[str]) -> int:
    """How many hosts of the play had a part of the list."""
    recap = re.findall(r"^(\S+)\s+: ok=\d+\s+changed=(\d+)", done.stdout, re.MULTILINE)
    return sum(int(changed) > 0 for _, changed in recap)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["files", "packed"])
def test_each_archive_is_sent_once_by_one_of_two_hosts_and_all_are_shown_together(
    layout: str, lab: Lab, served: Any, tmp_path: Path
) -> None:
    made, paths = archives(tmp_path, layout, 6, 40)
    urls, before, began = [served(path) for path in made], lab.shown(), time.time()
    done = lab.load(urls, layout)
    assert done.returncode == 0, done.stdout[-3000:]
    assert lab.shown() == paths != before
    assert shares(done) == 2, done.stdout[-1500:]
    if layout == "files":
        assert lab.sent(began) == dict.fromkeys(paths, 1), "an image was sent twice, or by nobody"
    left = [name for name in lab.objects() if name.startswith((".labctl/parts", ".labctl/pending", ".labctl/leases"))]
    assert not left
    began = time.time()
    assert lab.load(urls, layout).returncode == 0
    assert not lab.sent(began)


@pytest.mark.slow
def test_a_host_that_dies_loses_nothing_and_nothing_is_shown_before_all_is_there(
    lab: Lab, served: Any, tmp_path: Path
) -> None:
    made, paths = archives(tmp_path, "dies", 4, 200)
    urls, before, began = [served(path) for path in made], lab.shown(), time.time()
    outcome: list[subprocess.CompletedProcess[str]] = []
    play = threading.Thread(target=lambda: outcome.append(lab.load(urls)))
    play.start()
    while not any("_dies" in path and "class_02" in path for path in lab.sent(began)):
        assert play.is_alive(), outcome[0].stdout[-3000:]
        time.sleep(0.5)
    subprocess.run(["docker", "kill", nodes.container_name(HOSTS[1])], check=True, capture_output=True)
    assert lab.shown() == before
    play.join()
    assert lab.shown() == paths, outcome[0].stdout[-3000:]
    twice = [path for path, count in lab.sent(began).items() if count > 1]
    assert len(twice) <= 64, "more was sent again than the dead host had under way"
