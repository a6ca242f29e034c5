"""What is lost if one of these fails: what a server had not yet written when its lease ended."""

from __future__ import annotations

import json
import os
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

testinfra_hosts = ["ansible://all?sudo=true"]
SCENARIO = Path(__file__).parents[1]
TIMER, SERVICE = "labctl-lease-guard.timer", "labctl-lease-guard.service"


def arm(**variables: str | int) -> None:
    """Play the role again, as a converge after a change of the lease does."""
    inventory = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "inventory"
    command = ["ansible-playbook", "-i", str(inventory), "-e", json.dumps(variables), str(SCENARIO / "guard.yml")]
    roles = {"ANSIBLE_ROLES_PATH": str(SCENARIO.parents[1] / "roles")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **roles})
    assert done.returncode == 0, done.stdout


def wait(host, command: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while host.run(command).rc:
        assert time.monotonic() < deadline, f"{command}: not within {seconds} s"
        time.sleep(1)


def now(host) -> datetime:
    """The node's clock, by which the timer goes."""
    return datetime.fromtimestamp(int(host.check_output("date +%s")), UTC)


def iso(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def test_it_is_due_a_quarter_of_an_hour_before_the_end_in_utc_whatever_the_time_zone(host):
    host.check_output("ln -sf /usr/share/zoneinfo/America/Chicago /etc/localtime; systemctl daemon-reload")
    shown = host.check_output(f"TZ=UTC systemctl show {TIMER} --property=NextElapseUSecRealtime --value")
    assert shown == "Sun 2037-03-29 00:55:00 UTC"
    assert host.service(TIMER).is_enabled
    assert host.service(TIMER).is_running


def test_it_unmounts_the_volume_by_itself_once_nobody_uses_it_and_loses_nothing(host):
    host.check_output("head -c 3M /dev/urandom > /mnt/block/kept; sha256sum /mnt/block/kept > /root/sum")
    host.check_output("systemd-run --unit=user-at-work --property=WorkingDirectory=/mnt/block sleep 600")
    ends = now(host) + timedelta(minutes=10, seconds=25)
    arm(lease_guard_ends=iso(ends), lease_guard_before=600)
    wait(host, f"journalctl -u {SERVICE} | grep -q 'user-at-work\\|sleep'", 90)
    assert host.mount_point("/mnt/block").exists, "unmounted under somebody's feet"
    host.check_output("systemctl stop user-at-work")
    wait(host, "! findmnt /mnt/block")
    wait(host, f"journalctl -u {SERVICE} | grep -q 'drained: nothing is mounted'")
    host.check_output("mount /mnt/block && sha256sum --check --quiet /root/sum")


def test_a_server_that_was_off_at_the_moment_drains_when_it_is_back(host):
    """The moment passed five minutes ago, and the timer last ran an hour ago, as after a boot."""
    arm(lease_guard_ends=iso(now(host) + timedelta(minutes=10)), lease_guard_before=900)
    assert host.mount_point("/mnt/block").exists
    host.check_output(f"systemctl stop {TIMER}")
    host.check_output(f"touch -d '1 hour ago' /var/lib/systemd/timers/stamp-{TIMER}")
    host.check_output(f"systemctl start {TIMER}")
    wait(host, "! findmnt /mnt/block")


def test_without_a_lease_nothing_of_it_is_armed(host):
    arm(lease_guard_ends="")
    assert host.run(f"systemctl cat {TIMER}").rc != 0
    assert "lease" not in host.check_output("systemctl list-timers --all --no-legend")
    assert not host.file("/etc/systemd/system/timers.target.wants/labctl-lease-guard.timer").exists
    arm(lease_guard_ends="")


@pytest.mark.parametrize("wrong", ["2037-03-29 01:10", "2037-03-29T01:10:00+02:00", "soon"])
def test_a_date_that_isnt_utc_is_refused(wrong: str):
    with pytest.raises(AssertionError):
        arm(lease_guard_ends=wrong)
