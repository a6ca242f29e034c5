"""Docker and compose, as the stack's module calls them: each call has a time limit and ends in words, not in a hang."""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import json
import os
import subprocess
import time
from collections.abc import Iterator
from typing import Any

SERVICES = ("postgres", "s3", "mlflow", "jupyter")
#: What keeps the data, and what writes to it.
STORES, WRITERS = ("postgres", "s3"), ("mlflow", "jupyter")
PROJECT = "persist_block"
NETWORK = f"{PROJECT}_default"
#: The guard takes the same lock, so that two `docker compose up` never meet.
LOCK = "/run/labctl-stack.lock"
#: Held by a module for as long as it works; LOCK only while containers are started or stopped.
HOST_LOCK = "/run/labctl-host.lock"
QUICK_SECONDS = 60
LOG_LINES = "12"


class DockerFailed(Exception):
    """A Docker command failed; its text says which, and Docker's own words."""


def docker(
    *arguments: str, seconds: float = QUICK_SECONDS, check: bool = True, data: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run `docker …` with `data` as its input.

    DockerFailed after `seconds`, or with its last words if it fails and `check` is set.
    """
    words = " ".join(("docker", *arguments[:3]))
    try:
        done = subprocess.run(
            ["docker", *arguments], input=data, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise DockerFailed(f"`{words} …` wasn't done after {seconds:.0f} s") from None
    except OSError as error:
        raise DockerFailed(f"`{words} …`: {error}") from None
    if check and done.returncode:
        raise DockerFailed(f"`{words} …`: {(done.stderr or done.stdout).strip()[-1500:]}")
    return done


def inspect(kind: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """What Docker says of those containers or images that exist, by the name that was asked for."""
    if not names:
        return {}
    done = docker(kind, "inspect", *names, check=False)
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout or "[]")
    except ValueError:
        found = []
    if done.returncode and not found and "no such" not in done.stderr.lower():
        raise DockerFailed(f"`docker {kind} inspect`: {done.stderr.strip()}")
    if kind == "container":
        return {item["Name"].lstrip("/"): item for item in found}
    if len(found) == len(names):
        return dict(zip(names, found, strict=True))
    # Docker answers in the order asked and leaves out what it lacks: ask for each to know which.
    return {name: json.loads(docker(kind, "inspect", name).stdout)[0] for name in names if _there(kind, name)}


def _there(kind: str, name: str) -> bool:
    return docker(kind, "inspect", "--format", "1", name, check=False).returncode == 0


def pull(references: list[str], seconds: float) -> None:
    """Pull images side by side. DockerFailed names the image that can't be had."""
    if not references:
        return
    with concurrent.futures.ThreadPoolExecutor(len(references)) as pool:
        jobs = {pool.submit(docker, "pull", "--quiet", name, seconds=seconds): name for name in references}
        for job in concurrent.futures.as_completed(jobs):
            try:
                job.result()
            except DockerFailed as failure:
                raise DockerFailed(f"The image {jobs[job]} can't be pulled. {failure}") from None


def build(tag: str, directory: str, base: str, seconds: float) -> None:
    """Build an image from a directory with a Dockerfile, on `base`."""
    docker("build", "--quiet", "--tag", tag, "--build-arg", f"MLFLOW_IMAGE={base}", directory, seconds=seconds)


class Busy(Exception):
    """Another run is at work on this host; its words name the process."""


@contextlib.contextmanager
def alone(seconds: float) -> Iterator[None]:
    """One module at a time: what an interrupted run left going on this host ends first. Busy after `seconds`.

    Two at once would each decide from what the other one is changing, and both generate the secrets of a new volume.
    """
    deadline = time.monotonic() + seconds
    with open(HOST_LOCK, "a+", encoding="ascii") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    lock.seek(0)
                    raise Busy(f"process {lock.read(20).strip() or 'unknown'} holds {HOST_LOCK}") from None
                time.sleep(0.2)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Nobody else brings the services up or down meanwhile."""
    with open(LOCK, "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def stream(arguments: list[str], source: int, target: int, seconds: float) -> None:
    """Run `docker …` from one open file into another, whatever their size. DockerFailed with its last words."""
    words = " ".join(("docker", *arguments[:4]))
    try:
        done = subprocess.run(
            ["docker", *arguments], stdin=source, stdout=target, stderr=subprocess.PIPE, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise DockerFailed(f"`{words} …` wasn't done after {seconds:.0f} s") from None
    if done.returncode:
        raise DockerFailed(f"`{words} …`: {done.stderr.decode(errors='replace').strip()[-1500:]}")


def compose(
    project_dir: str, *arguments: str, seconds: float, environment: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run `docker compose …` for the project, unchecked; `environment` names a file that replaces .env."""
    other = ["--env-file", environment] if environment else []
    return docker("compose", "--project-directory", project_dir, *other, *arguments, seconds=seconds, check=False)


def is_ours(container: dict[str, Any], project_dir: str) -> bool:
    """Whether the role's own compose project made a container; the tutorial's project has the same name."""
    labels = container.get("Config", {}).get("Labels") or {}
    return bool(labels.get("com.docker.compose.project.working_dir") == project_dir)


def others_on(project_dir: str, directories: list[str]) -> dict[str, dict[str, Any]]:
    """Containers that aren't ours and have our names or our project's, or run with one of the directories writable."""
    names = docker("ps", "-a", "--format", "{{.Names}}").stdout.split()
    found = {}
    for name, one in inspect("container", names).items():
        if is_ours(one, project_dir):
            continue
        project = (one.get("Config", {}).get("Labels") or {}).get("com.docker.compose.project")
        writes = one["State"].get("Running") and any(
            mount.get("RW") and any(same_or_below(str(mount.get("Source")), path) for path in directories)
            for mount in one.get("Mounts") or []
        )
        if name in SERVICES or project == PROJECT or writes:
            found[name] = one
    return found


def tutorials(project_dir: str) -> list[str]:
    """Names of running containers of the tutorial's compose project, which has our project's name."""
    return [
        name
        for name, one in others_on(project_dir, []).items()
        if one["State"].get("Running") and one["Config"]["Labels"].get("com.docker.compose.project") == PROJECT
    ]


def same_or_below(one: str, other: str) -> bool:
    """Whether one of two paths is the other or lies in it."""
    return one == other or one.startswith(f"{other.rstrip('/')}/") or other.startswith(f"{one.rstrip('/')}/")


def supports_start_interval() -> bool:
    """Whether the engine (25 and later, API 1.44) can look at a starting container's health more often."""
    version = docker("version", "--format", "{{.Server.APIVersion}}").stdout.strip()
    return tuple(int(part) for part in version.split(".")[:2]) >= (1, 44)


def is_healthy(container: dict[str, Any] | None) -> bool:
    """Whether it runs and its health check says so."""
    state = (container or {}).get("State", {})
    return bool(state.get("Running")) and state.get("Health", {}).get("Status") == "healthy"


def is_ailing(container: dict[str, Any]) -> bool:
    """Whether it keeps failing: in a restart loop, or running and found unhealthy. One that still starts isn't."""
    state = container.get("State", {})
    return bool(state.get("Restarting")) or state.get("Health", {}).get("Status") == "unhealthy"


def identity(containers: dict[str, dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """What changes when a container is made anew or started."""
    return {name: (c["Id"], c["State"]["StartedAt"]) for name, c in containers.items()}


def complaints(containers: dict[str, dict[str, Any]], services: tuple[str, ...] = SERVICES) -> str:
    """For each service that isn't healthy: its state, its last health check's words, its last log lines."""
    texts = []
    for name in services:
        container = containers.get(name)
        if container is None:
            texts.append(f"{name}: no container was made")
            continue
        if is_healthy(container):
            continue
        state = container["State"]
        checks = (state.get("Health") or {}).get("Log") or [{}]
        said = str(checks[-1].get("Output") or "").strip()[-400:]
        log = docker("logs", "--tail", LOG_LINES, name, check=False)
        lines = (log.stdout + log.stderr).strip() or "(no log)"
        health = (state.get("Health") or {}).get("Status", "unknown")
        error = f", {state['Error']}" if state.get("Error") else ""
        texts.append(
            f"{name}: {state.get('Status')} (exit {state.get('ExitCode')}{error}), health {health}"
            f"{f': {said}' if said else ''}\n{lines}"
        )
    return "\n".join(texts)


def versions(containers: list[str]) -> dict[str, str]:
    """Each service's own statement of its version; "" where it doesn't say."""
    package = "import importlib.metadata as m; print(m.version('{}'))"
    commands = {
        "mlflow": ["python3", "-c", package.format("mlflow")],
        "jupyter": ["python3", "-c", package.format("jupyterlab")],
        "postgres": ["postgres", "--version"],
    }
    found = {}
    for name in containers:
        if name in commands:
            said = docker("exec", name, *commands[name], check=False).stdout.split()
            found[name] = next((word for word in said if word[:1].isdigit()), "")
    return found


def s3_version(flavour: str) -> str:
    """What the S3 server calls itself: a release's time stamp, or rclone's number."""
    said = docker("exec", "s3", flavour, "version" if flavour == "rclone" else "--version", check=False).stdout.split()
    words = [word.lstrip("v") for word in said]
    return next(
        (word.rpartition(".")[2] if "T" in word else word for word in words if any(c.isdigit() for c in word)), ""
    )


def write_atomically(path: str, content: str, mode: int = 0o644) -> bool:
    """Bring a small file to its content; True if it differed."""
    try:
        with open(path, encoding="utf-8") as handle:
            if handle.read() == content:
                return False
    except FileNotFoundError:
        pass
    with open(f"{path}.new", "w", encoding="utf-8") as handle:
        os.fchmod(handle.fileno(), mode)
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(f"{path}.new", path)
    return True
