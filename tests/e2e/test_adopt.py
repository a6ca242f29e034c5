"""Somebody did the tutorial by hand, then hands it all to labctl: adopt, rebuild, verify, destroy, and nothing is lost.

A lab of its own, beside the other tests' one: no tunnel (its ports are taken), an address and a group of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openstack
import pytest
import yaml
from bench import tutorial
from labctl.lab import Lab
from labctl.models import Credential
from story import REPOSITORY, Commands, sandbox_cloud

pytestmark = pytest.mark.slow
NAME = "e2e-tut"
GROUP = f"allow-ssh-{NAME}"
ARTIFACT = "a model, say\n" * 1000
LOG_RUN = f"""
import mlflow, urllib.request
mlflow.set_tracking_uri("http://127.0.0.1:8000")
with mlflow.start_run(run_name="by hand") as run:
    mlflow.log_metric("accuracy", 0.8125)
    mlflow.log_text({ARTIFACT!r}, "model.txt")
print(run.info.run_id)
"""
READ_RUN = """
import hashlib, json, mlflow, sys
mlflow.set_tracking_uri("http://127.0.0.1:8000")
run = mlflow.get_run(RUN)
text = mlflow.artifacts.load_text(run.info.artifact_uri + "/model.txt")
print(json.dumps([run.data.metrics, hashlib.sha256(text.encode()).hexdigest()]))
"""


@dataclass
class ByHand:
    """What the cells made, the key that opens it, and the file in which the student's ssh remembers the host."""

    cloud: Any
    objects: Any
    key: Path
    address: str
    made: dict[str, str]

    def ssh(self, command: str, *, strict: str = "accept-new") -> str:
        """`ssh cc@ADDRESS`, as a student types it; what it prints on both outputs."""
        known = self.key.with_name("known_hosts")
        options = ["-i", str(self.key), "-o", f"UserKnownHostsFile={known}", "-o", f"StrictHostKeyChecking={strict}"]
        argv = ["ssh", *options, "-o", "BatchMode=yes", f"cc@{self.address}", command]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout[-1500:]}{done.stderr[-1500:]}"
        return done.stdout + done.stderr


def objects_cloud() -> Any:
    """The object store's site, as a user sees it without labctl."""
    clouds = Path(os.environ.get("LABCTL_SANDBOX_STATE", "/var/lib/labctl-sandbox")) / "clouds.yaml"
    config = openstack.config.OpenStackConfig(config_files=[str(clouds)]).get_one("sandbox-objects")
    connection = openstack.connection.Connection(config=config)
    connection.session.session.headers["Connection"] = "close"
    return connection


def environment() -> dict[str, str]:
    """What an openrc file sets."""
    clouds = Path(os.environ.get("LABCTL_SANDBOX_STATE", "/var/lib/labctl-sandbox")) / "clouds.yaml"
    entry = yaml.safe_load(clouds.read_text())["clouds"]["sandbox"]
    login = {f"OS_{key.upper()}": value for key, value in entry["auth"].items()}
    clean = {key: value for key, value in os.environ.items() if not key.startswith("OS_")}
    return {**clean, **login, "OS_AUTH_TYPE": "v3password", "OS_REGION_NAME": entry["region_name"]}


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ByHand]:
    """The tutorial's server, volume, container and credential; whatever is left of them is removed."""
    cloud, objects = sandbox_cloud(), objects_cloud()
    remove(cloud, objects)
    key = tmp_path_factory.mktemp("key") / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    try:
        cloud.create_keypair(NAME, key.with_name("id_ed25519.pub").read_text())
        pool = cloud.network.find_network("public").id
        address = str(cloud.network.create_ip(floating_network_id=pool, description=NAME).floating_ip_address)
        cells = [sys.executable, str(REPOSITORY / "tests" / "tutorial_cells.py"), NAME, NAME, GROUP, address]
        done = subprocess.run(cells, env=environment(), stdout=subprocess.PIPE, text=True, check=True)
        objects.object_store.create_container(name=f"object-persist-{NAME}")
        objects.object_store.upload_object(f"object-persist-{NAME}", "training/class_00/0_1.jpg", data=b"a picture")
        yield ByHand(cloud, objects, key, address, json.loads(done.stdout))
    finally:
        remove(cloud, objects)


