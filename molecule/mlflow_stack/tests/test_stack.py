"""What is lost if one of these fails: runs and artifacts, the secrets that guard them, or a root disk with a second,
empty database on it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(os.environ.get("MOLECULE_PROJECT_DIRECTORY", Path(__file__).parents[3]))
sys.path.insert(0, str(PROJECT / "tests"))

import nodes  # noqa: E402

NODE = "mlflow-stack"
SERVICES = ("jupyter", "mlflow", "postgres", "s3")
#: Seconds for the services to be healthy again after something was done to them, on a busy machine.
RECOVERY = 300
Play = Callable[..., Any]
KillAt = Callable[[str], AbstractContextManager[None]]
STARTED_AT = f"docker inspect -f '{{{{.Id}}}} {{{{.State.StartedAt}}}}' {' '.join(SERVICES)}"


def shell(script: str, check: bool = True) -> str:
    """Run a script as root in the node, through the engine: works whatever the network does."""
    return nodes.execute(NODE, "bash", "-o", "pipefail", "-c", script, check=check)


def health() -> dict[str, str]:
    """Each container's health, as Docker says it."""
    form = "{{slice .Name 1}} {{if .State.Running}}{{.State.Health.Status}}{{else}}down{{end}}"
    return dict(
        line.split() for line in shell(f"docker inspect -f '{form}' {' '.join(SERVICES)}", check=False).splitlines()
    )


def wait_healthy(seconds: float = RECOVERY) -> None:
    deadline = time.monotonic() + seconds
    while (now := health()) != dict.fromkeys(SERVICES, "healthy"):
        assert time.monotonic() < deadline, (
            f"{now}\n{shell('journalctl -u labctl-stack -n 20 --no-pager', check=False)}"
        )
        time.sleep(1)


def wait_down(seconds: float = RECOVERY) -> None:
    deadline = time.monotonic() + seconds
    while running := shell("docker ps -q --filter label=com.docker.compose.project=persist_block", check=False).split():
        assert time.monotonic() < deadline, f"still running: {running}"
        time.sleep(1)


def device() -> str:
    return shell("findmnt -n -o SOURCE --mountpoint /mnt/block").strip()


def assert_root_disk_clean() -> None:
    """Nothing at the mount point itself, which is only seen while nothing is mounted there."""
    assert shell("ls -A /mnt/block").strip() == ""


def secrets() -> dict[str, str]:
    values: dict[str, str] = json.loads(shell("cat /mnt/block/.labctl/secrets/secrets.json"))
    return {key: value for key, value in values.items() if key.endswith(("password", "token"))}


@pytest.fixture(autouse=True)
def services_up() -> None:
    """Each test starts from a running stack, whatever the one before it did."""
    wait_healthy()


# -- what users get --------------------------------------------------------------------------------------------------


def test_services_file_lets_status_answer() -> None:
    known = json.loads(shell("cat /etc/labctl/services.json"))
    assert set(known) == set(SERVICES)
    assert known["mlflow"]["url"] == "http://127.0.0.1:8000"
    assert known["mlflow"]["version"] == "3.17.2"
    assert all(service["version"] and service["health"] == name for name, service in known.items())


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost:8000", 200),
        ("mlflow:8000", 200),
        ("203.0.113.9:8000", 200),
        ("evil.example", 403),
    ],
)
def test_mlflow_answers_by_every_name_that_users_have_and_no_other(host: str, status: int) -> None:
    search = "http://127.0.0.1:8000/api/2.0/mlflow/experiments/search"
    body = "-H 'Content-Type: application/json' -d '{\"max_results\": 1}'"
    assert shell(f"curl -s -o /dev/null -w '%{{http_code}}' -H 'Host: {host}' {body} {search}") == str(status)


