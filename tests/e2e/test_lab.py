"""The command line from outside, on one real lab; the tests build on each other in the order of a lab's life."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from labctl import lab as labs
from labctl import lifecycle, observe
from labctl.context import Context
from labctl.progress import Progress
from rich.console import Console
from story import LABCTL, REPOSITORY, Commands, Evidence, sandbox_cloud

SERVER = "node-persist-e2e"
SERVICES = {"mlflow", "postgres", "s3", "jupyter"}


def interrupt_up(lab: Commands, line: str, after: float) -> int:
    """Start `up`, press Ctrl-C some seconds after its progress says `line`, and return its exit code."""
    process = subprocess.Popen(
        [str(LABCTL), "up"],
        cwd=lab.directory,
        env={**os.environ, **lab.environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # a job of nohup ignores SIGINT, and so would what it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    assert process.stderr is not None
    for said in process.stderr:
        if line in said:
            time.sleep(after)
            process.send_signal(signal.SIGINT)
            break
    process.stderr.read()
    return process.wait(timeout=60)


@pytest.mark.parametrize(("line", "after"), [("server node", 0.5), ("volume block", 0.2), ("attach", 1)])
def test_ctrl_c_while_the_cloud_works_is_told_by_its_exit_code(lab: Commands, line: str, after: float) -> None:
    assert interrupt_up(lab, line, after) == 130


def test_check_mode_on_a_fresh_node_predicts_and_changes_nothing(lab: Commands) -> None:
    before = lab.ssh("dpkg -l | sha256sum; ls /etc/docker /etc/rclone /etc/labctl 2>&1; mount | sha256sum")
    outcome = lab.json("converge", "--check")
    assert outcome["check"] is True and outcome["changed"] > 0
    assert lab.ssh("dpkg -l | sha256sum; ls /etc/docker /etc/rclone /etc/labctl 2>&1; mount | sha256sum") == before


@pytest.mark.parametrize("after", [2, 8, 25])
def test_ctrl_c_while_the_host_is_converged_is_told_by_its_exit_code(lab: Commands, after: float) -> None:
    assert interrupt_up(lab, "converge", after) == 130


def test_up_finishes_what_was_interrupted(lab: Commands) -> None:
    assert lab.json("up")["ok"] > 0


def test_status_is_as_scripts_expect_it_and_all_is_healthy(lab: Commands) -> None:
    status = lab.json("status")
    assert (status["lab"], status["site"]) == ("e2e", "sandbox")
    assert status["server"]["name"] == SERVER and status["server"]["status"] == "ACTIVE"
    assert set(status["server"]) == {"name", "id", "status", "address", "lease_ends"}
    assert status["volume"]["attached"] is True and status["volume"]["mounted"] is True
    assert status["volume"]["size_gib"] == 2 and re.fullmatch(r"[0-9a-f-]{36}", status["volume"]["filesystem_uuid"])
    assert status["object_store"] == {"container": "object-persist-e2e", "mounted": True, "objects": 0}
    assert set(status["services"]) == SERVICES
    for name, service in status["services"].items():
        assert service["healthy"] is True, name
        assert service["version"], name
        assert service["url"] or name == "postgres", name  # PostgreSQL is for the other services only


def test_doctor_finds_a_working_lab_well_and_names_what_is_wrong(lab: Commands, tmp_path: Path) -> None:
    assert lab.json("doctor")["healthy"] is True
    other = tmp_path / "lab.yaml"
    other.write_text("lab: e2e-ill\nsite: sandbox\nserver:\n  flavor: m1.huge\nvolume:\n  size_gib: 16000\n")
    checks = {one["check"]: one for one in lab.json("--lab", str(other), "doctor", expect=3)["checks"]}
    assert checks["image, flavor, network"]["state"] == "failed" and "m1.huge" in str(checks["image, flavor, network"])
    assert checks["quota"]["state"] == "failed" and "gigabytes" in checks["quota"]["found"]
    assert checks["compute login"]["state"] == "ok"


def test_logs_shows_what_a_service_wrote(lab: Commands) -> None:
    assert "PostgreSQL" in lab.run("logs", "postgres", "--lines", "1000")
    lab.run("logs", "nginx", expect=2)


def test_a_second_converge_changes_nothing_in_at_most_eight_round_trips(lab: Commands) -> None:
    outcome = lab.json("converge")
    assert outcome["changed"] == 0, outcome["changed_tasks"]
    assert outcome["remote_tasks"] <= 8


def test_looking_at_a_finished_lab_costs_few_api_requests(lab: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for tokens included; `up` shows the status at its end. Each is what a command of its own makes."""
    monkeypatch.chdir(lab.directory)
    monkeypatch.setenv("LABCTL_STATE", lab.environment["LABCTL_STATE"])

    def context() -> Context:
        return Context(labs.load(Path("lab.yaml")), Progress(Console(quiet=True)), lambda _: False)

    ctx = context()
    assert lifecycle.up(ctx).changed == 0
    observe.status(ctx)
    assert ctx.cloud.requests <= 15, ctx.cloud.traffic.log
    ctx = context()
    assert observe.status(ctx).healthy
    assert ctx.cloud.requests <= 8, ctx.cloud.traffic.log


