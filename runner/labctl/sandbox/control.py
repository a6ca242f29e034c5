"""The network, the control plane's and the registry's containers: started, asked whether they answer, stopped."""

from __future__ import annotations

import json
import secrets
import subprocess
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from labctl.errors import ConfigError, ConvergeFailed
from labctl.sandbox import images
from labctl.sandbox.board import Job
from labctl.sandbox.config import SandboxConfig
from labctl.sandbox.docker import Commands, DockerError, docker, inspect, socket_path
from labctl.sandbox.files import read_json, write_private

#: Port and path of each API; the path answers without a log-in.
APIS = {
    "identity": (5000, "/"),
    "image": (9292, "/"),
    "placement": (8778, "/"),
    "compute": (8774, "/"),
    "network": (9696, "/"),
    "volume": (8776, "/"),
    "object-store": (8080, "/healthcheck"),
    "reservation": (1234, "/"),
}
#: Seconds. 30 to 50 on two idle cores; ten times that is a machine that does much else, not a failure.
READY_S = 600


def is_running(container: str) -> bool | None:
    """True, False, or None if there is no such container."""
    found = inspect("container", container)
    return None if found is None else bool(found["State"]["Running"])


def ensure_network(config: SandboxConfig) -> None:
    """The Docker network of the servers, and this machine's route to the floating IPs.

    Raises ConfigError if the name, the addresses or the route belong to something else.
    """
    found = inspect("network", config.name)
    if found is None:
        try:
            docker(
                *("network", "create", "-d", "bridge", *config.labels),
                *("--subnet", config.subnet, "--gateway", config.gateway, "--ip-range", config.docker_range),
                *("-o", f"com.docker.network.bridge.name={config.bridge}", config.name),
            )
        except DockerError as error:
            raise ConfigError(
                "the sandbox's network can't be made",
                expected=f"{config.subnet} to be free on this machine",
                source="LABCTL_SANDBOX_SUBNET_PREFIX",
                next_step="LABCTL_SANDBOX_SUBNET_PREFIX=172.28 labctl sandbox up  (or another private prefix)",
                detail=error.detail,
            ) from error
    elif (found["Labels"] or {}).get("labctl.sandbox.name") != config.name:
        raise ConfigError(
            f"a Docker network of the name {config.name} exists and isn't this sandbox's",
            next_step=f"remove it (docker network rm {config.name}) or set LABCTL_SANDBOX_NAME",
        )
    route = ["ip", "-j", "route", "show", "exact", config.floating_subnet]
    there = json.loads(subprocess.run(route, capture_output=True, check=False).stdout or b"[]")
    if foreign := [r for r in there if r.get("dev") != config.bridge]:
        raise ConfigError(
            "this machine has another route to the sandbox's floating IPs",
            expected=f"{config.floating_subnet} on {config.bridge}",
            found=f"{foreign[0].get('dev')} via {foreign[0].get('gateway', 'the link')}",
            next_step="LABCTL_SANDBOX_SUBNET_PREFIX=172.28 labctl sandbox up  (or another private prefix)",
        )
    if not there:
        subprocess.run(["ip", "route", "add", config.floating_subnet, "dev", config.bridge], check=True)


def passwords(config: SandboxConfig) -> dict[str, str]:
    """The two passwords that are used from outside, `admin` and `student`; made once per sandbox.

    Those between the services are made inside the control plane and never leave it.
    """
    path = config.state / "passwords.json"
    found: dict[str, str] | None = read_json(path)
    if found is None:
        found = {"admin": secrets.token_hex(16), "student": secrets.token_hex(16)}
        write_private(path, json.dumps(found))
    return found


def overlay() -> dict[str, tuple[bytes, int]]:
    """What every server gets from this machine: its CA bundle, and pip told to use it."""
    if not images.CA_BUNDLE.is_file():
        return {}
    top = "opt/labcloud/overlay/etc"
    return {
        f"{top}/ssl/certs/ca-certificates.crt": (images.CA_BUNDLE.read_bytes(), 0o644),
        f"{top}/pip.conf": (b"[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n", 0o644),
    }


def start_cloud(config: SandboxConfig, job: Job) -> None:
    """Starts the control plane's container, made from the image if there is none."""
    running = is_running(config.name)
    if running is None:
        # `create` and the files that it can't do without are one step: a container without them never starts
        docker(
            *("create", "--name", config.name, "--hostname", "labctl-sandbox", *config.labels, *images.RUN_FLAGS),
            *("--network", config.name, "--ip", config.address, "--restart", "unless-stopped", "--stop-timeout", "60"),
            *("--device", "/dev/loop-control"),
            *("--device-cgroup-rule", "b 7:* rmw", "--device-cgroup-rule", "b 259:* rmw"),
            *("-v", f"{socket_path()}:/opt/labcloud/docker.sock"),
            *("-v", f"{config.volumes}:/var/lib/labcloud/volumes", images.cloud_image()),
        )
    if not running:
        files = {
            "etc/labcloud.env": (images.cloud_environment(config, config.name), 0o644),
            "etc/labcloud/passwords.json": (json.dumps(passwords(config)).encode(), 0o600),
        }
        docker("cp", "-", f"{config.name}:/", data=images.tar_of(files | overlay()))
        docker("start", config.name)
    job.note("booting")


