"""What is lost if one of these fails: the right bytes under a training run, in either layout of the set."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator

import nodes
import pytest
import store
from rclone_host import MOUNT, RECOVERY_SECONDS, SCENARIO, STORE, VIEW, made, playbook, reader, seconds_until

testinfra_hosts = ["ansible://all"]
__all__ = ["made", "reader"]

NODE = "rclone"
VIEWS = "/usr/local/lib/labctl/object-view"
CACHE = "/var/cache/rclone-object"
Commit = Callable[..., dict[str, str]]


def as_root(script: str, check: bool = True) -> str:
    """Run a script on the node; its output."""
    return nodes.execute(NODE, "sh", "-c", script, check=check)


def refused(command: str) -> str:
    """Run a command that is to fail; what it says."""
    done = subprocess.run(
        ["docker", "exec", nodes.container_name(NODE), "sh", "-c", command], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0, done.stdout
    return done.stderr


def refresh() -> dict:
    """`object-view refresh`, as the last step of a load runs it."""
    return json.loads(as_root(f"{VIEWS} refresh"))


def hashes(place: str = MOUNT) -> dict[str, str]:
    """{path: SHA-256} of every file that can be read there."""
    out = as_root(f"cd {place} && find . -type f -exec sha256sum {{}} +")
    return {line[66:].removeprefix("./"): line[:64] for line in out.splitlines()}


@pytest.fixture(scope="module")
def commit(made) -> Iterator[Commit]:
    """`commit(layout, seed, shards)` puts a set into the container, manifest last, and returns {path: SHA-256}."""
    as_root("command -v mksquashfs || (apt-get update && apt-get install -y --no-install-recommends squashfs-tools)")
    program = (SCENARIO / "pack.py").read_bytes()

    def put(layout: str, seed: str, shards: int = 1) -> dict[str, str]:
        out = nodes.execute(NODE, "python3", "-", made["container"], layout, seed, str(shards), data=program)
        return json.loads(out)

    yield put
    rclone, container = "rclone --config /etc/rclone/rclone.conf", f"chi_tacc:{made['container']}"
    as_root(f"{rclone} delete {container} --include '/*/class_*/*.jpg'; {rclone} purge {container}/.labctl")
    as_root("systemctl restart rclone-object")


def test_both_layouts_show_the_very_same_files_to_host_and_container(commit: Commit, made, reader, host) -> None:
    files = commit("files", "one")
    assert refresh()["layout"] == "files"
    assert hashes() == {**made["sha256"], **files}
    assert commit("packed", "one", 3) == files
    assert hashes() == {**made["sha256"], **files}, "shown before the refresh that ends a load"
    shown = refresh()
    assert (shown["layout"], shown["changed"]) == ("packed", True)
    assert hashes() == hashes(VIEW) == files
    path, wanted = next(iter(files.items()))
    inside = host.run(f"{reader} /bin/dash -c 'sha256sum < /mnt/Food-11/{path}'")
    assert inside.stdout[:64] == wanted
    assert as_root(f"ls -A {MOUNT}").split() == ["evaluation", "training"], ".labctl is to be hidden"
    assert refresh()["changed"] is False


def test_a_killed_rclone_heals_under_a_packed_set(commit: Commit, reader, host) -> None:
    files = commit("packed", "one", 3)
    refresh()
    path, wanted = list(files.items())[-1]
    for _ in range(2):
        host.run("sudo kill -9 $(systemctl show rclone-object --property=MainPID --value)")
        read = f"sha256sum < {MOUNT}/{path} | cut -c1-64"
        assert seconds_until(host, read, wanted) < RECOVERY_SECONDS
        inside = f"{reader} /bin/dash -c 'sha256sum < /mnt/Food-11/{path}' | cut -c1-64"
        assert seconds_until(host, inside, wanted) < RECOVERY_SECONDS
    assert hashes() == files
    assert as_root("findmnt -rn -o TARGET | grep -c object-views") == "4\n", "dead mounts pile up"


def test_a_switch_takes_nothing_from_a_reader(commit: Commit) -> None:
    """Somebody looks again and again, and has a file open, while version after version is shown."""
    old = commit("packed", "one", 3)
    refresh()
    path = next(iter(old))
    watch = f"""
import hashlib, os, time
held = open('{MOUNT}/{path}', 'rb')
lost = looked = 0
while not os.path.exists('/tmp/enough'):
    looked += 1
    for place in ('{MOUNT}', '{VIEW}'):
        try:
            lost += sorted(os.listdir(place + '/training')) != ['class_00', 'class_01', 'class_02']
        except OSError:
            lost += 1
