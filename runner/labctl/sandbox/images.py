"""The images that the sandbox itself is made of, built if their content has changed.

debian (mmdebstrap) → node (a server), base (what service images start from), registry, packages → control plane.
"""

from __future__ import annotations

import io
import re
import shutil
import tarfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

from labctl.errors import ConfigError, ConvergeFailed
from labctl.sandbox.board import Job
from labctl.sandbox.config import LABEL, SandboxConfig, resolvers
from labctl.sandbox.docker import Commands, docker, image_exists, inspect, socket_path
from labctl.sandbox.files import build_files, content_hash

NODE_IMAGE = "labctl-sandbox-node:CC-Ubuntu24.04"
HASH_LABEL = "labctl.sandbox.hash"
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
SUITE = "trixie"
PACKAGES = (
    "systemd-sysv,dbus,openssh-server,python3,sudo,parted,fuse3,iproute2,procps,kmod,mount,hostname,"
    "ca-certificates,tzdata,curl"
)
#: What makes systemd and an inner Docker work without --privileged, which not every machine can give.
RUN_FLAGS = (
    *("--cap-add", "ALL", "--cap-drop", "SYS_RESOURCE"),
    *("--security-opt", "seccomp=unconfined", "--security-opt", "apparmor=unconfined"),
    *("--cgroupns=private", "-e", "container=docker", "--tmpfs", "/run", "--tmpfs", "/run/lock"),
)
_STEP = re.compile(r"Step (\d+)/(\d+) : ")


@cache
def debian_image() -> str:
    """Debian 13 as mmdebstrap makes it; everything else starts from it."""
    return "labctl-sandbox-debian:" + content_hash(SUITE, PACKAGES)


@cache
def base_image() -> str:
    """Debian with this machine's CA bundle, so that pip, go and curl work in builds where this machine's do."""
    ca = CA_BUNDLE.read_bytes() if CA_BUNDLE.is_file() else b""
    return "labctl-sandbox-base:" + content_hash(debian_image(), build_files("base"), ca)


@cache
def registry_image() -> str:
    """Debian's docker-registry."""
    return "labctl-sandbox-registry:" + content_hash(debian_image(), build_files("registry"))


@cache
def cloud_image() -> str:
    """OpenStack, configured, with its databases made."""
    return "labctl-sandbox:" + content_hash(debian_image(), build_files("cloud"))


@cache
def node_hash() -> str:
    """The content of the server image, whose tag is a name that Glance knows."""
    return content_hash(debian_image(), build_files("node"))


def node_is_current() -> bool:
    """Whether the server image was built from these files."""
    found = inspect("image", NODE_IMAGE)
    return found is not None and (found["Config"]["Labels"] or {}).get(HASH_LABEL) == node_hash()


def build_debian(commands: Commands, state: Path, job: Job) -> None:
    """Debian 13 from its own packages: no container registry is needed. 30 to 100 s."""
    if image_exists(debian_image()):
        return
    if shutil.which("mmdebstrap") is None:
        raise ConfigError(
            "the sandbox's images are made with mmdebstrap",
            found="none in PATH",
            next_step="apt-get install -y mmdebstrap debian-archive-keyring",
        )
    tarball = state / f"{SUITE}.tar"
    job.note("mmdebstrap, from Debian's packages")
    # Host keys and the machine id are what two machines must not share.
    clean = 'rm -f "$1"/etc/ssh/ssh_host_* && : > "$1"/etc/machine-id'
    options = ["--variant=minbase", f"--include={PACKAGES}", f"--customize-hook={clean}"]
    try:
        commands.run(["mmdebstrap", *options, SUITE, str(tarball)], "debian")
        job.note("importing the tarball")
        docker("import", "-c", 'CMD ["/sbin/init"]', "-c", f"LABEL {LABEL}", str(tarball), debian_image())
    finally:
        tarball.unlink(missing_ok=True)


def build(
    commands: Commands,
    job: Job,
    tag: str,
    context: Path,
    *,
    arguments: Mapping[str, str],
    labels: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """`docker build` of a folder. Progress is the step it is at; the log's name is the tag's repository."""

    step = ""

    def on_line(line: str) -> None:
        nonlocal step
        if found := _STEP.match(line):
            step = f"step {found[1]} of {found[2]}"
        if words := " ".join(line.split()):
            job.note(step if found else f"{step}, {words[:50]}")

    options: list[str] = []
    for name, value in arguments.items():
        options += ["--build-arg", f"{name}={value}"]
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):  # by name: the value stays out of the command line
        options += ["--build-arg", name]
    for name, value in labels.items():
        options += ["--label", f"{name}={value}"]
    command = ["docker", "build", *options, "--label", LABEL, "-t", tag, str(context)]
    commands.run(command, tag.split(":", maxsplit=1)[0], on_line)
    if tag != NODE_IMAGE:  # its other tags are other images of Glance
        forget_older(tag)


