"""What is lost if one of these fails: containers that can't run, a full root disk, or a database on it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import testinfra

sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))

import nodes

testinfra_hosts = ["ansible://all"]

# A whole image from the node's own shell and Python: no registry is needed, and ldd knows their libraries.
IMPORT_HELLO = """cd / && tar -ch bin/dash usr/bin/python3 usr/lib/python3.* \
  $(ldd /bin/dash /usr/bin/python3 | grep -o '/[^ ]*' | grep -v : | sed s,^/,, | sort -u) | docker import - hello:1"""


def as_cc(host, script: str):
    """Run a shell script as cc in a session of its own: the test's connection is older than the membership."""
    return host.run("sudo -u cc sh -c %s", script)


@pytest.fixture(scope="module")
def hello(host) -> str:
    """Image made as cc, who isn't root: the membership of the group is proven with it."""
    made = as_cc(host, IMPORT_HELLO)
    assert made.rc == 0, made.stderr
    return "hello:1"


def test_cc_runs_a_container_without_sudo(host, hello):
    ran = as_cc(host, f"docker run --rm {hello} /bin/dash -c 'echo hello from a container'")
    assert ran.stdout.strip() == "hello from a container", ran.stderr


def test_a_published_port_reaches_the_container(host, hello):
    """Needs iptables, which docker.io only recommends, and is published as the stack's ports are."""
    serve = "python3 -m http.server --directory /usr/lib 80"
    started = as_cc(host, f"docker run -d --rm --name web -p 127.0.0.1:8099:80 {hello} {serve}")
    assert started.rc == 0, started.stderr
    answer = host.run("curl -sS --retry 20 --retry-delay 1 --retry-all-errors http://127.0.0.1:8099/")
    as_cc(host, "docker rm -f web")
    assert "Directory listing" in answer.stdout, answer.stderr


def test_compose_is_v2(host):
    version = host.run("docker compose version --short")
    assert version.rc == 0
    assert version.stdout.startswith("2.")


def test_settings_of_the_owner_stay_beside_ours(host):
    settings = json.loads(host.file("/etc/docker/daemon.json").content_string)
    assert settings["max-concurrent-downloads"] == 5
    assert settings["insecure-registries"] == ["198.51.100.3:5000", "192.0.2.7:5000"]
    info = json.loads(as_cc(host, "docker info --format '{{json .RegistryConfig.IndexConfigs}}'").stdout)
    assert info["198.51.100.3:5000"]["Secure"] is False


def test_a_talkative_container_does_not_fill_the_disk(host, hello):
    """3 files of 1 MB at most, though the container writes 8 MB."""
    talk = "import os; [print(os.urandom(500).hex()) for _ in range(8000)]"
    ran = as_cc(host, f"docker run --name talker {hello} python3 -c '{talk}' >/dev/null")
    assert ran.rc == 0, ran.stderr
    identity = as_cc(host, "docker inspect -f '{{.Id}}' talker").stdout.strip()
    kib = int(host.run(f"sudo du -sk /var/lib/docker/containers/{identity}").stdout.split()[0])
    as_cc(host, "docker rm -f talker")
    assert 500 < kib < 3 * 1100


def test_docker_starts_after_the_data_mount_and_stops_before_it(host):
    after = host.run("systemctl show docker.service --property=After --value").stdout.split()
    wants = host.run("systemctl show docker.service --property=Wants,Requires,BindsTo").stdout
    assert {"mnt-block.mount", "remote-fs.target", "local-fs.target"} <= set(after)
    assert "mnt-block.mount" in wants.split("Wants=")[1].splitlines()[0]
    assert "mnt-block.mount" not in wants.split("Requires=")[1].splitlines()[0], "no volume, no Docker"


def test_after_a_reboot_the_mount_is_there_before_docker(host):
    record = nodes.reboot(host.check_output("hostname"))
    options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    url = f"ssh://{record['user']}@{record['address']}"  # its address may be another now
    host = testinfra.get_host(url, ssh_identity_file=record["ssh_key"], ssh_extra_args=options)
    for _ in range(60):
        if host.run("docker info").rc == 0:
            break
        time.sleep(1)
    assert host.service("docker").is_enabled
    assert host.service("docker").is_running
    assert host.mount_point("/mnt/block").filesystem == "tmpfs"
    mounted = int(host.check_output("systemctl show mnt-block.mount --property=ActiveEnterTimestampMonotonic --value"))
    started = int(host.check_output("systemctl show docker.service --property=ExecMainStartTimestampMonotonic --value"))
    assert 0 < mounted < started
