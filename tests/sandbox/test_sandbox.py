"""A throw-away sandbox beside whatever runs here: what it keeps, what it leaves alone, what it must not tell.

Its name, prefix and state directory are its own; LABCTL_SANDBOX_TEST_PREFIX moves it if 172.28 is taken.
Takes about 5 minutes when the images are built.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openstack
import pytest
from labctl.errors import ConfigError
from labctl.sandbox import SandboxConfig, destroy, down, status, up
from labctl.sandbox.control import registry_port
from labctl.sandbox.docker import docker
from labctl.sandbox.lifecycle import own_containers
from labctl.sandbox.services import MANIFESTS, listed
from labctl.sandbox.upstream import NotThere, resolve

pytestmark = pytest.mark.sandbox
PREFIX = os.environ.get("LABCTL_SANDBOX_TEST_PREFIX", "172.28")
CONFIG = SandboxConfig("labctl-sandbox-test", PREFIX, Path("/var/lib/labctl-sandbox-test"))
FOREIGN = "labctl-sandbox-test-foreign"


def tell(sentence: str) -> None:
    print(f"{time.monotonic():.1f} {sentence}", flush=True)


def bring_up() -> None:
    assert up(tell, images="build", config=CONFIG).state == "running"


def connect(entry: str = "sandbox") -> Any:
    auth = json.loads(CONFIG.clouds_file.read_text())["clouds"][entry]
    return openstack.connect(
        **auth["auth"], region_name=auth["region_name"], load_yaml_config=False, load_envvars=False
    )


def wait(what: str, condition: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(1)
    raise AssertionError(f"{what}: not within {seconds} s")


def inside(server: str, script: str) -> str:
    """Runs a script in a server, as its root."""
    return docker("exec", f"inst-{server}", "sh", "-ec", script)


def disk_of(volume: str) -> str:
    return f"/dev/disk/by-id/virtio-{volume[:20]}"


@pytest.fixture(scope="module")
def foreign() -> Iterator[dict[str, str]]:
    """A container and a loop device that aren't the sandbox's, though the file has a volume's name."""
    folder = Path("/tmp/labctl-sandbox-foreign")
    folder.mkdir(exist_ok=True)
    file = folder / "volume-00000000-0000-0000-0000-000000000000"
    file.write_bytes(b"\0" * 2**20)
    docker("rm", "-f", FOREIGN, check=False)
    loop = subprocess.run(
        ["losetup", "--find", "--show", str(file)], capture_output=True, text=True, check=True
    ).stdout.strip()
    docker("create", "--name", FOREIGN, "--label", "labctl.sandbox.name=another", "labctl-sandbox-node:CC-Ubuntu24.04")
    yield {"loop": loop, "file": str(file)}
    assert docker("ps", "-aq", "--filter", f"name=^{FOREIGN}$").strip(), "a foreign container was removed"
    docker("rm", FOREIGN)
    backing = subprocess.run(["losetup", "-n", "-O", "BACK-FILE", loop], capture_output=True, text=True, check=True)
    subprocess.run(["losetup", "-d", loop], check=True)
    assert backing.stdout.strip() == str(file), "a foreign loop device was detached"
    file.unlink()
    folder.rmdir()


@pytest.fixture(scope="module")
def cloud(foreign: dict[str, str]) -> Iterator[dict[str, str]]:
    """The sandbox with a server, a volume attached to it, and an object: ids and checksums."""
    bring_up()
    c, store = connect(), connect("sandbox-objects")
    network = c.network.find_network("sharednet1")
    server = c.compute.create_server(
        name="keeper",
        image_id=c.image.find_image("CC-Ubuntu24.04").id,
        flavor_id=c.compute.find_flavor("m1.small").id,
        networks=[{"uuid": network.id}],
    )
    wait("server ACTIVE", lambda: c.compute.get_server(server).status == "ACTIVE")
    address = c.network.create_ip(floating_network_id=c.network.find_network("public").id)
    port = next(c.network.ports(device_id=server.id))
    c.network.update_ip(address, port_id=port.id)
    volume = c.block_storage.create_volume(size=1, name="bytes")
    wait("volume available", lambda: c.block_storage.get_volume(volume).status == "available")
    c.compute.create_volume_attachment(server, volume_id=volume.id)
    wait("volume in use", lambda: c.block_storage.get_volume(volume).status == "in-use")
    disk = disk_of(volume.id)
    wait("disk", lambda: docker("exec", f"inst-{server.id}", "sh", "-c", f"test -b {disk} && echo y", check=False))
    inside(server.id, f"head -c 8M /dev/urandom | dd of={disk} conv=fsync 2>/dev/null")
    checksum = inside(server.id, f"head -c 8M {disk} | sha256sum").split()[0]
    store.object_store.create_container(name="kept")
    content = os.urandom(100_000)
    store.object_store.upload_object("kept", "object", data=content)
    yield {
        "server": server.id,
        "volume": volume.id,
        "bytes": checksum,
        "object": hashlib.sha256(content).hexdigest(),
        "address": address.floating_ip_address,
    }
    destroy(tell, config=CONFIG)
    assert status(CONFIG).state == "absent"
    assert not CONFIG.state.exists()
    assert own_containers(CONFIG) == []


