"""up, down, destroy and status of the sandbox: the order of the steps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from labctl.errors import CloudRefused, ConfigError, ConvergeFailed
from labctl.models import Tell
from labctl.sandbox import control, images, loops, services
from labctl.sandbox.board import Board, Job
from labctl.sandbox.config import SandboxConfig
from labctl.sandbox.docker import Commands, docker, engine_answers, inspect, start_engine
from labctl.sandbox.files import MARKER, locked, prepare_state, read_json, write_private
from labctl.sandbox.services import Source

#: What the sandbox needs of the machine, and the Debian and Ubuntu packages that bring it.
TOOLS = {"ip": "iproute2", "losetup": "mount", "docker": "docker.io"}


@dataclass(frozen=True)
class SandboxStatus:
    """What there is of a sandbox.

    `apis` says of each API whether it answers; `servers` are {"id", "name", "running"}; `volumes` counts backing
    files, of which `loop_devices` are attached; `memory_mib` is the control plane's use. `service_images` are the
    references that servers pull, `registry` is "" where none of them is in the sandbox's own.
    """

    state: Literal["running", "stopped", "absent"]
    apis: dict[str, bool] = field(default_factory=dict)
    servers: tuple[dict[str, Any], ...] = ()
    volumes: int = 0
    loop_devices: int = 0
    registry: str = ""
    registry_running: bool = False
    service_images: dict[str, str] = field(default_factory=dict)
    s3_flavour: str = ""
    image: str = ""
    image_is_current: bool = True
    memory_mib: int | None = None
    address: str = ""
    clouds_file: str = ""
    state_directory: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def up(
    tell: Tell,
    *,
    images: Source = "auto",
    require_lease: bool | None = None,
    appcred_leases: bool | None = None,
    config: SandboxConfig | None = None,
) -> SandboxStatus:
    """Brings the sandbox up: builds what is missing, starts what doesn't run, waits until every API has answered.

    Safe to run again at any time, also after an interruption, a reboot of the machine or `down`; what exists stays.
    `images` says where service images come from: "auto" pulls each by digest if its registry answers and builds it
    otherwise, "pull" insists, "build" asks no registry. `require_lease`: no server without a Blazar lease, as on
    KVM@TACC. `appcred_leases`: application credentials may make leases. Both are off in a new sandbox; None leaves
    them as they are.

    Raises ConfigError for what the machine lacks and ConvergeFailed for a build or a service that failed, with its log.
    """
    config = config or SandboxConfig.from_environment()
    check_machine("up")
    with locked(config, tell):
        prepare_state(config)
        start_engine(config.logs, tell)
        settings = _lease_settings(config, require_lease=require_lease, appcred_leases=appcred_leases)
        if not _untouched(config, settings, images):
            _bring_up(config, tell, settings, images)
        return status(config)


def _lease_settings(config: SandboxConfig, **wanted: bool | None) -> dict[str, bool]:
    """The wanted settings, and where None is wanted the ones of the last `up`."""
    file = config.state / "settings.json"
    kept = read_json(file) or {}
    settings = {name: bool(kept.get(name)) if value is None else value for name, value in wanted.items()}
    if settings != kept:
        write_private(file, json.dumps(settings))
    return settings


def _untouched(config: SandboxConfig, settings: dict[str, bool], source: Source) -> bool:
    """Whether this very boot was seen to answer with these settings, answers now, and nothing is to be built."""
    ready = {"boot": control.boot_of(config), "settings": settings}
    return (
        ready["boot"] is not None
        and read_json(config.state / "ready.json") == ready
        and control.is_running(config.registry_name) is True
        and images.node_is_current()
        and services.complete(config, source)
        and all(control.answering(config).values())
    )


def _bring_up(config: SandboxConfig, tell: Tell, settings: dict[str, bool], source: Source) -> None:
    board = Board()
    commands = Commands(config.logs, board.stop)
    control.ensure_network(config)

    def cloud_starts(job: Job) -> None:
        if inspect("container", config.name) is None:
            images.build_cloud(config, commands, job)
        control.start_cloud(config, job)

    def cloud_answers(job: Job) -> None:
        control.settle_cloud(config, commands, job, **settings)
        control.write_clouds(config)

    def registry_starts(job: Job) -> None:
        images.build_registry(commands, job)
        job.note("starting")
        control.start_registry(config)

    debian = board.start("Debian", lambda job: images.build_debian(commands, config.state, job))
    cloud = board.start("OpenStack", cloud_starts, (debian,))
    node = board.start("server image", lambda job: images.build_node(commands, job), (debian,))
    base = board.start("base image", lambda job: images.build_base(commands, config.state, job), (debian,))
    registry = board.start("registry", registry_starts, (debian,))
    services.Maker(config, commands, source).start_all(board, base, registry)
    board.start("OpenStack", cloud_answers, (cloud, node))
    board.finish(tell)
    write_private(config.state / "ready.json", json.dumps({"boot": control.boot_of(config), "settings": settings}))


def image(tell: Tell, name: str, *, source: Source = "auto", config: SandboxConfig | None = None) -> str:
    """One service image for the servers of a running sandbox, also one that `up` doesn't make; its full reference.

    Safe to run again: it is built when its files have changed, and pushed when the registry lacks it. Raises
    ConfigError for a name that versions.json doesn't have and for a sandbox that doesn't run.
    """
    config = config or SandboxConfig.from_environment()
    check_machine(f"image {name}")
    known = {one.name: one for one in (*services.listed(), *services.listed(optional=True))}
    if name not in known:
        raise ConfigError(
            f"There is no service image {name}.",
            expected=", ".join(known),
            source="sandbox/images/versions.json",
            next_step="labctl sandbox image NAME",
        )
    with locked(config, tell):
        if not engine_answers() or control.is_running(config.registry_name) is not True:
            raise ConfigError("The sandbox doesn't run.", next_step="labctl sandbox up")
        board = Board()
        commands = Commands(config.logs, board.stop)
        base = board.start("base image", lambda job: images.build_base(commands, config.state, job))
        services.Maker(config, commands, source).start_one(board, known[name], base)
        board.finish(tell)
        return str(services.summary(config)["images"][name])


def need_root(command: str) -> None:
    """Raises ConfigError if this isn't root: the state directory is root's alone."""
    if os.geteuid() != 0:
        raise ConfigError(
            "the sandbox needs root: it makes a network, routes and loop devices",
            expected="uid 0",
            found=f"uid {os.geteuid()}",
            next_step=f"sudo labctl sandbox {command}",
        )


def check_machine(command: str) -> None:
    """Raises ConfigError if this isn't root or a tool is missing, with the command that mends it."""
    need_root(command)
    missing = {package for tool, package in TOOLS.items() if shutil.which(tool) is None}
    if not Path("/dev/loop-control").exists() and shutil.which("modprobe"):
        subprocess.run(["modprobe", "loop"], check=False, capture_output=True)
    if missing:
        raise ConfigError(
            "the sandbox needs tools that aren't installed",
            expected=", ".join(sorted(TOOLS)),
            found="missing: " + ", ".join(t for t in sorted(TOOLS) if shutil.which(t) is None),
            next_step="apt-get install -y " + " ".join(sorted(missing)),
        )


