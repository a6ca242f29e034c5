"""What is lost if one of these fails: the data that training reads, or the secret that opens the store."""

from __future__ import annotations

import time

import nodes
import pytest
import store
import testinfra
from rclone_host import MOUNT, RAW, RECOVERY_SECONDS, VIEW, made, playbook, reader, rebooted, seconds_until

testinfra_hosts = ["ansible://all"]
__all__ = ["made", "reader"]

SMALL = "training/class_01/1_2.bin"


def reboot(host):
    """Reboot the node; how to reach it from then on."""
    record = nodes.reboot(host.check_output("hostname"))
    options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    url = f"ssh://{record['user']}@{record['address']}"
    rebooted["address"] = record["address"]
    rebooted["host"] = testinfra.get_host(url, ssh_identity_file=record["ssh_key"], ssh_extra_args=options)
    return rebooted["host"]


def test_the_mount_is_rclones_and_read_only(host):
    for path in (MOUNT, VIEW):
        mount = host.mount_point(path)
        assert mount.filesystem == "fuse.rclone"
        assert {"ro", "allow_other"} <= set(mount.options)
    assert host.run(f"sudo touch {MOUNT}/x").rc != 0


@pytest.mark.parametrize("who", ["cc", "root"])
@pytest.mark.parametrize("path", [MOUNT, VIEW])
def test_every_object_reads_back_byte_for_byte(host, made, who, path):
    sums = host.run(f"sudo -u {who} sh -c 'cd {path} && find . -type f -exec sha256sum {{}} +'")
    found = {line[66:].removeprefix("./"): line[:64] for line in sums.stdout.splitlines()}
    assert found == made["sha256"], sums.stderr


def test_cc_lists_the_containers_as_in_the_tutorial(host, made):
    listed = host.run("sudo -iu cc rclone lsd chi_tacc:")
    assert made["container"] in listed.stdout, listed.stderr


def test_another_remote_of_the_user_stays(host):
    assert host.run("sudo -iu cc rclone listremotes").stdout.split() == ["laptop:", "chi_tacc:"]
    assert "# mine" in host.run("sudo cat /home/cc/.config/rclone/rclone.conf").stdout


def test_only_the_owner_can_read_the_secret(host):
    modes = host.run("sudo stat -c '%a %U' /etc/rclone/rclone.conf /home/cc/.config/rclone/rclone.conf").stdout
    assert modes.splitlines() == ["600 root", "600 cc"]


def test_the_secret_is_nowhere_but_in_the_two_files(host, made):
    secret = made["application_credential_secret"]
    places = (
        "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null",
        "systemctl show rclone-object; cat /etc/systemd/system/rclone-object.service",
        "journalctl --no-pager -o verbose",
        "cat /var/log/*.log /root/.ansible/tmp/*/* /tmp/* 2>/dev/null",
    )
    for place in places:
        text = host.run("sudo sh -c %s", place).stdout
        assert secret not in text, place
    found = host.run("sudo grep -rlsF -e %s /etc /home /root /var/lib /tmp /usr/local", secret).stdout.split()
    assert sorted(found) == ["/etc/rclone/rclone.conf", "/home/cc/.config/rclone/rclone.conf"]


def test_rclone_listens_on_no_network(host):
    assert "rclone" not in host.run("sudo ss -Hltunp").stdout
    assert host.run("sudo stat -c %a /run/rclone-object").stdout.strip() == "700"
    assert host.run("curl -sS -X POST --unix-socket /run/rclone-object/rc.sock http://rc/core/pid").rc != 0


def test_the_binary_is_the_one_stated_and_python_has_no_part_of_it(host):
    assert "rclone v1.75.2" in host.run("rclone version").stdout
    assert host.run("python3 -m pip list --user 2>/dev/null; python3 -m pip list").stdout.find("rclone") == -1


def test_users_may_allow_others(host):
    assert host.file("/etc/fuse.conf").contains("^user_allow_other$")


