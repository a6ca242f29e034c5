"""Rebuilds, half of them after the node was killed while it logged: nothing that was acknowledged is lost."""

from __future__ import annotations

import contextlib
import threading
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from story import Commands, Evidence, Mlflow, delete_server_behind_labctl, kill_node

SERVER = "node-persist-e2e"


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


def cycle(lab: Commands, number: int) -> None:
    """One rebuild: after a drain, after a power cut in the middle of logging, or after the server was deleted so."""
    name = f"cycle-{number}"
    with lab.tunnel():
        Mlflow().log_run(name, {"loss": 1 / (number + 1)}, name.encode() * 4096)
    lab.ssh(f"echo {name} > /mnt/block/workspace/{name}.txt && sync")
    before = Evidence.collect(lab)
    assert before.runs and before.artifacts and any("secrets.json" in path for path in before.files)
    acknowledged: dict[str, float] = {}
    if number % 4 == 1:
        with logging(lab, name) as acknowledged:
            kill_node(SERVER)
    elif number % 4 == 3:
        with logging(lab, name) as acknowledged:
            delete_server_behind_labctl(SERVER)
    found = lab.json("rebuild", "--force")
    assert found["earlier_runs"] >= 1
    after = Evidence.collect(lab)
    assert not before.lost(after)
    assert not [run for run, value in acknowledged.items() if after.runs.get(run, {}).get("number") != value]


@pytest.mark.parametrize("number", range(3))
def test_everything_is_there_after_a_rebuild(lab: Commands, number: int) -> None:
    if number == 0:
        lab.run("up")
        lab.run("verify")
    cycle(lab, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_twenty_rebuilds_in_a_row(lab: Commands, number: int) -> None:
    if number == 0:
        lab.run("up")
        lab.run("verify")
    cycle(lab, number)


def test_passwords_are_the_same_that_a_notebook_was_given(lab: Commands, tmp_path: Path) -> None:
    """The credentials still open what they opened: PostgreSQL over TCP, and S3 by a signed request."""
    lab.ssh(
        "sudo docker exec mlflow python3 -c '"
        "import os, psycopg2, boto3; "
        'psycopg2.connect("host=postgres user=mlflow dbname=mlflowdb").close(); '
        'boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"]).head_bucket(Bucket="mlflow-artifacts")\''
    )