def remove(cloud: Any, objects: Any) -> None:
    """All that carries this test's name."""
    for server in [s for s in cloud.compute.servers() if s.name == f"node-persist-{NAME}"]:
        cloud.delete_server(server.id, wait=True, timeout=300)
    for volume in [v for v in cloud.block_storage.volumes() if v.name == f"block-persist-{NAME}"]:
        cloud.block_storage.wait_for_status(volume, "available", failures=["error"], wait=120)
        cloud.delete_volume(volume.id, wait=True, timeout=120)
    for ip in [ip for ip in cloud.network.ips() if str(ip.description).split()[-1:] == [NAME]]:
        cloud.network.delete_ip(ip.id)
    for group in [g for g in cloud.network.security_groups() if g.name == GROUP]:
        cloud.network.delete_security_group(group.id)
    for pair in [k for k in cloud.compute.keypairs() if k.name == NAME]:
        cloud.compute.delete_keypair(pair)
    me = objects.current_user_id
    for one in [c for c in objects.identity.application_credentials(user=me) if c.name == f"data-persist-{NAME}"]:
        objects.identity.delete_application_credential(me, one)
    for container in [c for c in objects.object_store.containers() if c.name == f"object-persist-{NAME}"]:
        for item in list(objects.object_store.objects(container.name)):
            objects.object_store.delete_object(item.name, container=container.name)
        objects.object_store.delete_container(container.name)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, by_hand: ByHand) -> Commands:
    """An empty directory: there is no lab.yaml yet."""
    state = tmp_path_factory.mktemp("state")
    return Commands(tmp_path_factory.mktemp("lab"), quiet=True, environment={"LABCTL_STATE": str(state)})


def test_the_tutorials_lab_is_handed_over_with_every_byte(lab: Commands, by_hand: ByHand, tmp_path: Path) -> None:
    cloud = by_hand.cloud
    set_up_host(by_hand, tmp_path)
    run = by_hand.ssh(f"sudo docker exec -i persist_block-mlflow-1 python3 - <<'X'\n{LOG_RUN}X\n").split()[-1]

    # looking changes nothing
    options = [NAME, "--site", "sandbox", "--ssh-key", str(by_hand.key)]
    assert lab.json("adopt", *options, "--check")["adopted"] is False
    assert not (lab.directory / "lab.yaml").exists()
    assert cloud.compute.get_server(by_hand.made["server"]).metadata == {}

    adopted = lab.json("--yes", "adopt", *options)
    assert (adopted["server"], adopted["volume"]) == (by_hand.made["server"], by_hand.made["volume"])
    assert adopted["container"] == f"object-persist-{NAME}"
    again = lab.json("adopt")
    assert again["adopted"] is True, again

    # the tutorial's containers still run: they are stopped before the volume goes
    lab.run("rebuild")
    status = lab.json("status")
    assert status["server"]["id"] != by_hand.made["server"]
    assert status["server"]["address"] == by_hand.address
    assert status["volume"]["id"] == by_hand.made["volume"]
    read = READ_RUN.replace("RUN", repr(run))
    said = lab.ssh(f"sudo docker exec -i mlflow python3 - <<'X'\n{read}X\n")
    assert json.loads(said.splitlines()[-1]) == [{"accuracy": 0.8125}, hashlib.sha256(ARTIFACT.encode()).hexdigest()]
    # the student's own ssh knows the new server, and says nothing
    assert by_hand.ssh("sudo ls -l /mnt/block/.labctl/ssh | wc -l", strict="yes").split() == ["4"]
    assert lab.ssh("cat /mnt/object/training/class_00/0_1.jpg") == "a picture"
    assert lab.json("verify")["earlier_runs"] >= 1


def set_up_host(by_hand: ByHand, tmp_path: Path) -> None:
    """What the tutorial has one type into the server: Docker, rclone, the mounts, the stack."""
    cloud = by_hand.objects
    made = cloud.identity.create_application_credential(
        cloud.current_user_id, name=f"data-persist-{NAME}", roles=[{"name": "member"}, {"name": "reader"}]
    )
    ctx = tutorial.context(Lab(lab=NAME, site="sandbox"), str(tmp_path))
    volume = by_hand.made["volume"]
    by_hand.ssh("for i in $(seq 60); do systemctl is-system-running --wait && exit 0; sleep 1; done; exit 0")
    for command in (
        *tutorial.host_setup(ctx, Credential(made.id, made.name, None, made.secret)),
        *tutorial.format_volume(volume),
        *tutorial.mount_volume(volume),
        *tutorial.start_stack(ctx),
    ):
        by_hand.ssh(command)


def test_destroy_takes_what_was_adopted_and_leaves_what_was_not(lab: Commands, by_hand: ByHand) -> None:
    gone = " ".join(lab.json("--yes", "destroy")["destroyed"])
    for part in (f"node-persist-{NAME}", by_hand.made["volume"], "1 objects", by_hand.address):
        assert part in gone, gone
    cloud = by_hand.cloud
    assert not [s for s in cloud.compute.servers() if s.name == f"node-persist-{NAME}"]
    assert not [v for v in cloud.block_storage.volumes() if v.id == by_hand.made["volume"]]
    assert not [ip for ip in cloud.network.ips() if ip.floating_ip_address == by_hand.address]
    assert not [c for c in by_hand.objects.object_store.containers() if c.name == f"object-persist-{NAME}"]
    # the group is the whole class's, the key pair and the application credential are the student's own
    assert cloud.network.get_security_group(by_hand.made["group"]).name == GROUP
    assert cloud.compute.get_keypair(NAME)
