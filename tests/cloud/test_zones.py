"""A volume of another availability zone, on a site that attaches only within one.

The sandbox has one zone and attaches across: a second nova-api of its own, beside the one that all use, is told of
another zone and to refuse. Everywhere else the test is skipped: a site's zones are its own.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

import pytest
import requests
from conftest import CLOUD, Lab
from labctl.cloud import server, session, volume
from labctl.errors import CloudRefused
from labctl.models import Server, Volume

CONTAINER, PORT, ZONE = "labctl-sandbox", 18774, "elsewhere"
START = f"""
set -eu; exec 2>/dev/null
d=$(mktemp -d /run/lct-nova.XXXXXX); chmod 755 "$d"
printf '[DEFAULT]\\ndefault_availability_zone = {ZONE}\\n[cinder]\\ncross_az_attach = false\\n' > "$d/zone.conf"
sed -E "s/^processes *=.*/processes = 1/; s|^logto *=.*|logto = $d/log|; s/^name *=.*/name = lct-nova/" \\
  /etc/nova/nova-api-uwsgi.ini > "$d/uwsgi.ini"
touch "$d/log"; chown nova: "$d/log"
export OS_NOVA_CONFIG_FILES="api-paste.ini;nova.conf;$d/zone.conf"
uwsgi_python3 --http-socket :{PORT} --ini "$d/uwsgi.ini" >/dev/null 2>&1 & pid=$!
trap 'set +e; kill $pid; for i in $(seq 20); do kill -0 $pid || break; sleep 0.5; done; kill -9 $pid; rm -r "$d"' EXIT
echo ready
read -r _ || true
"""


@pytest.fixture
def nova() -> Iterator[str]:
    """The other nova-api's address. It ends with its standard input."""
    there = subprocess.run(["docker", "inspect", CONTAINER], capture_output=True, check=False).returncode == 0
    if CLOUD != "sandbox" or not there:
        pytest.skip("needs the sandbox's container")
    command = ["docker", "exec", "-i", CONTAINER, "bash", "-c", START]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        host = session.connect(__import__("conftest").site()).auth_url.split("/")[2].partition(":")[0]
        url = f"http://{host}:{PORT}/v2.1"
        for _ in range(120):
            try:
                if requests.get(url, timeout=5).status_code == 200:
                    break
            except requests.RequestException:
                time.sleep(1)
        yield url
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=60)


def test_a_volume_of_another_zone_is_refused_with_both_and_the_way_out(
    lab: Lab, node: Server, free_volume: Volume, nova: str
) -> None:
    cloud = session.connect(lab.cloud.site)
    cloud.compute.compute.endpoint_override = nova
    here = server.get(cloud, node.id)
    assert here is not None
    with pytest.raises(CloudRefused) as caught:
        volume.attach(cloud, here, free_volume, lab.told, timeout=10)
    error = caught.value
    assert "availability zone" in error.what
    assert free_volume.zone and free_volume.zone in error.expected
    assert f"server.availability_zone: {free_volume.zone}" in error.next_step
    assert error.found and error.source and "zone" in error.detail
    now = volume.get(lab.cloud, free_volume.id)
    assert now is not None and now.status == "available"
