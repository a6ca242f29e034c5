"""The object store in its other dialect: the same objects for whoever reads the mount, and no key left behind."""

from __future__ import annotations

import http.server
import random
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import yaml
from story import Commands, sandbox_cloud

#: The machine's own address on the sandbox's network, as the lab's server sees it.
HOST = "172.29.0.1"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    with http.server.ThreadingHTTPServer((HOST, 0), partial(Quiet, directory=str(folder))) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://{HOST}:{web.server_address[1]}"
        web.shutdown()


def archive(path: Path) -> None:
    dice = random.Random(3)
    with zipfile.ZipFile(path, "w") as file:
        for split in ("training", "validation"):
            for number in range(6):
                file.writestr(f"tiny/{split}/{number % 2}_{number}.jpg", dice.randbytes(3000))


def keys() -> set[str]:
    """The access keys of the sandbox's user."""
    cloud = sandbox_cloud()
    listed = cloud.identity.get(f"/users/{cloud.current_user_id}/credentials/OS-EC2").json()
    return {one["access"] for one in listed["credentials"]}


@pytest.fixture
def lab_yaml(lab: Commands) -> Iterator[Path]:
    """The lab's own, as it was afterwards; the server speaks Swift again."""
    path = lab.directory / "lab.yaml"
    before = path.read_text()
    yield path
    path.write_text(before)


def test_a_dataset_is_loaded_read_and_left_over_s3_and_then_over_swift(
    lab: Commands, lab_yaml: Path, tmp_path: Path
) -> None:
    lab.run("up")
    before = yaml.safe_load(lab_yaml.read_text())
    archive(tmp_path / "tiny.zip")

    def speak(dialect: str, url: str) -> None:
        dataset = {"name": "tiny", "url": f"{url}/tiny.zip", "classes": 2, "splits": ["training", "validation"]}
        lab_yaml.write_text(yaml.safe_dump({**before, "object_store": {"dialect": dialect}, "dataset": dataset}))

    with served(tmp_path) as url:
        speak("s3", url)
        lab.run("converge", "--only", "rclone")
        assert lab.json("status")["credential"] == {"dialect": "s3", "ends": None}
        made = lab.ssh("sudo sed -n 's/^access_key_id = //p' /etc/rclone/rclone.conf").strip()
        assert made in keys()
        lab.run("etl")
        over_s3 = lab.ssh("cd /mnt/object && find . -name '*.jpg' | sort | xargs sha256sum")
        assert over_s3.count(".jpg") == 12
        # more than one part: what S3 clients cut, Swift must put together
        rclone = "sudo rclone --config /etc/rclone/rclone.conf"
        container = lab.json("status")["object_store"]["container"]
        path = f"chi_tacc:{container}/parts.bin"
        lab.ssh("head -c 12000000 /dev/urandom > /tmp/parts.bin")
        lab.ssh(f"{rclone} copyto /tmp/parts.bin {path} --s3-upload-cutoff 5Mi")
        assert lab.json("converge", "--only", "rclone")["changed"] == 0

        speak("swift", url)
        lab.run("converge", "--only", "rclone")
        assert made not in keys()
        assert lab.json("status")["credential"]["dialect"] == "swift"
        assert lab.ssh("cd /mnt/object && find . -name '*.jpg' | sort | xargs sha256sum") == over_s3
        lab.ssh("cmp /tmp/parts.bin /mnt/object/parts.bin")
        before_second_load = lab.json("status")["object_store"]["objects"]
        lab.run("etl")
        assert lab.json("status")["object_store"]["objects"] == before_second_load
    assert lab.json("doctor")["healthy"] is True
