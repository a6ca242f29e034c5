"""Rebuilds, half of them after the node was killed while it logged: nothing that was acknowledged is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from story import Commands, Evidence, Mlflow, delete_server_behind_labctl, kill_node, logging

SERVER = "node-persist-e2e"


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
