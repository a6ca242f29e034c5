"""A blank volume is initialised, a tutorial-made one keeps every byte, and neither is ever written to unmounted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(os.environ.get("MOLECULE_PROJECT_DIRECTORY", Path(__file__).parents[3]))
sys.path[:0] = [str(PROJECT / "tests"), str(Path(__file__).parent)]

import direct  # noqa: E402
import nodes  # noqa: E402


def node(host: Any) -> str:
    return str(host.ansible.get_variables()["inventory_hostname"])


def marker(host: Any) -> dict[str, Any]:
    with host.sudo():
        values: dict[str, Any] = json.loads(host.file("/mnt/block/.labctl/volume.json").content_string)
    return values


def unmount(host: Any, *options: str) -> subprocess.CompletedProcess[str]:
    record = nodes.inspect(node(host))
    play = [{"hosts": "all", "gather_facts": False, "become": True, "tasks": [
        {"ansible.builtin.include_role": {"name": "block_volume", "tasks_from": "unmount"}}]}]  # fmt: skip
    book = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "unmount.yml"
    book.write_text(json.dumps(play))
    connection = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
    command = [
        "ansible-playbook", "-i", f"{record['address']},", "-u", "cc", "--private-key", record["ssh_key"],
        "--ssh-common-args", connection, "-e", f"block_volume_id={record['volumes'][0]['id']}", *options, str(book),
    ]  # fmt: skip
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


def test_the_volume_is_mounted_by_uuid_and_may_be_missing_at_boot(host: Any) -> None:
    mount = host.mount_point("/mnt/block")
    assert mount.exists and mount.filesystem == "ext4"
    line = next(ln for ln in host.file("/etc/fstab").content_string.splitlines() if " /mnt/block " in ln)
    assert line.startswith(f"UUID={marker(host)['filesystem_uuid']} ")
    assert line.split()[3].startswith("defaults,nofail,x-systemd.device-timeout=30s")


def test_the_marker_names_the_volume(host: Any) -> None:
    found = marker(host)
    assert found["volume_id"] == nodes.inspect(node(host))["volumes"][0]["id"]
    assert (found["lab"], found["layout_version"]) == ("molecule", 1)
    with host.sudo():
        assert host.file("/mnt/block/.labctl").mode == 0o700


def test_a_new_volume_belongs_to_its_user(host: Any) -> None:
    if node(host) != "volume-new":
        pytest.skip("the adopted one keeps its owner")
    root = host.file("/mnt/block")
    assert (root.user, root.mode) == ("cc", 0o755)
    assert marker(host)["origin"] == "initialised"


def test_an_adopted_volume_keeps_its_data_and_owners(host: Any) -> None:
    if node(host) != "volume-old":
        pytest.skip("nothing to adopt")
    assert marker(host)["origin"] == "adopted"
    with host.sudo():
        assert host.run("sha256sum --check /root/precious.sha256").rc == 0
        assert host.file("/root/uuid").content_string.strip() == marker(host)["filesystem_uuid"]
        assert host.file("/mnt/block/postgres_data").uid == 999


def test_the_first_check_left_the_disk_blank(host: Any) -> None:
    """`molecule check` ran before converge: had it written, converge would have found a filesystem to adopt."""
    if node(host) == "volume-new":
        assert marker(host)["origin"] == "initialised"


def test_a_new_host_takes_over_the_ssh_identity_that_lies_on_the_volume(host: Any) -> None:
    name = node(host)
    direct.install(name)
    wanted = {"mount_point": "/mnt/block", "volume_id": nodes.inspect(name)["volumes"][0]["id"], "host_keys": True}

    def shell(script: str) -> str:
        return str(nodes.execute(name, "bash", "-c", script))

    kept = shell("cd /mnt/block/.labctl/ssh && sha256sum *")
    assert kept == shell("cd /etc/ssh && sha256sum ssh_host_*_key"), "the first host didn't leave its keys"
    assert set(shell("stat -c '%a %U' /mnt/block/.labctl/ssh /mnt/block/.labctl/ssh/*").split("\n")) >= {
        "700 root",
        "600 root",
    }
    shell("rm /etc/ssh/ssh_host_* && ssh-keygen -A && systemctl reload ssh")  # as a new VM has them
    said = direct.run(name, **wanted)
    assert said["changed"] and len(said["host_keys"]) == len(said["changes"]) == len(kept.splitlines()), said
    scanned = shell(
        "for i in $(seq 20); do ssh-keyscan -t ed25519 localhost 2>&1 | grep ^localhost && break; sleep 0.5; done"
    )
    assert " ".join(scanned.split()[1:3]) in said["host_keys"], "sshd shows another key than the one on the volume"
    assert kept == shell("cd /mnt/block/.labctl/ssh && sha256sum *")
    assert direct.run(name, **wanted)["changed"] is False

    # one that is no key is neither installed, which would lock everybody out, nor overwritten
    ed = "/mnt/block/.labctl/ssh/ssh_host_ed25519_key"
    shell(f"cp -p {ed} /root/aside && echo nonsense > {ed}")
    said = direct.run(name, **wanted)
    assert not said["changed"] and "isn't a usable key" in said["note"]
    assert shell(f"cat {ed}") == "nonsense\n" and shell("sshd -t; echo $?").strip() == "0"
    shell(f"mv /root/aside {ed}")
    assert direct.run(name, **wanted)["changed"] is False


def test_unmount_names_who_is_in_the_way_and_leaves_the_root_disk_closed(host: Any) -> None:
    name = node(host)
    holder = nodes.execute(name, "sh", "-c", "cd /mnt/block && (sleep 300 >/dev/null 2>&1 & echo $!)").strip()
    busy = unmount(host)
    assert busy.returncode and f"process {holder} (sleep)" in busy.stdout, busy.stdout
    assert host.mount_point("/mnt/block").exists
    nodes.execute(name, "kill", holder)
    predicted = unmount(host, "--check")
    assert predicted.returncode == 0 and host.mount_point("/mnt/block").exists
    done = unmount(host)
    assert done.returncode == 0, done.stdout
    assert not host.mount_point("/mnt/block").exists
    with host.sudo():
        assert host.run("touch /mnt/block/postgres_data").rc != 0
        assert host.file("/mnt/block").listdir() == []
    assert "changed=0" in unmount(host).stdout


def test_a_power_cut_brings_the_volume_back_by_itself(host: Any) -> None:
    name = node(host)
    before = marker(host) if host.mount_point("/mnt/block").exists else None
    nodes.reboot(name, kill=True)
    assert "/mnt/block" in nodes.execute(name, "findmnt", "-n", "/mnt/block")
    after = json.loads(nodes.execute(name, "cat", "/mnt/block/.labctl/volume.json"))
    assert before is None or before == after