def own_containers(config: SandboxConfig, *, servers_only: bool = False) -> list[dict[str, Any]]:
    """This sandbox's containers, found by its label alone: {"container", "id", "name", "running"}."""
    filters = ["--filter", f"label={config.own_label}"]
    if servers_only:
        filters += ["--filter", "label=labctl.instance"]
    row = '{{.Names}}\t{{.Label "labctl.instance"}}\t{{.Label "labctl.server"}}\t{{.State}}'
    lines = docker("ps", "-a", *filters, "--format", row).splitlines()
    rows = [line.split("\t") for line in lines]
    return [{"container": c, "id": i, "name": n, "running": state == "running"} for c, i, n, state in rows]


def down(tell: Tell, *, config: SandboxConfig | None = None) -> SandboxStatus:
    """Stops servers, control plane and registry. Volumes, objects, databases and images stay; `up` brings all back.

    Safe to run again. Raises ConvergeFailed if something can't be stopped.
    """
    config = config or SandboxConfig.from_environment()
    check_machine("down")
    if status(config).state == "absent":
        return SandboxStatus("absent", state_directory=str(config.state))
    with locked(config, tell):
        board = Board()
        running = [c["container"] for c in own_containers(config) if c["running"]]
        servers = [name for name in running if name not in (config.name, config.registry_name)]

        def stop(*names: str) -> None:
            if names:
                docker("stop", "-t", "60", *names)

        # The control plane first: it must not see its servers stop, or Nova would take them for stopped by their owner.
        control_plane = board.start("control plane", lambda _: stop(*(n for n in running if n == config.name)))
        board.start("servers", lambda _: stop(*servers), (control_plane,))
        board.start("registry", lambda _: stop(*(n for n in running if n == config.registry_name)))
        board.finish(tell)
        _detach(config, tell)
        return status(config)


