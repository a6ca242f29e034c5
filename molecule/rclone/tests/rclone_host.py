"""What the scenario's tests share: the playbooks, what prepare.yml made, a container that reads the mount."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

SCENARIO = Path(__file__).parents[1]
MOUNT, VIEW, RAW = "/mnt/object", "/srv/labctl/mnt/Food-11", "/run/labctl/object"
STORE = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "store.json"
RECOVERY_SECONDS = 15
IMPORT = """cd / && tar -ch bin/dash bin/cat bin/sleep bin/sha256sum \\
  $(ldd /bin/dash /bin/cat /bin/sleep /bin/sha256sum | grep -o '/[^ ]*' | grep -v : | sed s,^/,, | sort -u) \\
  | docker import - reader:1"""

#: The node after its last reboot; its address may be another then.
rebooted: dict = {}


def playbook(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run one of the scenario's playbooks on the node."""
    command = ["ansible-playbook", "-i", os.environ["MOLECULE_INVENTORY_FILE"], str(SCENARIO / name), *options]
    if rebooted:
        command += ["-e", f"ansible_host={rebooted['address']}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


class Made(dict):
    """What prepare.yml made in the cloud; a failing test doesn't print it, for the secret in it."""

    def __repr__(self) -> str:
        return f"Made({self['container']})"


@pytest.fixture(scope="module")
def made() -> Made:
    """What prepare.yml made in the cloud."""
    return Made(json.loads(STORE.read_text()))


@pytest.fixture(scope="module")
def reader(host) -> str:
    """A running container that binds the views' parent as Jupyter does."""
    host.run("sudo docker rm -f reader")
    assert host.run("sudo sh -c %s", IMPORT).rc == 0
    bind = "type=bind,src=/srv/labctl/mnt,dst=/mnt,readonly,bind-propagation=rslave"
    ran = host.run(f"sudo docker run -d --name reader --mount {bind} reader:1 sleep 100000")
    assert ran.rc == 0, ran.stderr
    return "sudo docker exec reader"


def seconds_until(host, command: str, wanted: str) -> float:
    """How long until command prints what is wanted; asserts that it does within twice the time allowed."""
    begin = time.monotonic()
    while time.monotonic() - begin < 2 * RECOVERY_SECONDS:
        if host.run(command).stdout.strip() == wanted:
            return time.monotonic() - begin
        time.sleep(0.2)
    raise AssertionError(f"{command}: {host.run(command)}")
