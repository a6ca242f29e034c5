"""The Docker engine of this machine, through its command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from labctl.errors import ConfigError, ConvergeFailed
from labctl.models import Tell

_DEFAULT_SOCKET = "unix:///var/run/docker.sock"


class DockerError(ConvergeFailed):
    """A docker command failed; `detail` is what it wrote to stderr."""

    def __init__(self, arguments: Sequence[str], code: int | None, text: str) -> None:
        super().__init__(
            f"docker {' '.join(arguments[:2])} failed",
            expected="exit code 0",
            found="no answer" if code is None else f"exit code {code}",
            next_step="run the same command again; if it fails again, `docker info` shows how the engine is",
            detail=text.strip()[-800:],
        )


def environment() -> dict[str, str]:
    """The environment of docker commands: the classic builder, which every engine since 20.10 has."""
    return {**os.environ, "DOCKER_HOST": host(), "DOCKER_BUILDKIT": "0"}


def host() -> str:
    """The engine's address: `$DOCKER_HOST` or the usual socket."""
    return os.environ.get("DOCKER_HOST") or _DEFAULT_SOCKET


def socket_path() -> str:
    """The engine's socket on this machine. Raises ConfigError if the engine is elsewhere."""
    if not host().startswith("unix://"):
        raise ConfigError(
            "the sandbox needs the Docker engine of this very machine",
            expected="a unix:// address",
            found=host(),
            source="DOCKER_HOST",
            next_step="unset DOCKER_HOST",
        )
    return host().removeprefix("unix://")


def docker(*arguments: str, data: bytes | None = None, check: bool = True, timeout: float = 300) -> str:
    """Runs a docker command and returns its stdout. Raises DockerError if it fails and `check` is set."""
    try:
        done = subprocess.run(
            ["docker", *arguments], input=data, capture_output=True, env=environment(), timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DockerError(arguments, None, f"it took longer than {timeout:.0f} s") from error
    if check and done.returncode:
        raise DockerError(arguments, done.returncode, done.stderr.decode(errors="replace"))
    return done.stdout.decode(errors="replace")


def inspect(kind: str, name: str) -> dict[str, Any] | None:
    """What `docker KIND inspect` says, or None if there is no such object."""
    try:
        found: list[dict[str, Any]] = json.loads(docker(kind, "inspect", name))
    except DockerError as error:
        if "no such" in error.detail.lower() or "not found" in error.detail.lower():
            return None
        raise
    return found[0]


def image_exists(reference: str) -> bool:
    """Whether the engine has this image."""
    return inspect("image", reference) is not None


class Commands:
    """Long commands with a log file each; all of them end when one of them fails or the user interrupts."""

    def __init__(self, logs: Path, stop: threading.Event) -> None:
        self.logs = logs
        self.stop = stop

    def run(
        self,
        arguments: Sequence[str],
        log: str,
        on_line: Callable[[str], None] | None = None,
        data: IO[bytes] | None = None,
        append: bool = False,
    ) -> list[str]:
        """Runs a command, its output into logs/LOG.log line by line (each given to `on_line`); returns the lines.

        Raises ConvergeFailed, with the last lines and the log's path, if it fails.
        """
        path = self.logs / f"{log}.log"
        lines: list[str] = []
        with path.open("ab" if append else "wb") as out:
            process = subprocess.Popen(
                list(arguments),
                stdin=data or subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment(),
            )
            watcher = threading.Thread(target=self._end_early, args=(process,), daemon=True)
            watcher.start()
            assert process.stdout is not None  # noqa: S101 - stdout=PIPE
            for raw in process.stdout:
                out.write(raw)
                out.flush()
                lines.append(raw.decode(errors="replace").rstrip())
                if on_line:
                    on_line(lines[-1])
            code = process.wait()
        if code:
            raise ConvergeFailed(
                f"{' '.join(arguments[:2])} failed" + (" because another part did" if self.stop.is_set() else ""),
                expected="exit code 0",
                found=f"exit code {code}",
                source=str(path),
                next_step=f"read {path}, then run the same command again: what is done isn't done twice",
                detail="\n".join(lines[-15:]),
            )
        return lines

    def _end_early(self, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            if self.stop.wait(0.5):
                process.terminate()
                return


def engine_answers() -> bool:
    """Whether the engine answers within 5 s."""
    try:
        docker("version", "--format", "{{.Server.Version}}", timeout=5)
    except (DockerError, FileNotFoundError):
        return False
    return True


def start_engine(logs: Path, tell: Tell, seconds: float = 60) -> None:
    """Starts the Docker engine if none answers: by systemd where it runs, else dockerd in a session of its own.

    Raises ConfigError if Docker isn't installed or `$DOCKER_HOST` names an engine that doesn't answer, ConvergeFailed
    if it doesn't come up within `seconds`.
    """
    if shutil.which("docker") is None:
        raise ConfigError(
            "the sandbox needs Docker",
            expected="the docker command",
            found="none in PATH",
            next_step="apt-get install -y docker.io",
        )
    if engine_answers():
        return
    if os.environ.get("DOCKER_HOST", _DEFAULT_SOCKET) != _DEFAULT_SOCKET:
        raise ConfigError(
            "the Docker engine doesn't answer", found=host(), source="DOCKER_HOST", next_step="unset DOCKER_HOST"
        )
    log = logs / "dockerd.log"
    if Path("/run/systemd/system").is_dir():
        subprocess.run(["systemctl", "start", "docker"], check=False, capture_output=True, timeout=120)
    elif shutil.which("dockerd"):
        with log.open("ab") as out:
            subprocess.Popen(["dockerd"], stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    else:
        raise ConfigError("there is no Docker engine here", next_step="apt-get install -y docker.io")
    deadline = time.monotonic() + seconds
    while not engine_answers():
        if time.monotonic() > deadline:
            raise ConvergeFailed(
                "the Docker engine was started and doesn't answer",
                expected=f"an answer at {host()} within {seconds:.0f} s",
                source=str(log),
                next_step=f"read {log}" if log.exists() else "journalctl -u docker -n 50",
                detail="\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.exists() else "",
            )
        tell("waiting for the Docker engine to start")
        time.sleep(1)