def _detach(config: SandboxConfig, tell: Tell) -> None:
    left = loops.detach_all(config.volumes, tell)
    if left:
        names = ", ".join(loop.name for loop in left)
        raise ConvergeFailed(
            "loop devices of the sandbox's volumes are in use outside it",
            found=names,
            next_step=f"lsblk {names}; unmount what is mounted, then run the same command again",
        )


def destroy(tell: Tell, *, images: bool = False, config: SandboxConfig | None = None) -> SandboxStatus:
    """Deletes everything of this sandbox: servers, volumes, objects, databases, registry, credentials. No way back.

    Only what carries its label, lies in its state directory or is a loop device of a file there. With `images` the
    images that labctl built for any sandbox go too. Raises CloudRefused, and deletes nothing, while other containers
    are on its network.
    """
    config = config or SandboxConfig.from_environment()
    check_machine("destroy")
    with locked(config, tell):
        if engine_answers():
            _refuse_while_shared(config)
            names = [c["container"] for c in own_containers(config)]
            if names:
                tell(f"removing {len(names)} containers")
                docker("rm", "-f", "-v", *names)
            images_of_build = inspect("container", config.build_name)
            if images_of_build and (images_of_build["Config"]["Labels"] or {}).get("labctl.sandbox") == "1":
                docker("rm", "-f", "-v", config.build_name)
            network = inspect("network", config.name)
            if network and (network["Labels"] or {}).get("labctl.sandbox.name") == config.name:
                docker("network", "rm", config.name)
        _detach(config, tell)
        _delete_state(config, tell)
        if images:
            _delete_images(tell)
    return SandboxStatus("absent", state_directory=str(config.state))


def _refuse_while_shared(config: SandboxConfig) -> None:
    network = inspect("network", config.name)
    if network is None or (network["Labels"] or {}).get("labctl.sandbox.name") != config.name:
        return
    own = {c["container"] for c in own_containers(config)}
    others = sorted(c["Name"] for c in network["Containers"].values() if c["Name"] not in own)
    if others:
        raise CloudRefused(
            "containers that aren't the sandbox's are on its network; nothing was deleted",
            found=", ".join(others),
            next_step=f"docker network disconnect {config.name} {others[0]}",
        )


def _delete_state(config: SandboxConfig, tell: Tell) -> None:
    """Deletes what the sandbox wrote, by name; a folder that isn't marked as its own is left alone."""
    owner = read_json(config.state / MARKER)
    if not owner or owner.get("name") != config.name:
        return
    tell(f"deleting {config.state}")
    for folder in ("volumes", "registry", "log", "base-context"):
        path = config.state / folder
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    for name in (
        "clouds.yaml",
        "images.json",
        "images-made.json",
        "passwords.json",
        "ready.json",
        "settings.json",
        MARKER,
    ):
        (config.state / name).unlink(missing_ok=True)
    if not any(config.state.iterdir()):
        config.state.rmdir()


def _delete_images(tell: Tell) -> None:
    tags = docker("image", "ls", "--filter", "label=labctl.sandbox=1", "--format", "{{.Repository}}:{{.Tag}}").split()
    for tag in (t for t in tags if t.startswith("labctl-sandbox")):
        tell(f"deleting the image {tag}")
        docker("rmi", tag, check=False)


def status(config: SandboxConfig | None = None) -> SandboxStatus:
    """What there is now, within about a second; changes nothing and needs no API to answer.

    Raises ConfigError if this isn't root.
    """
    need_root("status")
    config = config or SandboxConfig.from_environment()
    answers = shutil.which("docker") is not None and engine_answers()
    container = inspect("container", config.name) if answers else None
    if container is None and not (config.state / MARKER).is_file():
        return SandboxStatus("absent", state_directory=str(config.state))
    running = bool(container and container["State"]["Running"])
    servers = own_containers(config, servers_only=True) if answers else []
    catalogue = services.summary(config)
    image = str(container["Config"]["Image"]) if container else ""
    return SandboxStatus(
        state="running" if running else "stopped",
        apis=control.answering(config) if running else {},
        servers=tuple({k: s[k] for k in ("id", "name", "running")} for s in servers),
        volumes=len(loops.identities(config.volumes)),
        loop_devices=len(loops.of_folder(config.volumes)),
        registry=str(catalogue["registry"]),
        registry_running=answers and control.is_running(config.registry_name) is True,
        service_images=dict(catalogue["images"]),
        s3_flavour=str(catalogue["s3_flavour"]),
        image=image,
        image_is_current=image in ("", images.cloud_image()),
        memory_mib=control.memory_mib(str(container["Id"])) if container and running else None,
        address=config.address if running else "",
        clouds_file=str(config.clouds_file),
        state_directory=str(config.state),
    )