def everything_is_there(cloud: dict[str, str]) -> None:
    wait(
        "disk", lambda: disk_of(cloud["volume"]) in inside(cloud["server"], "ls /dev/disk/by-id/* 2>/dev/null || true")
    )
    assert inside(cloud["server"], f"head -c 8M {disk_of(cloud['volume'])} | sha256sum").split()[0] == cloud["bytes"]
    content = connect("sandbox-objects").object_store.download_object("object", container="kept")
    assert hashlib.sha256(content).hexdigest() == cloud["object"]
    assert connect().compute.get_server(cloud["server"]).status == "ACTIVE"
    wait("floating IP", lambda: cloud["address"] in inside(cloud["server"], "ip -4 addr show dev eth0"), 30)
    table = inside(cloud["server"], "nft list table inet labcloud")
    assert "drop" in table, "security groups aren't enforced"


def test_a_second_up_changes_nothing_and_takes_seconds(cloud: dict[str, str]) -> None:
    before = status(CONFIG)
    begin = time.monotonic()
    bring_up()
    assert time.monotonic() - begin < 5
    assert status(CONFIG).servers == before.servers


def test_nobody_but_root_reads_the_credentials_and_docker_inspect_has_none(cloud: dict[str, str]) -> None:
    assert CONFIG.state.stat().st_mode & 0o777 == 0o700
    for name in ("clouds.yaml", "passwords.json", "images.json"):
        assert (CONFIG.state / name).stat().st_mode & 0o777 == 0o600, name
    shown = docker("inspect", *(c["container"] for c in own_containers(CONFIG)))
    internal = json.loads(docker("exec", CONFIG.name, "cat", "/etc/labcloud/internal.json"))
    secrets = {*json.loads((CONFIG.state / "passwords.json").read_text()).values(), *internal.values()}
    assert len(secrets) == 2 + len(internal), "every password is its own"
    assert not [s for s in secrets if s in shown]


def test_no_password_of_the_image_works_and_none_is_left_in_a_file(cloud: dict[str, str]) -> None:
    for user, password in (("student", "build-student"), ("admin", "build-admin"), ("nova", "build-user-nova")):
        project = {"student": "CHI-TEST", "admin": "admin"}.get(user, "service")
        session = openstack.connect(
            auth_url=f"http://{CONFIG.address}:5000/v3", username=user, password=password, project_name=project,
            user_domain_id="default", project_domain_id="default", load_yaml_config=False, load_envvars=False,
        )  # fmt: skip
        with pytest.raises(Exception, match="401"):
            session.authorize()
    found = docker(
        *("exec", CONFIG.name, "sh", "-c", "grep -rlE 'build-(user|db|rabbit|swift)' /etc --include='*.conf' || true")
    )
    assert found == ""
    refused = docker(
        *("exec", CONFIG.name, "mysql", "-h127.0.0.1", "-unova", "-pbuild-db-nova", "-e", "select 1"), check=False
    )
    assert refused == ""


def test_images_are_pulled_by_digest_from_the_registry(cloud: dict[str, str]) -> None:
    catalogue = json.loads(CONFIG.images_file.read_text())
    assert catalogue["registry"] == CONFIG.registry_address
    assert {"postgres", "s3", "mlflow", "jupyter", "rclone"} == set(catalogue["images"])
    for reference in catalogue["images"].values():
        host, _, rest = reference.partition("/")
        name, digest = rest.split("@")
        curl = f"curl -s -o /dev/null -w '%{{http_code}}' -H 'Accept: {MANIFESTS}'"
        code = inside(cloud["server"], f"{curl} http://{host}/v2/{name}/manifests/{digest}")
        assert code == "200", reference