def test_the_page_opened_by_the_floating_ip_may_search() -> None:
    """A browser sends Origin with each POST; MLflow blocks what isn't allowed."""
    headers = "-H 'Host: 203.0.113.9:8000' -H 'Origin: http://203.0.113.9:8000' -H 'Content-Type: application/json'"
    search = "http://127.0.0.1:8000/ajax-api/2.0/mlflow/experiments/search"
    assert shell(f"curl -s -o /dev/null -w '%{{http_code}}' {headers} -d '{{\"max_results\": 1}}' {search}") == "200"


def test_ports_are_published_on_loopback_only() -> None:
    listening = shell("ss -Hltn | awk '{print $4}'").split()
    published = [address for address in listening if address.rpartition(":")[2] in ("8000", "9000", "9001", "8888")]
    assert len(published) == 4
    assert all(address.startswith("127.0.0.1:") for address in published)


def test_jupyter_asks_for_the_token() -> None:
    token = secrets()["jupyter_token"]
    ask = "curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:8888/api/contents"
    assert shell(ask) == "403"
    assert shell(f"{ask} -H @- <<< 'Authorization: token {token}'") == "200"


def test_a_probe_run_is_logged_and_read_back(play: Play) -> None:
    written = play("verify")
    assert written.ok, written.output
    read = play("verify", mlflow_stack_verify_write=False)
    assert read.ok, read.output
    assert "previous_runs_ok" in read.custom


def test_an_artifact_that_changed_is_noticed(play: Play) -> None:
    """The check isn't one that always passes: another artifact under the run's name makes it fail."""
    assert play("verify").ok
    change = (
        "import boto3, os\n"
        "s3 = boto3.client('s3', endpoint_url=os.environ['MLFLOW_S3_ENDPOINT_URL'])\n"
        "found = s3.list_objects_v2(Bucket='mlflow-artifacts')['Contents']\n"
        "keys = [o for o in found if o['Key'].endswith('probe.bin')]\n"
        "key = max(keys, key=lambda o: o['LastModified'])['Key']\n"
        "old = s3.get_object(Bucket='mlflow-artifacts', Key=key)['Body'].read()\n"
        "s3.put_object(Bucket='mlflow-artifacts', Key='kept', Body=old)\n"
        "s3.put_object(Bucket='mlflow-artifacts', Key=key, Body=old[:-1] + b'x')\n"
        "print(key)\n"
    )
    key = nodes.execute(NODE, "docker", "exec", "-i", "mlflow", "python3", "-", data=change.encode()).strip()
    try:
        found = play("verify", mlflow_stack_verify_write=False)
        assert not found.ok
        assert "came back changed" in found.failure["msg"]
    finally:
        restore = (
            "import boto3, os\n"
            "s3 = boto3.client('s3', endpoint_url=os.environ['MLFLOW_S3_ENDPOINT_URL'])\n"
            f"s3.copy_object(Bucket='mlflow-artifacts', Key={key!r}, CopySource='mlflow-artifacts/kept')\n"
        )
        nodes.execute(NODE, "docker", "exec", "-i", "mlflow", "python3", "-", data=restore.encode())
    assert play("verify", mlflow_stack_verify_write=False).ok


# -- secrets ---------------------------------------------------------------------------------------------------------


def test_no_secret_is_seen_outside_its_files() -> None:
    seen = shell(
        "docker inspect $(docker ps -aq); ps axww -o args; "
        "cat /etc/labctl/stack/* /etc/labctl/stack/.env /etc/labctl/services.json 2>/dev/null; "
        "journalctl -u labctl-stack --no-pager; for c in jupyter mlflow postgres s3; do docker logs $c 2>&1; done; "
        "for p in /proc/[0-9]*/environ; do tr '\\0' '\\n' < $p; done 2>/dev/null; true"
    )
    assert "POSTGRES_PASSWORD_FILE" in seen
    for name, value in secrets().items():
        assert value not in seen, name


def test_secret_files_are_for_their_reader_alone() -> None:
    found = shell("stat -c '%n %a' /mnt/block/.labctl/secrets/*").splitlines()
    assert found
    assert all(line.endswith((" 400", " 600")) for line in found)
    assert shell("stat -c '%a %u' /mnt/block/.labctl/secrets").strip() == "700 0"