def test_a_converge_waits_for_what_an_interrupted_one_left_going_on_the_host(lab: Commands) -> None:
    lock = "/run/labctl-host.lock"
    lab.ssh(f"sudo sh -c 'nohup flock {lock} sleep 25 >/dev/null 2>&1 &'")
    assert lab.json("converge")["changed"] == 0
    lab.ssh(f"sudo flock --nonblock {lock} true")  # a converge that doesn't wait is done long before the 25 s


def test_plain_ansible_works_with_the_dynamic_inventory(lab: Commands) -> None:
    environment = {
        **os.environ,
        **lab.environment,
        "LABCTL_LAB": str(lab.directory / "lab.yaml"),
        "ANSIBLE_CONFIG": str(REPOSITORY / "playbooks" / "ansible.cfg"),
    }

    def ansible(program: str, *arguments: str) -> str:
        inventory = ["-i", str(REPOSITORY / "inventory" / "labctl.py")]
        command = [str(Path(sys.executable).with_name(program)), *inventory, *arguments]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    assert SERVER in json.loads(ansible("ansible-inventory", "--list"))["_meta"]["hostvars"]
    assert "pong" in ansible("ansible", "labctl", "-m", "ping")
    played = ansible("ansible-playbook", str(REPOSITORY / "playbooks" / "converge.yml"))
    assert "changed=0" in played and "failed=0" in played


def test_mlflow_answers_by_the_names_that_users_use(lab: Commands) -> None:
    address = lab.json("status")["server"]["address"]
    with lab.tunnel():
        for host in ("127.0.0.1:8000", "localhost:8000", "mlflow:8000", f"{address}:8000", address):
            request = urllib.request.Request(
                "http://127.0.0.1:8000/api/2.0/mlflow/experiments/search",
                json.dumps({"max_results": 5}).encode(),
                {"Content-Type": "application/json", "Host": host},
            )
            with urllib.request.urlopen(request, timeout=20) as answer:
                assert "experiments" in json.load(answer), host
        request = urllib.request.Request("http://127.0.0.1:8000/", headers={"Host": "attacker.example"})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=20)
        assert caught.value.code == 403
    probe = subprocess.run(["curl", "-s", "-m", "3", f"http://{address}:8000/"], check=False, capture_output=True)
    assert probe.returncode != 0, "a service that lab.yaml doesn't open is reachable from the network"


def test_verify_logs_a_run_and_reads_it_back(lab: Commands) -> None:
    first = lab.json("verify")
    assert first["run_id"] and re.fullmatch(r"[0-9a-f]{64}", first["artifact_sha256"])
    second = lab.json("verify", "--read-only")
    assert second["logged"] is False and second["run_id"] == first["run_id"] and second["earlier_runs"] >= 1


def test_no_secret_is_in_files_processes_or_docker_inspect(lab: Commands) -> None:
    collect = (
        "import json, pathlib, re\n"
        "found = set()\n"
        "for path in pathlib.Path('/mnt/block/.labctl').rglob('*'):\n"
        "    if path.is_file() and 'secret' in str(path):\n"
        "        text = path.read_text(errors='replace')\n"
        "        found |= set(re.findall(r'[A-Za-z0-9_+/=-]{20,}', text))\n"
        "conf = pathlib.Path('/etc/rclone/rclone.conf').read_text()\n"
        "found |= set(re.findall(r'application_credential_secret *= *(\\S+)', conf))\n"
        "print(json.dumps(sorted(found)))\n"
    )
    done = subprocess.run(
        [str(LABCTL), "ssh", "--", "sudo python3 -"],
        cwd=lab.directory,
        env={**os.environ, **lab.environment},
        input=collect,
        capture_output=True,
        text=True,
        check=True,
    )
    secrets = json.loads(done.stdout)
    assert len(secrets) >= 4
    on_host = lab.ssh(
        "ps auxww; sudo docker ps -aq | xargs sudo docker inspect; sudo journalctl --no-pager;"
        " sudo sh -c 'cat /proc/[0-9]*/cmdline' | tr '\\0' ' '; sudo systemctl show '*' -p Environment"
    )
    files = [path for folder in (lab.directory, Path(lab.environment["LABCTL_STATE"])) for path in folder.rglob("*")]
    here = "".join(path.read_text(errors="replace") for path in files if path.is_file())
    for secret in secrets:
        assert secret not in on_host, "on the host"
        assert secret not in here, "below the working or the state directory"