def test_a_killed_rclone_comes_back_on_the_host_and_in_a_running_container(host, made, reader):
    wanted = made["sha256"][SMALL]
    read_inside = f"{reader} /bin/dash -c 'sha256sum < /mnt/Food-11/{SMALL}' | cut -c1-64"
    read_outside = f"sha256sum < {MOUNT}/{SMALL} | cut -c1-64"
    assert host.run(read_inside).stdout.strip() == wanted
    for _ in range(3):
        before = host.check_output("systemctl show rclone-object --property=MainPID --value")
        assert host.run(f"sudo kill -9 {before}").rc == 0
        assert seconds_until(host, read_outside, wanted) < RECOVERY_SECONDS
        assert seconds_until(host, read_inside, wanted) < RECOVERY_SECONDS
        assert host.check_output("systemctl show rclone-object --property=MainPID --value") != before
    mounts = host.check_output("findmnt -rno TARGET -t fuse.rclone").split()
    assert sorted(mounts) == [MOUNT, RAW, VIEW], "dead mounts pile up"


def test_what_was_just_loaded_shows_after_a_reload(host, made, reader):
    host.check_output(f"ls {MOUNT}")
    store.connect().object_store.upload_object(container=made["container"], name="later.txt", data=b"now")
    host.check_output("sudo systemctl reload rclone-object")
    assert seconds_until(host, f"{reader} cat /mnt/Food-11/later.txt", "now") < 3


@pytest.mark.usefixtures("host")
def test_a_converge_without_the_secret_keeps_the_one_on_the_host():
    again = playbook("converge.yml", "-e", "rclone_application_credential_secret=")
    assert again.returncode == 0, again.stdout
    assert "changed=0" in again.stdout


def test_another_credential_without_its_secret_stops_and_says_what_to_do(host, made):
    other = playbook(
        "converge.yml", "-e", "rclone_application_credential_secret=", "-e", "rclone_application_credential_id=deadbeef"
    )
    assert other.returncode != 0
    for part in ("needs_secret", "deadbeef", made["application_credential_id"], "labctl up"):
        assert part in other.stdout + other.stderr
    assert host.service("rclone-object").is_running


def test_unmount_lasts_over_a_reboot_and_mount_undoes_it(host, made, reader):
    read_inside = f"{reader} /bin/dash -c 'sha256sum < /mnt/Food-11/{SMALL}' | cut -c1-64"
    assert "changed=1" in playbook("unmount.yml").stdout
    assert host.run("findmnt -rno TARGET -t fuse.rclone").stdout == ""
    assert host.run(read_inside).stdout.strip() != made["sha256"][SMALL]
    host = reboot(host)
    assert not host.service("rclone-object").is_running
    assert "changed=0" in playbook("unmount.yml").stdout
    assert "changed=1" in playbook("mount.yml").stdout
    assert "changed=0" in playbook("mount.yml").stdout
    assert host.run("sudo docker start reader").rc == 0
    assert host.run(read_inside).stdout.strip() == made["sha256"][SMALL]


def test_a_store_that_is_away_at_boot_blocks_nothing_and_is_mounted_when_it_comes(host, made):
    host = rebooted.get("host", host)
    address = made["auth_url"].split("/")[2].split(":")[0]
    unit = (
        f"[Unit]\nDefaultDependencies=no\nBefore=sysinit.target\n[Service]\nType=oneshot\n"
        f"ExecStart=/sbin/ip route add blackhole {address}/32\n[Install]\nWantedBy=sysinit.target\n"
    )
    host.check_output("sudo sh -c %s", f"printf %s '{unit}' > /etc/systemd/system/away.service")
    host.check_output("sudo systemctl enable away.service")
    begin = time.monotonic()
    host = reboot(host)
    assert time.monotonic() - begin < 30
    assert host.run(f"ip route get {address}").rc != 0, "the test's own blackhole isn't there"
    time.sleep(15)
    assert host.run("systemctl is-active rclone-object").stdout.strip() == "activating"
    host.check_output(f"sudo ip route del blackhole {address}/32")
    host.check_output("sudo systemctl disable away.service")
    seconds_until(host, f"sha256sum < {MOUNT}/{SMALL} | cut -c1-64", made["sha256"][SMALL])