print(lost, looked > 100, hashlib.sha256(held.read()).hexdigest())
"""
    as_root("rm -f /tmp/enough")
    watcher = subprocess.Popen(
        ["docker", "exec", "-i", nodes.container_name(NODE), "python3", "-c", watch], stdout=subprocess.PIPE, text=True
    )
    new: dict[str, str] = {}
    busy = []
    for seed in ("two", "three", "four"):
        new = commit("packed", seed, 2)
        busy.append(refresh()["in_use"])
    as_root("touch /tmp/enough")
    assert watcher.communicate(timeout=60)[0].split() == ["0", "True", old[path]]
    assert hashes() == new
    assert busy[0], "a reader had a file of the former version open"


def test_what_is_not_committed_or_damaged_is_never_shown(commit: Commit, made) -> None:
    before = commit("packed", "one", 2)
    refresh()
    commit("packed", "two", 2)
    remote = "rclone --config /etc/rclone/rclone.conf --contimeout 10s"
    manifest = json.loads(as_root(f"{remote} cat chi_tacc:{made['container']}/.labctl/manifest.json"))
    shard = f"chi_tacc:{made['container']}/{manifest['shards'][1]['object']}"
    as_root(f"{remote} cat {shard} --count 9000 | {remote} rcat {shard}")
    assert "9000 bytes, the manifest says" in refused(f"{VIEWS} refresh")
    assert hashes() == before, "the former version was to stay"
    as_root("systemctl restart rclone-object")
    said = json.loads(as_root(f"{VIEWS} status"))
    assert not said["mounted"]
    assert "9000 bytes" in said["error"]
    after = commit("packed", "two", 2)
    refresh()
    assert hashes() == after


def test_a_load_that_was_cut_off_is_never_half_shown(commit: Commit, made) -> None:
    """Files are sent to where they are read: whatever restarts the mount meanwhile, none shows before all do."""
    old = commit("files", "one")
    refresh()
    before = hashes()
    assert before == {**made["sha256"], **old}, "what was replaced is still shown"
    folders = as_root(f"cd {MOUNT} && find . -type d | sort")
    new = commit("half", "two")
    for again in ("systemctl restart rclone-object", "systemctl reload rclone-object"):
        as_root(again)
        assert hashes() == before
        assert as_root(f"cd {MOUNT} && find . -type d | sort") == folders
    as_root(f"rclone --config /etc/rclone/rclone.conf deletefile chi_tacc:{made['container']}/.labctl/manifest.json")
    as_root("systemctl restart rclone-object")
    assert hashes().keys() >= old.keys(), "without a manifest it is shown as it is"
    assert not hashes().keys() & new.keys()
    assert commit("files", "two") == new
    refresh()
    assert hashes() == {**made["sha256"], **new}


@pytest.mark.parametrize(
    ("layout", "answer"),
    [
        ("files", "reject with tcp reset"),  # as a stopped server answers
        ("packed", "drop"),  # as a network that is cut
        pytest.param("files", "drop", marks=pytest.mark.slow),
        pytest.param("packed", "reject with tcp reset", marks=pytest.mark.slow),
    ],
)
def test_a_store_that_stops_in_the_middle_of_an_epoch_delays_it(commit: Commit, made, layout: str, answer: str) -> None:
    """Away for 30 s: every file reads right all the same, by the very rclone that was there before."""
    address = made["auth_url"].split("/")[2].split(":")[0]
    stop = f"nft add table ip away; nft add chain ip away out '{{ type filter hook output priority 0; }}'; " \
           f"nft add rule ip away out ip daddr {address} tcp dport != 22 {answer}"  # fmt: skip
    files = commit(layout, "epoch", 2)
    refresh()
    as_root(f"systemctl stop rclone-object; rm -rf {CACHE}/vfs {CACHE}/vfsMeta; systemctl start rclone-object")
    as_root(f"find {MOUNT} > /tmp/tree")  # what is warmed at start has arrived
    process = as_root("systemctl show rclone-object --property=MainPID --value")
    read = f"cd {MOUNT} && find training evaluation -type f | sort | xargs -n 10 sh -c 'sha256sum \"$@\"; sleep 0.3' x"
    epoch = subprocess.Popen(
        ["docker", "exec", nodes.container_name(NODE), "sh", "-c", read],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(0.5)
    as_root(stop)
    try:
        time.sleep(30)
    finally:
        as_root("nft delete table ip away")
    out, errors = epoch.communicate(timeout=300)
    found = {line[66:]: line[:64] for line in out.splitlines()}
    assert {path: found.get(path) for path in files} == files, errors
    assert as_root("systemctl show rclone-object --property=MainPID --value") == process
    said = json.loads(as_root(f"{VIEWS} status"))
    assert said["mounted"]
    assert not said["error"]


def test_a_full_cache_disk_gives_right_bytes_or_an_error_and_heals(commit: Commit) -> None:
    for layout in ("files", "packed"):
        files = commit(layout, "full disk", 1)
        as_root(f"systemctl stop rclone-object; mount -t tmpfs -o size=1m tmpfs {CACHE}; systemctl start rclone-object")
        try:
            out = as_root(f"cd {MOUNT} && find training evaluation -type f -exec sha256sum {{}} +", check=False)
            found = {line[66:]: line[:64] for line in out.splitlines()}
            assert not [path for path, digest in found.items() if files.get(path, digest) != digest]
            refusal = refused(f"{VIEWS} prefetch")
            assert "Nothing was fetched" in refusal
        finally:
            as_root(f"systemctl stop rclone-object; umount {CACHE}; systemctl start rclone-object")
        found = hashes()
        assert {path: found.get(path) for path in files} == files


def test_prefetch_leaves_nothing_to_ask_the_store_for(commit: Commit, made) -> None:
    address = made["auth_url"].split("/")[2].split(":")[0]
    for layout in ("files", "packed"):
        files = commit(layout, "ahead", 2)
        refresh()
        last = json.loads(as_root(f"{VIEWS} prefetch").splitlines()[-1])
        assert last["event"] == "done"
        assert last["bytes"] == last["bytes_total"] > 0
        as_root(f"ip route add blackhole {address}/32")
        try:
            found = hashes()
        finally:
            as_root(f"ip route del blackhole {address}/32")
        assert {path: found.get(path) for path in files} == files


def test_an_expired_credential_is_told_and_a_new_one_heals(commit: Commit, made) -> None:
    files = commit("packed", "expired", 1)
    refresh()
    store.renew(STORE)
    as_root("systemctl restart rclone-object", check=False)
    said = json.loads(as_root(f"{VIEWS} status"))
    assert not said["mounted"]
    assert "application credential" in said["error"].lower(), said
    assert "`labctl up` makes another" in said["error"]
    assert playbook("converge.yml").returncode == 0
    assert hashes() == files
    made.update(json.loads(STORE.read_text()))