def test_unmount_and_mount_go_there_and_back(lab: Commands) -> None:
    lab.run("unmount")
    assert lab.json("status")["object_store"]["mounted"] is False
    lab.run("mount")
    assert lab.json("status")["object_store"]["mounted"] is True


def test_rclone_killed_the_mount_is_back_also_in_jupyter(lab: Commands) -> None:
    lab.ssh("sudo pkill -KILL -x rclone; true")
    read = "ls /mnt/object && sudo docker exec jupyter ls /mnt/Food-11"
    lab.ssh(f"for i in $(seq 15); do sleep 1; {read} && exit 0; done; exit 1")


def test_an_unmounted_volume_never_gets_a_database_on_the_root_disk(lab: Commands) -> None:
    lab.ssh("sudo systemctl stop docker.socket docker.service; sudo umount /mnt/block")
    lab.ssh("sudo systemctl start docker.service; sleep 10")
    assert lab.ssh("sudo ls -A /mnt/block").strip() == ""
    assert "postgres" not in lab.ssh("sudo docker ps --format '{{.Names}}'")
    lab.ssh("sudo mount /mnt/block")
    wait_until_healthy(lab)


def test_a_reboot_brings_everything_back_by_itself(lab: Commands) -> None:
    boot = lab.ssh("cat /proc/1/stat | cut -d' ' -f22; systemctl show -p UserspaceTimestamp").strip()
    subprocess.run(
        [str(LABCTL), "ssh", "--", "sudo reboot"], cwd=lab.directory, env={**os.environ, **lab.environment}, check=False
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if lab.ssh("cat /proc/1/stat | cut -d' ' -f22; systemctl show -p UserspaceTimestamp").strip() != boot:
                break
        except AssertionError:
            time.sleep(2)
    wait_until_healthy(lab)
    assert lab.json("verify", "--read-only")["earlier_runs"] >= 1


def wait_until_healthy(lab: Commands, seconds: float = 150) -> None:
    """Until `status` shows every service healthy and both mounts."""
    deadline = time.monotonic() + seconds
    status = {}
    while time.monotonic() < deadline:
        status = lab.json("status")
        healthy = {name for name, service in status["services"].items() if service["healthy"]}
        if healthy == SERVICES and status["volume"]["mounted"] and status["object_store"]["mounted"]:
            return
        time.sleep(3)
    raise AssertionError(f"not healthy after {seconds:.0f} s: {status}")


def test_drain_leaves_nothing_on_the_volume_and_converge_brings_it_back(lab: Commands) -> None:
    assert lab.json("drain") == {"drained": True}
    status = lab.json("status")
    assert status["volume"]["mounted"] is False and not any(s["healthy"] for s in status["services"].values())
    lab.run("converge")
    assert lab.json("verify", "--read-only")["earlier_runs"] >= 1


def test_a_server_that_was_lost_and_made_by_hand_gets_its_volume_back(lab: Commands) -> None:
    before = Evidence.collect(lab)
    lab.run("down")
    assert lab.json("status")["server"]["status"] == "ABSENT"
    make_server_by_hand(lab)
    assert lab.json("reattach-volume")["earlier_runs"] >= 1
    assert not before.lost(Evidence.collect(lab))


def make_server_by_hand(lab: Commands) -> None:
    """What a user does in Horizon: a server with the lab's key, no address, no group of labctl's."""
    cloud = sandbox_cloud()
    key = (Path(lab.environment["LABCTL_STATE"]) / "id_ed25519.pub").read_text()
    pair = cloud.create_keypair("e2e-by-hand", key)
    try:
        cloud.create_server(
            SERVER,
            image="CC-Ubuntu24.04",
            flavor="m1.large",
            network="sharednet1",
            key_name=pair.name,
            auto_ip=False,
            wait=True,
        )
    finally:
        cloud.delete_keypair(pair.name)


def test_destroy_wants_the_labs_name(lab: Commands) -> None:
    lab.run("destroy", expect=2)
    assert lab.json("status")["volume"]["id"]