def forget_older(tag: str) -> None:
    """Removes the images that this one replaces, its repository's other tags; the engine keeps those in use."""
    for old in docker("image", "ls", tag.split(":", maxsplit=1)[0], "--format", "{{.Repository}}:{{.Tag}}").split():
        if old != tag and not old.endswith(":<none>"):
            docker("rmi", old, check=False)


def build_node(commands: Commands, job: Job) -> None:
    """The server image."""
    if not node_is_current():
        build(
            commands,
            job,
            NODE_IMAGE,
            build_files("node"),
            arguments={"BASE": debian_image()},
            labels={HASH_LABEL: node_hash()},
        )


def build_registry(commands: Commands, job: Job) -> None:
    """The registry's image."""
    if not image_exists(registry_image()):
        build(commands, job, registry_image(), build_files("registry"), arguments={"BASE": debian_image()})


def build_base(commands: Commands, state: Path, job: Job) -> None:
    """What service images start from. The CA bundle, this machine's and no file of ours, joins the build context."""
    if image_exists(base_image()):
        return
    context = state / "base-context"
    if context.exists():
        shutil.rmtree(context)
    shutil.copytree(build_files("base"), context)
    try:
        (context / "ca-certificates.crt").write_bytes(CA_BUNDLE.read_bytes() if CA_BUNDLE.is_file() else b"")
        build(commands, job, base_image(), context, arguments={"BASE": debian_image()})
    finally:
        shutil.rmtree(context)


def tar_of(files: Mapping[str, tuple[bytes, int]]) -> bytes:
    """{path: (content, mode)} as a tar stream for `docker cp`, everything root's."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for path, (content, mode) in files.items():
            info = tarfile.TarInfo(path.lstrip("/"))
            info.size, info.mode, info.mtime = len(content), mode, int(time.time())
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def cloud_environment(config: SandboxConfig, name: str) -> bytes:
    """/etc/labcloud.env of the control plane: nothing secret."""
    values = {
        "DOCKER_HOST": "unix:///opt/labcloud/docker.sock",
        "LABCLOUD_NAME": name,
        "LABCLOUD_NETWORK": config.name,
        "LABCLOUD_PREFIX": config.prefix,
        "LABCLOUD_IP": config.address,
        "LABCLOUD_FIP_SUBNET": config.floating_subnet,
        "LABCLOUD_DNS": ",".join(resolvers()),
    }
    return "".join(f"{key}={value}\n" for key, value in values.items()).encode()


def build_cloud(config: SandboxConfig, commands: Commands, job: Job) -> None:
    """OpenStack: its packages by a Dockerfile, its configuration by `setup` in a running container, then a commit.

    The container has no place on the sandbox's network, so a running sandbox doesn't get in the way. 4 to 5 minutes.
    """
    tag = cloud_image()
    if image_exists(tag):
        return
    packages = tag.replace("labctl-sandbox:", "labctl-sandbox-packages:")
    build(commands, job, packages, build_files("cloud"), arguments={"BASE": debian_image()})
    name = config.build_name
    remove_own(name)
    docker(
        *("create", "--name", name, "--hostname", "labctl-sandbox", "--label", LABEL, *RUN_FLAGS),
        *("-v", f"{socket_path()}:/opt/labcloud/docker.sock", packages),
    )
    try:
        docker("cp", "-", f"{name}:/", data=tar_of({"etc/labcloud.env": (cloud_environment(config, name), 0o644)}))
        docker("start", name)
        wait_for_systemd(name, job)
        commands.run(
            ["docker", "exec", name, "setup"],
            "labctl-sandbox-setup",
            lambda line: job.note(line.split(maxsplit=2)[-1]) if line.startswith("== ") else None,
        )
        job.note("stopping it cleanly and keeping it as an image")
        docker("stop", "-t", "60", name)
        docker("commit", name, tag, timeout=600)
        forget_older(tag)
    finally:
        remove_own(name)


def remove_own(container: str) -> None:
    """Removes a container by name, if it carries the sandbox's label."""
    found = inspect("container", container)
    if found and (found["Config"]["Labels"] or {}).get("labctl.sandbox") == "1":
        docker("rm", "-f", "-v", container)
    elif found:
        raise ConfigError(
            f"a container of the name {container} exists and isn't labctl's",
            next_step=f"rename or remove it (docker rename {container} NEW), or set LABCTL_SANDBOX_NAME",
        )


def wait_for_systemd(container: str, job: Job, seconds: float = 90) -> None:
    """Until systemd in the container has started what it starts at boot."""
    deadline = time.monotonic() + seconds
    while True:
        state = docker("exec", container, "systemctl", "is-system-running", check=False).strip()
        if state in ("running", "degraded"):
            return
        if time.monotonic() > deadline:
            raise ConvergeFailed(
                f"systemd in the container {container} doesn't come up",
                expected=f"running or degraded within {seconds:.0f} s",
                found=state or "no answer",
                next_step=f"docker exec {container} systemctl list-jobs",
                detail=docker("logs", "--tail", "20", container, check=False),
            )
        job.note(f"waiting for systemd in it ({state or 'no answer yet'})")
        time.sleep(0.5)
