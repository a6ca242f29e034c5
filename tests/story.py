"""Drives labctl by its command line, as a user does, and reads MLflow through its API: for the demo and the tests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
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

    def log_run(self, name: str, metrics: dict[str, float], artifact: bytes) -> str:
        """Log a finished run with parameters, metrics and one artifact, as the client library would; returns its id."""
        created = self.post("/api/2.0/mlflow/runs/create", {"experiment_id": "0", "run_name": name, "start_time": 0})
        info = created["run"]["info"]
        batch = {
            "run_id": info["run_id"],
            "metrics": [{"key": key, "value": value, "timestamp": 0, "step": 0} for key, value in metrics.items()],
            "params": [{"key": "name", "value": name}],
        }
        self.post("/api/2.0/mlflow/runs/log-batch", batch)
        place = info["artifact_uri"].removeprefix("mlflow-artifacts:/")
        upload = f"{self.url}/api/2.0/mlflow-artifacts/artifacts/{place}/{name}.bin"
        with urllib.request.urlopen(urllib.request.Request(upload, artifact, method="PUT"), timeout=30):
            pass
        self.post("/api/2.0/mlflow/runs/update", {"run_id": info["run_id"], "status": "FINISHED", "end_time": 1})
        return str(info["run_id"])

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


@dataclass(frozen=True)
class Evidence:
    """What a user would miss: metrics by run, and by path the SHA-256 of every artifact, notebook and credential."""

    runs: dict[str, dict[str, float]]
    artifacts: dict[str, str]
    files: dict[str, str]

    @classmethod
    def collect(cls, lab: Commands) -> Evidence:
        """Read all of it through the tunnel and from the volume, as users do."""
        with lab.tunnel():
            runs, artifacts = Mlflow().runs(), Mlflow().artifacts()
        listed = lab.ssh("cd /mnt/block && sudo find workspace .labctl/secrets -type f -exec sha256sum {} +")
        files = {path: digest for digest, path in (line.split("  ", 1) for line in listed.splitlines())}
        return cls(runs, artifacts, files)

    def lost(self, later: Evidence) -> list[str]:
        """What of this is missing or different in what was read later."""
        pairs = ((self.runs, later.runs), (self.artifacts, later.artifacts), (self.files, later.files))
        return [key for before, after in pairs for key, value in before.items() if after.get(key) != value]


@contextmanager
def logging(lab: Commands, prefix: str) -> Iterator[dict[str, float]]:
    """Log one run after the other until the node is gone; what MLflow acknowledged is in the dictionary."""
    acknowledged: dict[str, float] = {}
    enough, stop = threading.Event(), threading.Event()

    def work() -> None:
        with contextlib.suppress(OSError, urllib.error.URLError):  # the node is gone, which is what is waited for
            while not stop.is_set():
                number = len(acknowledged)
                run = Mlflow().log_run(f"{prefix}-{number}", {"number": number}, f"{prefix} {number}".encode() * 1000)
                acknowledged[run] = number
                if number >= 3:
                    enough.set()

    thread = threading.Thread(target=work, daemon=True)
    with lab.tunnel():
        thread.start()
        assert enough.wait(60), "nothing could be logged"
        yield acknowledged
        stop.set()
        thread.join(timeout=60)


def sandbox_cloud() -> Any:
    """A connection to the sandbox's APIs that knows nothing of labctl: what a user does in Horizon."""
    import openstack

    clouds = Path(os.environ.get("LABCTL_SANDBOX_STATE", "/var/lib/labctl-sandbox")) / "clouds.yaml"
    # uWSGI's own HTTP socket closes a kept connection without a word, and on a busy machine one that is just sent
    again = {"connect_retries": 4}
    config = openstack.config.OpenStackConfig(config_files=[str(clouds)]).get_one("sandbox", **again)
    connection = openstack.connection.Connection(config=config)
    connection.session.session.headers["Connection"] = "close"
    return connection


def delete_server_behind_labctl(name: str) -> None:
    """What the end of a lease does: the server is gone, nobody was asked, nothing was drained."""
    sandbox_cloud().delete_server(name, wait=True, timeout=120)


def kill_node(name: str) -> None:
    """The power of a sandbox server fails: SIGKILL for everything in it, and nobody tells the cloud."""
    server = sandbox_cloud().get_server(name)
    subprocess.run(["docker", "kill", f"inst-{server.id}"], check=True, capture_output=True)


def power_on(name: str, seconds: float = 300) -> None:
    """Start a sandbox server whose power failed, whether or not Nova has noticed; until it is ACTIVE."""
    import openstack

    cloud = sandbox_cloud()
    asked, deadline = False, time.monotonic() + seconds
    while True:
        server = cloud.compute.get_server(cloud.get_server(name).id)
        if asked and server.status == "ACTIVE" and not server.task_state:
            return
        try:
            if server.status == "SHUTOFF" and not server.task_state:
                cloud.compute.start_server(server)
                asked = True
            elif not asked and not server.task_state:
                cloud.compute.reboot_server(server, "HARD")
                asked = True
        except openstack.exceptions.HttpException as busy:  # Nova has just noticed, and switches it off for good first
            if busy.status_code not in (409, 500):
                raise
        assert time.monotonic() < deadline, f"{name} is {server.status}, {server.task_state}"
        time.sleep(1)


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