def settle_cloud(
    config: SandboxConfig, commands: Commands, job: Job, *, require_lease: bool, appcred_leases: bool
) -> None:
    """Applies the two lease settings and waits until every API and every service behind it has answered.

    Raises ConvergeFailed, with the names of failed units, if that takes longer than `READY_S` seconds.
    """
    docker("exec", config.name, "labcloud-settings", str(int(require_lease)), str(int(appcred_leases)))

    def on_line(line: str) -> None:
        job.note(line)
        if line.endswith("answers"):
            job.say(f"{job.name}: {line}")

    job.note("waiting for the first API, identity")
    try:
        commands.run(["docker", "exec", config.name, "labcloud-ready", str(READY_S)], "labctl-sandbox-ready", on_line)
    except ConvergeFailed as error:
        failed = docker("exec", config.name, "systemctl", "--failed", "--no-legend", check=False)
        raise ConvergeFailed(
            "the cloud doesn't answer",
            expected=f"every API to answer within {READY_S} s",
            found=error.detail.splitlines()[-1] if error.detail else "",
            source=error.source,
            next_step=f"docker exec {config.name} journalctl -b -p warning -n 100",
            detail=failed,
        ) from error


def boot_of(config: SandboxConfig) -> dict[str, str] | None:
    """Which boot of which control plane is running; None if none is."""
    found = inspect("container", config.name)
    if found is None or not found["State"]["Running"]:
        return None
    return {"id": str(found["Id"]), "started": str(found["State"]["StartedAt"])}


def answering(config: SandboxConfig, seconds: float = 2) -> dict[str, bool]:
    """Which APIs answer at all now: any HTTP status below 500, each asked at the same time."""

    def ask(port: int, path: str) -> bool:
        url = f"http://{config.address}:{port}{path}"
        try:
            with urllib.request.urlopen(url, timeout=seconds):
                return True
        except urllib.error.HTTPError as error:
            return error.code < 500
        except (OSError, ValueError):
            return False

    with ThreadPoolExecutor(len(APIS)) as pool:
        return dict(zip(APIS, pool.map(lambda api: ask(*api), APIS.values()), strict=True))


def write_clouds(config: SandboxConfig) -> None:
    """clouds.yaml for the student, 0600: one entry per region, as Chameleon has them on two sites."""
    auth = {
        "auth_url": f"http://{config.address}:5000/v3",
        "username": "student",
        "password": passwords(config)["student"],
        "project_name": "CHI-TEST",
        "user_domain_name": "Default",
        "project_domain_name": "Default",
    }
    clouds = {
        name: {"auth": auth, "region_name": region, "interface": "public", "identity_api_version": 3}
        for name, region in (("sandbox", "KVM@TACC"), ("sandbox-objects", "CHI@TACC"))
    }
    text = json.dumps({"clouds": clouds}, indent=2) + "\n"  # JSON is YAML, and needs no library
    if not config.clouds_file.exists() or config.clouds_file.read_text() != text:
        write_private(config.clouds_file, text)


def start_registry(config: SandboxConfig) -> None:
    """Starts the registry. This machine pushes to it by a port on 127.0.0.1, which every engine trusts without TLS."""
    running = is_running(config.registry_name)
    if running is None:
        docker(
            *("create", "--name", config.registry_name, *config.labels, "--restart", "unless-stopped"),
            *("--network", config.name, "--ip", config.registry_address.split(":")[0], "-p", "127.0.0.1::5000"),
            *("--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--read-only"),
            *("-v", f"{config.state / 'registry'}:/var/lib/registry", images.registry_image()),
        )
    if not running:
        docker("start", config.registry_name)


def registry_port(config: SandboxConfig) -> str:
    """127.0.0.1:PORT of the registry on this machine; it may change when the container starts."""
    return docker("port", config.registry_name, "5000/tcp").split()[0]


def memory_mib(container_id: str, top: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's processes use, in MiB, from its cgroup (v2 or v1); None where it can't be read."""
    for path in (
        f"system.slice/docker-{container_id}.scope/memory.current",
        f"docker/{container_id}/memory.current",
        f"memory/docker/{container_id}/memory.usage_in_bytes",
        f"memory/system.slice/docker-{container_id}.scope/memory.usage_in_bytes",
    ):
        try:
            used = int((top / path).read_text())
            stat = (top / path).with_name("memory.stat").read_text().splitlines()
        except (OSError, ValueError):
            continue
        # the page cache is counted too, and goes away when memory is short
        cache = next((int(s.split()[1]) for s in stat if s.startswith(("inactive_file ", "total_inactive_file "))), 0)
        return (used - cache) // 2**20
    return None