# -- idempotence and the user's own files ----------------------------------------------------------------------------


def test_an_edited_notebook_stays_and_a_removed_one_comes_back(play: Play) -> None:
    notebook = "/mnt/block/workspace/food11_demo.ipynb"
    shell(f"echo mine > {notebook} && chown 1000 {notebook}")
    assert play("main").changed == 0
    assert shell(f"cat {notebook}").strip() == "mine"
    shell(f"rm {notebook}")
    assert play("main").changed == 1
    assert shell(f"cat {notebook}") == shell("cat /etc/labctl/stack/food11_demo.ipynb")


def test_check_mode_sees_a_stopped_service_and_leaves_it(play: Play) -> None:
    shell("docker stop s3")
    predicted = play("main", check=True)
    assert predicted.ok and predicted.changed == 1
    assert health()["s3"] == "down"
    assert play("main").ok
    assert play("main").changed == 0


def test_a_service_that_cannot_start_is_named_with_its_log(play: Play) -> None:
    shell("mv /mnt/block/.labctl/secrets/secrets.json /root/ && docker rm -f mlflow")
    shell('sed \'s/"postgres_password": "/&wrong/\' /root/secrets.json > /mnt/block/.labctl/secrets/secrets.json')
    try:
        failed = play("main", mlflow_stack_start_timeout=30)
        assert not failed.ok
        assert "mlflow" in failed.failure["found"]
        assert not any(value in failed.output for value in secrets().values())
    finally:
        shell("mv /root/secrets.json /mnt/block/.labctl/secrets/secrets.json")
        assert play("main").ok


# -- the volume goes and comes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["umount", "umount -l"])
def test_unmounted_by_hand_nothing_runs_and_nothing_is_written(how: str, play: Play) -> None:
    source = device()
    shell(f"{how} /mnt/block")
    wait_down()
    assert_root_disk_clean()
    refused = play("main")
    assert refused.failure["safety_stop"] is True
    assert "no mount" in refused.failure["found"]
    if how == "umount -l":
        shell("systemctl restart docker")
        time.sleep(8)
        wait_down(5)
    assert_root_disk_clean()
    shell(f"mount {source} /mnt/block")
    wait_healthy()
    assert play("verify", mlflow_stack_verify_write=False).ok
    assert play("main").changed == 0


def test_a_folder_in_the_way_on_the_root_disk_attracts_no_service() -> None:
    """Somebody made the very paths while the volume was away: still nothing may start on them."""
    source = device()
    shell("umount /mnt/block")
    wait_down()
    try:
        shell("chattr -i /mnt/block 2>/dev/null", check=False)  # somebody who insists
        shell("mkdir -p /mnt/block/postgres_data /mnt/block/minio_data && chmod 777 /mnt/block/*")
        shell("systemctl restart docker; sleep 5; docker start postgres s3", check=False)
        time.sleep(3)
        assert shell("ls -A /mnt/block/postgres_data /mnt/block/minio_data | grep -v :", check=False).strip() == ""
        assert not shell("docker ps -q").strip()
    finally:
        shell("rmdir /mnt/block/postgres_data /mnt/block/minio_data; chattr +i /mnt/block", check=False)
        shell(f"mount {source} /mnt/block")


def test_docker_restarted_with_the_volume_there() -> None:
    shell("systemctl restart docker")
    wait_healthy()