def test_a_tag_is_resolved_to_the_digest_that_its_registry_has(cloud: dict[str, str]) -> None:
    """The code that asks upstream's registries, asked of a real one: ours."""
    host = registry_port(CONFIG)
    wanted = json.loads(CONFIG.images_file.read_text())["images"]["rclone"].split("@")[1]
    version = next(s.version for s in listed() if s.name == "rclone")
    assert resolve(f"{host}/labctl/rclone:{version}", scheme="http") == f"{host}/labctl/rclone@{wanted}"
    with pytest.raises(NotThere, match="404"):
        resolve(f"{host}/labctl/rclone:no-such-tag", scheme="http")


def test_down_and_up_bring_back_servers_volumes_and_objects(cloud: dict[str, str]) -> None:
    everything_is_there(cloud)
    stopped = down(tell, config=CONFIG)
    assert stopped.state == "stopped"
    assert stopped.volumes == 1
    assert stopped.loop_devices == 0
    assert not any(c["running"] for c in own_containers(CONFIG))
    begin = time.monotonic()
    bring_up()
    print(f"up after down: {time.monotonic() - begin:.0f} s")
    everything_is_there(cloud)


@pytest.mark.parametrize("seconds", [2, 8])
def test_ctrl_c_during_up_then_up_finishes(cloud: dict[str, str], seconds: float) -> None:
    down(tell, config=CONFIG)
    script = (
        "import signal, pathlib; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from labctl.sandbox import up, SandboxConfig; "
        f"up(print, images='build', config=SandboxConfig({CONFIG.name!r}, {CONFIG.prefix!r}, "
        f"pathlib.Path({str(CONFIG.state)!r})))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) != 0
    bring_up()
    everything_is_there(cloud)


def test_a_docker_restart_of_the_control_plane_needs_no_help(cloud: dict[str, str]) -> None:
    docker("restart", CONFIG.name)
    docker("exec", CONFIG.name, "labcloud-ready", "600", timeout=700)
    everything_is_there(cloud)


def test_a_reboot_of_the_machine_brings_each_volume_back_to_its_own_server(
    cloud: dict[str, str], foreign: dict[str, str]
) -> None:
    """Loop devices are gone, and the number that a volume had may be somebody else's now."""
    [server] = [c["container"] for c in own_containers(CONFIG, servers_only=True)]
    before = json.loads(docker("exec", server, "cat", "/var/lib/labnode/volumes.json"))[0]
    docker("kill", CONFIG.name, server, CONFIG.registry_name)
    subprocess.run(["losetup", "-d", f"/dev/{before['loop']}"], check=True)
    subprocess.run(["ip", "route", "del", CONFIG.floating_subnet], check=True)
    stranger = Path(foreign["file"]).with_name("stranger")
    stranger.write_bytes(b"\0" * 2**20)
    subprocess.run(["losetup", f"/dev/{before['loop']}", str(stranger)], check=True)
    try:
        docker("start", server, CONFIG.registry_name)  # as the engine does by itself after a reboot
        time.sleep(4)
        assert inside(server.removeprefix("inst-"), "ls /dev/disk/by-id").split() == []
        bring_up()
        everything_is_there(cloud)
        after = json.loads(docker("exec", server, "cat", "/var/lib/labnode/volumes.json"))[0]
        assert after["loop"] != before["loop"]
        assert stranger.read_bytes() == b"\0" * 2**20
    finally:
        subprocess.run(["losetup", "-d", f"/dev/{before['loop']}"], check=True)
        stranger.unlink()


def test_a_network_of_the_same_name_that_is_not_ours_is_left_alone() -> None:
    other = SandboxConfig("labctl-sandbox-test-net", "172.27", Path("/tmp/labctl-sandbox-test-net"))
    docker("network", "create", "--subnet", "172.27.9.0/24", other.name)
    try:
        with pytest.raises(ConfigError, match="isn't this sandbox's"):
            up(tell, images="build", config=other)
        destroy(tell, config=other)
        assert docker("network", "ls", "-q", "--filter", f"name=^{other.name}$").strip()
    finally:
        docker("network", "rm", other.name)
