"""After the loss of the server: the same data under the same services, and nothing made anew on the volume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LABCTL = Path(sys.executable).with_name("labctl")
LAB = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "lab.yaml"
SERVICES = {"mlflow", "postgres", "s3", "jupyter"}


def labctl(*arguments: str) -> Any:
    command = [str(LABCTL), "--lab", str(LAB), "--json", *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.fixture(scope="module")
def status() -> Any:
    return labctl("status")


def test_the_run_that_was_logged_before_the_loss_is_read_back_by_its_hash() -> None:
    recorded = json.loads((LAB.parent / "recorded.json").read_text())
    assert recorded["run_id"]
    assert labctl("verify", "--read-only")["earlier_runs"] >= 2  # that one, and the one that rebuild's own check logged


def test_every_service_is_healthy_again(status: Any) -> None:
    assert {name for name, service in status["services"].items() if service["healthy"]} == SERVICES


def test_the_volume_was_mounted_and_not_made_anew(host: Any, status: Any) -> None:
    marker = json.loads(host.run("sudo cat /mnt/block/.labctl/volume.json").stdout)
    assert marker["volume_id"] == status["volume"]["id"]
    assert marker["filesystem_uuid"] == status["volume"]["filesystem_uuid"]
    assert marker["created"] != marker["last_attached_to"]


def test_the_object_store_is_mounted_read_only_for_host_and_jupyter(host: Any) -> None:
    assert "ro," in host.run("findmnt -no OPTIONS /mnt/object").stdout
    assert host.run("sudo docker exec jupyter ls /mnt/Food-11").rc == 0


def test_services_listen_on_the_loopback_only(host: Any) -> None:
    listening = host.run("ss -Hltn").stdout.split("\n")
    for port in (8000, 8888, 9000, 9001):
        mine = [line for line in listening if f":{port} " in line]
        assert mine and all(f"127.0.0.1:{port}" in line for line in mine)