def test_the_node_cut_off_while_runs_are_logged(play: Play) -> None:
    """A power cut loses the run that was being logged, and none that had been told to be finished."""
    nodes.execute(NODE, "tee", "/root/probe.py", data=(PROJECT / "roles/mlflow_stack/files/probe.py").read_bytes())
    shell(
        "nohup bash -c 'cd /root; while docker exec -i jupyter python3 - http://mlflow:8000 write < probe.py >> probes;"
        " do :; done' >/dev/null 2>&1 &"
    )
    deadline = time.monotonic() + RECOVERY
    while len(shell("cat /root/probes", check=False).splitlines()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    nodes.reboot(NODE, kill=True)
    shell("mountpoint -q /mnt/block || mount /mnt/block")
    wait_healthy()
    told = [json.loads(line)["run_id"] for line in shell("cat /root/probes").splitlines() if line.endswith("}")]
    assert len(told) >= 3
    for run_id in told:
        run = shell(f"curl -sf 'http://127.0.0.1:8000/api/2.0/mlflow/runs/get?run_id={run_id}'")
        assert json.loads(run)["run"]["info"]["status"] == "FINISHED"
    read = play("verify", mlflow_stack_verify_write=False)
    assert read.ok, read.output


def test_the_node_rebooted_without_its_volume() -> None:
    source = device()
    shell("cp /etc/fstab /root/fstab && sed -i '/block/d' /etc/fstab")
    nodes.reboot(NODE)
    try:
        assert shell("findmnt -n --mountpoint /mnt/block", check=False) == ""
        time.sleep(10)
        wait_down(5)
        assert_root_disk_clean()
    finally:
        shell("cp /root/fstab /etc/fstab; systemctl daemon-reload; mount /mnt/block || mount " + source + " /mnt/block")
    wait_healthy()


# -- a new volume ----------------------------------------------------------------------------------------------------


def test_a_first_start_that_is_cut_off_is_begun_anew(play: Play, kill_at: KillAt) -> None:
    """Each run meets what the one before left: files, a cluster without its database, a complete one."""
    assert play("stop").ok
    shell(
        "cd /mnt/block && mkdir kept && mv postgres_data minio_data workspace .labctl kept/ && mkdir -m 0700 .labctl"
        ' && python3 -c \'import json; m = json.load(open("kept/.labctl/volume.json")); del m["stack"];'
        ' json.dump(m, open(".labctl/volume.json", "w"))\''
    )
    for step in ("files", "cluster", "database"):
        with kill_at(step):
            assert not play("main").ok, step
        assert shell("test -e /mnt/block/.labctl/first-start.json && echo noted").strip() == "noted"
    assert play("main").ok
    assert play("verify").ok
    assert shell("test -e /mnt/block/.labctl/first-start.json || echo ended").strip() == "ended"
    assert "postgres_data.unfinished-" in shell("ls /mnt/block"), "nothing on a volume is deleted"
    # Without the note the same remains are somebody's data.
    assert play("stop").ok
    shell("mv /mnt/block/postgres_data.unfinished-* /mnt/block/kept/ && rm -r /mnt/block/postgres_data/PG_VERSION")
    refused = play("main")
    assert refused.failure["safety_stop"] is True
    shell(
        "cd /mnt/block && rm -r postgres_data minio_data workspace .labctl"
        " && mv kept/postgres_data kept/minio_data kept/workspace kept/.labctl . && rm -r kept"
    )
    assert play("main").ok
    assert play("verify", mlflow_stack_verify_write=False).ok


# -- taken down (data that doesn't fit: test_tutorial.py) ------------------------------------------------------------


def test_stopped_means_stopped_cleanly_and_converge_starts_again(play: Play) -> None:
    stopped = play("stop")
    assert stopped.ok and stopped.changed == 1, stopped.output
    assert shell("docker ps -aq").strip() == ""
    assert shell("systemctl is-active labctl-stack", check=False).strip() == "inactive"
    assert shell("ls /mnt/block/postgres_data/postmaster.pid 2>/dev/null", check=False) == ""
    shell("fuser -m /mnt/block 2>/dev/null && exit 1 || true")
    assert play("stop").changed == 0
    source = device()
    shell(f"umount /mnt/block && mount {source} /mnt/block")
    assert play("main").ok
    started = shell(STARTED_AT)
    time.sleep(8)  # the guard looks every 5 s
    assert shell(STARTED_AT) == started, "the guard restarted services that had just been started on this very mount"
    assert play("verify", mlflow_stack_verify_write=False).ok
