"""Drives labctl by its command line, as a user does, and reads MLflow through its API: for the demo and the tests."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
LABCTL = Path(sys.executable).with_name("labctl")


@dataclass
class Commands:
    """labctl in a working directory of its own. `quiet` keeps its progress for the error message."""

    directory: Path
    quiet: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, *arguments: str, expect: int = 0) -> str:
        """Run a command, check its exit code, return its stdout."""
        done = subprocess.run(
            [str(LABCTL), *arguments],
            cwd=self.directory,
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if self.quiet else None,
            text=True,
            check=False,
        )
        if done.returncode != expect:
            raise AssertionError(
                f"labctl {' '.join(arguments)}: exit {done.returncode}, not {expect}\n{done.stdout}\n{done.stderr}"
            )
        return done.stdout

    def json(self, *arguments: str, expect: int = 0) -> Any:
        """Run a command with --json and return its result."""
        return json.loads(self.run("--json", *arguments, expect=expect))

    def ssh(self, command: str) -> str:
        """Run a shell command on the lab's server."""
        return self.run("ssh", "--", command)

    @contextmanager
    def tunnel(self, port: int = 8000) -> Iterator[None]:
        """The services on this machine's loopback, as `labctl tunnel` gives them to a user."""
        process = subprocess.Popen(
            [str(LABCTL), "tunnel"],
            cwd=self.directory,
            env={**os.environ, **self.environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            wait_for_port(port, process)
            yield
        finally:
            process.terminate()
            process.wait(timeout=10)


def wait_for_port(port: int, process: subprocess.Popen[bytes], seconds: float = 30) -> None:
    """Until something listens on 127.0.0.1:port."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"labctl tunnel ended: {(process.stderr.read() if process.stderr else b'').decode()}")
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.3)
    raise AssertionError(f"nothing listens on 127.0.0.1:{port} after {seconds:.0f} s")


class Mlflow:
    """MLflow's REST API at a base URL."""

    def __init__(self, url: str = "http://127.0.0.1:8000") -> None:
        self.url = url

    def get(self, endpoint: str, **query: str) -> bytes:
        """The body of a GET."""
        suffix = f"?{urllib.parse.urlencode(query)}" if query else ""
        with urllib.request.urlopen(f"{self.url}{endpoint}{suffix}", timeout=30) as answer:
            return bytes(answer.read())

    def post(self, endpoint: str, document: dict[str, Any]) -> Any:
        """The JSON answer to a POST."""
        request = urllib.request.Request(
            f"{self.url}{endpoint}", json.dumps(document).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def runs(self) -> dict[str, dict[str, float]]:
        """The metrics of every run of every experiment, by run id."""
        experiments = self.post("/api/2.0/mlflow/experiments/search", {"max_results": 1000})["experiments"]
        found = self.post(
            "/api/2.0/mlflow/runs/search",
            {"experiment_ids": [one["experiment_id"] for one in experiments], "max_results": 1000},
        )
        return {
            run["info"]["run_id"]: {metric["key"]: metric["value"] for metric in run["data"].get("metrics", [])}
            for run in found.get("runs", [])
        }

    def artifacts(self, folder: str = "") -> dict[str, str]:
        """SHA-256 of every artifact behind the server's proxy, by path."""
        query = {"path": folder} if folder else {}
        listing = json.loads(self.get("/api/2.0/mlflow-artifacts/artifacts", **query))
        found = {}
        for entry in listing.get("files", []):
            path = f"{folder}/{entry['path']}" if folder else entry["path"]
            if entry.get("is_dir"):
                found.update(self.artifacts(path))
            else:
                body = self.get(f"/api/2.0/mlflow-artifacts/artifacts/{urllib.parse.quote(path)}")
                found[path] = hashlib.sha256(body).hexdigest()
        return found


def delete_server_behind_labctl(name: str) -> None:
    """What the end of a lease does: the server is gone, nobody was asked, nothing was drained."""
    import openstack

    clouds = Path(os.environ.get("LABCTL_SANDBOX_STATE", "/var/lib/labctl-sandbox")) / "clouds.yaml"
    cloud = openstack.config.OpenStackConfig(config_files=[str(clouds)]).get_one("sandbox")
    connection = openstack.connection.Connection(config=cloud)
    connection.delete_server(name, wait=True, timeout=120)


@dataclass
class Timeline:
    """How long each part of a story took, in seconds."""

    parts: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def part(self, title: str) -> Iterator[None]:
        """Time one part and say that it begins."""
        print(f"\n== {title}", flush=True)
        started = time.monotonic()
        yield
        self.parts.append((title, time.monotonic() - started))

    def table(self) -> str:
        """The parts with their seconds, and the sum."""
        width = max(len(title) for title, _ in self.parts)
        lines = [f"{title:<{width}}  {seconds:7.1f} s" for title, seconds in self.parts]
        return "\n".join([*lines, f"{'together':<{width}}  {sum(s for _, s in self.parts):7.1f} s"])
