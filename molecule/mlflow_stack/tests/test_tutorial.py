"""A volume that was really made by the tutorial's steps: what is lost if one of these fails is a student's old runs.

Such volumes are made with real servers of the time (MLflow 2.20.2, MinIO, PostgreSQL 15, 16 and 18, each with its data
in another place), one with credentials of its own and its tree given to cc. The tests run in order; each says what it
finds and leaves behind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(os.environ.get("MOLECULE_PROJECT_DIRECTORY", Path(__file__).parents[3]))
TUTORIAL = Path(__file__).parents[1] / "tutorial"
sys.path.insert(0, str(PROJECT / "tests"))

import nodes  # noqa: E402

NODE = "mlflow-stack"
BLOCK = "/mnt/block"
Play = Callable[..., Any]
KillAt = Callable[[str], AbstractContextManager[None]]
IMAGES = json.loads(
    (Path(os.environ.get("LABCTL_SANDBOX_STATE", "/var/lib/labctl-sandbox")) / "images.json").read_text()
)
#: The second volume's owner changed what the tutorial says.
OWN = {
    "POSTGRES_USER": "ada",
    "POSTGRES_PASSWORD": "of-her-own-4711",
    "POSTGRES_DB": "labdb",
    "MINIO_ROOT_USER": "ada-s3",
    "MINIO_ROOT_PASSWORD": "another-0815",
}
CREDENTIALS = {
    "postgres_user": OWN["POSTGRES_USER"],
    "postgres_database": OWN["POSTGRES_DB"],
    "postgres_password": OWN["POSTGRES_PASSWORD"],
    "s3_user": OWN["MINIO_ROOT_USER"],
    "s3_password": OWN["MINIO_ROOT_PASSWORD"],
}
OLD_REVISION, NEW_REVISION = "0584bdc529eb", "dc11669786a5"
STEPS = ("dump", "restore", "one-shot", "upgrade", "swap", "start")


def shell(script: str, check: bool = True) -> str:
    return nodes.execute(NODE, "bash", "-o", "pipefail", "-c", script, check=check)


def optional_image(name: str) -> str:
    """The reference of an image that `sandbox up` doesn't make; built once for its content."""
    labctl = Path(sys.executable).parent / "labctl"
    done = subprocess.run([labctl, "--json", "sandbox", "image", name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["reference"])


def compose(verb: str, postgres: str, **settings: str) -> str:
    """`docker compose` as the student runs it, in the home directory; the values are the shell's."""
    values = {
        "S3_IMAGE": IMAGES["images"]["s3"],
        "OLD_MLFLOW_IMAGE": optional_image("mlflow-2"),
        "POSTGRES_IMAGE": postgres,
        **settings,
    }
    exports = " ".join(f"{key}='{value}'" for key, value in values.items())
    return shell(f"cd /home/cc && {exports} docker compose -f docker-compose-block.yaml {verb} 2>&1")


def log_runs() -> dict[str, Any]:
    program = (TUTORIAL / "log_runs.py").read_bytes()
    logged: dict[str, Any] = json.loads(
        nodes.execute(
            NODE, "docker", "exec", "-i", "jupyter", "python3", "-W", "ignore", "-", data=program
        ).splitlines()[-1]
    )
    return logged


def read_runs(logged: dict[str, Any]) -> dict[str, Any]:
    """What the lab's notebook container reads of those runs."""
    ids = json.dumps([run["run_id"] for runs in logged.values() for run in runs])
    program = (TUTORIAL / "read_runs.py").read_bytes()
    out = nodes.execute(NODE, "docker", "exec", "-i", "jupyter", "python3", "-W", "ignore", "-", ids, data=program)
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def assert_all_there(logged: dict[str, Any]) -> None:
    """Every parameter, metric and artifact as it was, the artifacts of both kinds, and the registered model."""
    found = read_runs(logged)
    assert found.pop("model") == [42]
    for run in (run for runs in logged.values() for run in runs):
        assert found[run["run_id"]] == {**run, "history": 3}
    assert {run["artifact_uri"].partition(":")[0] for run in found.values()} == {"mlflow-artifacts", "s3"}


def owners() -> dict[str, str]:
    """Who owns what, by path."""
    rows = shell(f"find {BLOCK}/postgres_data {BLOCK}/minio_data -printf '%p\\t%U:%G %m\\n'").splitlines()
    return dict(row.split("\t") for row in rows)


def marker() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(shell(f"cat {BLOCK}/.labctl/volume.json"))
    return content


def running() -> list[str]:
    return sorted(shell("docker ps --format '{{.Names}}'").split())


def sql(query: str, user: str, database: str) -> str:
    return shell(f'docker exec postgres psql -At -U {user} -d {database} -c "{query}"').strip()


def bare_host() -> None:
    """What a new VM doesn't have: labctl's files, and the volume's line in fstab."""
    shell(
        "rm -rf /etc/labctl/stack /etc/labctl/services.json; sed -i '/x-labctl/d' /etc/fstab; systemctl daemon-reload"
    )


def put_back(name: str, play: Play) -> None:
    """The volume as the tutorial left it, on a host without a stack."""
    assert play("stop").ok
    bare_host()
    shell(
        f"rm -rf {BLOCK}/postgres_data {BLOCK}/minio_data {BLOCK}/workspace {BLOCK}/.labctl"
        f" && cp -a /root/{name}/. {BLOCK}/"
    )
    assert mark(play).ok


def mark(play: Play) -> Any:
    volume = json.loads((nodes.state_dir() / NODE / "node.json").read_text())["volumes"][1]["id"]
    return play("main", role="block_volume", block_volume_id=volume, block_volume_lab="molecule")


@pytest.fixture(scope="module", autouse=True)
def volumes(play_once: Play) -> Iterator[dict[str, Any]]:
    """What was logged on each volume, by its name; the second one's servers still run on it.

    The scenario's own volume makes room for them, and nothing is left running at the end.
    """
    assert play_once("stop").ok
    bare_host()
    volume = nodes.inspect(NODE)["volumes"][1]
    disk = f"/dev/disk/by-id/virtio-{volume['id'][:20]}"
    shell(
        f"umount {BLOCK}; chattr -i {BLOCK} 2>/dev/null; parted -s {disk} mklabel gpt mkpart primary ext4 0% 100%"
        f" && udevadm settle && for i in $(seq 50); do [ -e {disk}-part1 ] && break; sleep 0.1; done"
        f" && mkfs.ext4 -q {disk}-part1 && mount {disk}-part1 {BLOCK} && chown cc {BLOCK}"
        f" && sudo -u cc mkdir {BLOCK}/minio_data {BLOCK}/postgres_data"
    )
    nodes.execute(NODE, "tee", "/home/cc/docker-compose-block.yaml", data=(TUTORIAL / "compose.yml").read_bytes())
    logged = {}
    # From version 18 on the official image wants the folder above, and keeps the data in 18/docker there.
    newest = {"postgres": optional_image("postgres-18"), "POSTGRES_TARGET": "/var/lib/postgresql", **OWN}
    compose("up -d", **newest)
    logged["own"] = log_runs()
    compose("down", **newest)
    # The README of 2025: the volume belongs to cc.
    shell(f"chown -R cc {BLOCK} && mkdir /root/own && cp -a {BLOCK}/*_data /root/own/ && rm -r {BLOCK}/*_data/*")
    shell(f"rm -rf {BLOCK}/minio_data/.minio.sys && sudo -u cc ls -A {BLOCK}/minio_data")
    compose("up -d", optional_image("postgres-15"))
    logged["plain"] = log_runs()
    yield logged
    play_once("stop")


# -- adoption --------------------------------------------------------------------------------------------------------


def test_servers_that_still_run_on_the_volume_are_not_joined_by_others(play: Play) -> None:
    """Two PostgreSQL servers on one directory ruin it; and the notebook's container may hold unsaved work."""
    assert mark(play).ok
    before = shell("docker inspect -f '{{.Id}} {{.State.StartedAt}}' minio postgres mlflow jupyter")
    refused = play("main")
    assert refused.failure["safety_stop"] is True
    assert "docker compose -f /home/cc/docker-compose-block.yaml down" in refused.failure["next_step"]
    assert shell("docker inspect -f '{{.Id}} {{.State.StartedAt}}' minio postgres mlflow jupyter") == before
    assert "stack" not in marker()
    compose("down", optional_image("postgres-15"))
    shell(f"mkdir /root/plain && cp -a {BLOCK}/*_data /root/plain/")


def test_a_newer_postgresql_is_never_put_on_it(play: Play) -> None:
    pg = f"find {BLOCK}/postgres_data -type f | sort | xargs sha256sum | sha256sum"
    before = shell(pg)
    named = {name: IMAGES["images"][name] for name in ("mlflow", "postgres", "s3", "jupyter")}
    refused = play("main", mlflow_stack_images=named)
    assert refused.failure["safety_stop"] is True
    assert "PostgreSQL 15" in refused.failure["expected"]
    assert "--into-new-major" in refused.failure["next_step"]
    assert (running(), shell(pg)) == ([], before)


def test_a_volume_that_cannot_be_written_to_is_left_alone(play: Play) -> None:
    shell(f"mount -o remount,ro {BLOCK}")
    try:
        refused = play("main")
        assert refused.failure["safety_stop"] is True
        assert "read-only" in refused.failure["msg"]
        assert running() == []
    finally:
        shell(f"mount -o remount,rw {BLOCK}")


def test_the_tutorials_volume_is_adopted_as_it_is(volumes: dict[str, Any], play: Play) -> None:
    before = owners()
    adopted = play("main")
    assert adopted.ok, adopted.output
    secrets = json.loads(shell(f"cat {BLOCK}/.labctl/secrets/secrets.json"))
    assert (secrets["postgres_user"], secrets["s3_user"]) == ("user", "your-access-key")
    assert shell(
        f"stat -c %a {BLOCK}/.labctl/secrets/secrets.json {BLOCK}/.labctl/dumps {BLOCK}/.labctl/dumps/*"
    ).split() == [
        "600",
        "700",
        "600",
    ]
    found = marker()
    assert found["origin"] == "adopted"
    assert found["stack"] == {
        "postgres_major": "15",
        "postgres_dir": "postgres_data",
        "s3_format": "xl-single",
        "s3_dir": "minio_data",
        "mlflow_version": "3.17.2",
        "mlflow_schema": NEW_REVISION,
        "origin": "tutorial",
    }
    after = owners()
    assert {path: after[path] for path in before if path in after} == {
        path: before[path] for path in before if path in after
    }
    assert_all_there(volumes["plain"])
    assert shell('cat /etc/labctl/services.json | grep -c \'"version": "15[.]\'').strip() == "1"
    assert play("main").changed == 0


def test_an_adopted_volume_takes_new_runs_of_both_kinds(play: Play) -> None:
    assert play("verify").ok
    program = (
        "import hashlib, mlflow, os, pathlib\n"
        "mlflow.set_experiment('older')\n"
        "content = os.urandom(100_000)\n"
        "pathlib.Path('/tmp/new.bin').write_bytes(content)\n"
        "with mlflow.start_run() as run: mlflow.log_artifact('/tmp/new.bin')\n"
        "there = {'run_id': run.info.run_id, 'artifact_path': 'new.bin'}\n"
        "back = mlflow.artifacts.download_artifacts(dst_path='/tmp/back', **there)\n"
        "assert run.info.artifact_uri.startswith('s3://')\n"
        "assert pathlib.Path(back).read_bytes() == content\n"
        "print('same')\n"
    )
    assert (
        nodes.execute(NODE, "docker", "exec", "-i", "jupyter", "python3", "-", data=program.encode()).split()[-1]
        == "same"
    )
    assert "your-secret-key" not in shell("docker inspect jupyter mlflow s3 postgres; cat /etc/labctl/stack/.env")


# -- what may go wrong with an upgrade -------------------------------------------------------------------------------


def test_an_older_mlflow_is_never_put_on_a_newer_database(play: Play) -> None:
    assert play("stop").ok
    images = {**{n: IMAGES["images"][n] for n in ("s3", "jupyter")}, "postgres-15": optional_image("postgres-15")}
    images |= {"postgres": IMAGES["images"]["postgres"], "mlflow": optional_image("mlflow-2")}
    refused = play("main", mlflow_stack_images=images)
    assert refused.failure["safety_stop"] is True
    assert "newer MLflow" in refused.failure["msg"]
    assert running() == []
    assert sorted(shell(f"ls {BLOCK}/.labctl").split()) == ["dumps", "secrets", "volume.json"]


def test_an_upgrade_that_fails_leaves_the_database_as_it_was(play: Play) -> None:
    """A table of somebody's own has the name of one that a migration makes."""
    put_back("plain", play)
    shell(
        f"docker run -d --name meddler -v {BLOCK}/postgres_data:/var/lib/postgresql/data"
        f" {optional_image('postgres-15')}; for i in $(seq 60); do"
        " docker exec meddler psql -U user -d mlflowdb -c 'CREATE TABLE logged_models (mine int)'"
        " && break; sleep 0.5; done; docker stop meddler && docker rm meddler"
    )
    failed = play("main")
    assert "mlflow db upgrade" in failed.failure["msg"] and not failed.failure.get("safety_stop")
    assert "logged_models" in failed.failure["msg"]
    assert sql("SELECT version_num FROM alembic_version", "user", "mlflowdb") == OLD_REVISION
    assert sql("SELECT count(*) FROM runs", "user", "mlflowdb") == "5"
    assert sql("SELECT count(*) FROM pg_database WHERE datname LIKE 'labctl%'", "user", "mlflowdb") == "0"
    assert "mlflow" not in running()
    assert len(shell(f"ls {BLOCK}/.labctl/dumps").split()) == 1, "the dump stays"
    sql("DROP TABLE logged_models", "user", "mlflowdb")


def test_mlflow_that_does_not_start_on_the_new_database_gives_the_old_one_back(play: Play) -> None:
    shell("systemd-run --unit=in-the-way python3 -m http.server 8000 --bind 127.0.0.1; sleep 1")
    try:
        failed = play("main")
        assert "as it was before the upgrade" in failed.failure["found"]
        assert sql("SELECT version_num FROM alembic_version", "user", "mlflowdb") == OLD_REVISION
        assert sql("SELECT count(*) FROM pg_database WHERE datname LIKE 'labctl%'", "user", "mlflowdb") == "0"
    finally:
        shell("systemctl stop in-the-way")


def test_after_the_cause_is_mended_the_same_command_upgrades(volumes: dict[str, Any], play: Play) -> None:
    done = play("main")
    assert done.ok, done.output
    assert_all_there(volumes["plain"])
    assert len(shell(f"ls {BLOCK}/.labctl/dumps").split()) == 3


# -- credentials of one's own, a tree that belongs to cc, and SIGKILL ------------------------------------------------


@pytest.mark.parametrize("given", [{}, {**CREDENTIALS, "postgres_password": "guessed"}])
def test_without_the_right_credentials_nothing_is_kept(given: dict[str, str], play: Play) -> None:
    if not given:
        put_back("own", play)
    refused = play("main", mlflow_stack_credentials=given)
    assert refused.failure["safety_stop"] is True
    assert "credentials_file" in refused.failure["next_step"]
    assert running() == []
    assert "stack" not in marker()
    assert shell(f"ls -A {BLOCK}/.labctl").split() == ["volume.json"]
    assert shell("ls /run/labctl-adopt 2>/dev/null", check=False) == ""
    assert not any(secret in refused.output for secret in ("guessed", OWN["MINIO_ROOT_PASSWORD"]))


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_of_an_upgrade_no_run_is_lost(step: str, play: Play, kill_at: KillAt) -> None:
    """The next run, and the next kill, meet what this one left. In the upgrade itself the whole node dies, too."""
    with kill_at(step):
        assert not play("main", mlflow_stack_credentials=CREDENTIALS).ok
    if step == "upgrade":
        assert "labctl-mlflow-upgrade" in running(), "the one-shot container outlives the module"
        nodes.reboot(NODE, kill=True)
        shell(f"mountpoint -q {BLOCK} || mount {BLOCK}; systemctl start docker")
        deadline = time.monotonic() + 60
        while "postgres" not in running() and time.monotonic() < deadline:
            time.sleep(0.5)
    for _ in range(60):
        if shell("docker exec postgres pg_isready -q -h 127.0.0.1 -U ada && echo yes", check=False).strip() == "yes":
            break
        time.sleep(0.5)
    assert sql("SELECT count(*) FROM runs", "ada", "labdb") == "5", "a complete database is there at each moment"


def test_the_same_command_ends_what_the_kills_left(volumes: dict[str, Any], play: Play) -> None:
    done = play("main", mlflow_stack_credentials=CREDENTIALS)
    assert done.ok, done.output
    assert sql("SELECT version_num FROM alembic_version", "ada", "labdb") == NEW_REVISION
    assert sql("SELECT count(*) FROM pg_database WHERE datname LIKE 'labctl%'", "ada", "labdb") == "0"
    assert shell(f"ls {BLOCK}/.labctl").split() == ["dumps", "secrets", "volume.json"]
    assert not [name for name in shell(f"ls {BLOCK}/.labctl/dumps").split() if not name.endswith(".dump")]
    assert marker()["stack"]["mlflow_schema"] == NEW_REVISION
    assert marker()["stack"]["postgres_dir"] == "postgres_data/18/docker"
    assert marker()["stack"]["postgres_major"] == "18"
    assert_all_there(volumes["own"])
    cluster = f"{BLOCK}/postgres_data/18/docker"
    assert {row.split()[0] for path, row in owners().items() if path.startswith(cluster)} == {"1000:999"}
    assert play("main").changed == 0


# -- a full volume ---------------------------------------------------------------------------------------------------


def test_a_full_volume_is_told_and_the_services_recover_once_there_is_room(volumes: dict[str, Any], play: Play) -> None:
    shell(f"fallocate -l $(df -B1 --output=avail {BLOCK} | tail -1) {BLOCK}/workspace/big || true; sync")
    try:
        assert not play("verify").ok, "a run can't be logged"
        told = play("main")
        assert "is full" in told.failure["msg"] and "MiB free" in told.failure["found"]
        assert "volume extend" in told.failure["next_step"]
    finally:
        shell(f"rm {BLOCK}/workspace/big; sync")
    deadline = time.monotonic() + 120
    while not (verified := play("verify")).ok:
        assert time.monotonic() < deadline, verified.output
    assert_all_there(volumes["own"])
    assert play("main").ok


# -- another version, in the third place ------------------------------------------------------------------------------


def test_a_database_of_postgresql_16_in_its_folder_data_is_adopted_too(play: Play) -> None:
    assert play("stop").ok
    bare_host()
    shell(f"rm -rf {BLOCK}/minio_data/.minio.sys {BLOCK}/*_data/* {BLOCK}/workspace {BLOCK}/.labctl")
    made = {"postgres": optional_image("postgres-16"), "POSTGRES_TARGET": "/var/lib/postgresql"}
    compose("up -d", **made)
    logged = log_runs()
    compose("down", **made)
    assert mark(play).ok
    adopted = play("main")
    assert adopted.ok, adopted.output
    assert (marker()["stack"]["postgres_major"], marker()["stack"]["postgres_dir"]) == ("16", "postgres_data/data")
    assert_all_there(logged)
