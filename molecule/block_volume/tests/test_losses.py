"""What is left after a run is killed at any of its writes, and after a volume fails, fills up or vanishes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import direct
import nodes
import pytest

NODE = "volume-new"
PLACE = "/mnt/direct"
Cage = dict[str, str]
TUTORIAL = "parted -s $D mklabel gpt mkpart primary ext4 0% 100%; udevadm settle; mkfs.ext4 -q $P; "


@pytest.fixture(scope="module", autouse=True)
def module_in_the_node() -> None:
    direct.install(NODE)


@pytest.fixture
def cage() -> Iterator[Cage]:
    """A blank volume of 64 MiB, which the node has for one test."""
    made = nodes.attach(NODE, gib=64 / 1024)
    yield made
    leave(made)


def leave(cage: Cage) -> None:
    shell(cage, f"umount {PLACE} || true; sed -i '\\#{PLACE}#d' /etc/fstab")
    Path(nodes.detach(NODE, cage["id"])).unlink()


def shell(cage: Cage, script: str) -> str:
    names = f"D={cage['loop']} P={cage['loop']}p1"
    return nodes.execute(NODE, "bash", "-s", data=f"set -eu; {names}; exec 2>&1\n{script}".encode()).strip()


def digest(cage: Cage) -> str:
    return shell(cage, "sync; blockdev --flushbufs $D; sha256sum < $D")


#: What a run does one after the other: its own writes to a disk, and the tools that it starts.
STEPS = "pwrite64,vfork,clone,clone3"


def killing(number: int, *options: str, calls: str = STEPS) -> list[str]:
    """A command under which a run is killed when it is about to do a step for the nth time; 0: never."""
    inject = ["-e", f"inject={calls}:signal=SIGKILL:when={number}"] if number else []
    return ["strace", "-qq", "-o", "/tmp/steps", "-e", f"trace={calls}", *inject, *options]


def writes_of(cage: Cage) -> list[str]:
    """Options for `killing`: the writes of the run and of its tools, to this disk and its partition only."""
    return ["-f", "-P", cage["loop"], "-P", f"{cage['loop']}p1"]


def steps(cage: Cage, *command: str, **params: Any) -> int:
    """How many steps a run takes that nobody disturbs."""
    said = direct.run(NODE, *command, volume_id=cage["id"], **params)
    assert said.get("changed") and not said.get("failed"), said
    return int(shell(cage, "grep -cE '(write|write64|fork|clone3?)[(]' /tmp/steps"))


def spread(total: int, most: int) -> list[int]:
    """Up to `most` numbers from 1 to total: the first ones, the last one and some between."""
    if total <= most:
        return list(range(1, total + 1))
    head = most // 2
    return [*range(1, head + 1), *(head + (total - head) * step // (most - head) for step in range(1, most - head + 1))]


def test_a_run_killed_at_any_write_to_a_new_volume_is_finished_by_the_next() -> None:
    first = nodes.attach(NODE, gib=64 / 1024)
    total = steps(first, *killing(0, *writes_of(first), calls="pwrite64,write"))
    leave(first)
    assert total > 8, "table and filesystem take more writes than that"
    for number in spread(total, 8):
        cage = nodes.attach(NODE, gib=64 / 1024)
        try:
            kill = killing(number, *writes_of(cage), calls="pwrite64,write")
            said = direct.run(NODE, *kill, volume_id=cage["id"])
            assert said.get("killed") or said.get("failed"), (number, said)
            again = direct.run(NODE, volume_id=cage["id"])
            assert again.get("plan") == "initialise" and not again.get("failed"), (number, again)
            assert again["marker"]["origin"] == "initialised"
            assert direct.run(NODE, volume_id=cage["id"])["changed"] is False
            assert shell(cage, f"stat -c %u {PLACE}; umount {PLACE}") == "1000"
            shell(cage, "e2fsck -fn $P; sfdisk -V $D")
        finally:
            leave(cage)


@pytest.mark.parametrize(("make", "most"), [("tutorial", 8), ("mbr", 2), ("disk", 2)])
def test_growing_killed_at_any_step_loses_nothing_and_is_finished_by_the_next(make: str, most: int) -> None:
    first = filled(make)
    nodes.extend(NODE, first["id"], 128 / 1024)
    total = steps(first, *killing(0), grow=True)
    leave(first)
    killed = 0
    for number in spread(total, most):
        cage = filled(make)
        try:
            nodes.extend(NODE, cage["id"], 128 / 1024)
            said = direct.run(NODE, *killing(number), volume_id=cage["id"], grow=True)
            killed += bool(said.get("killed"))  # the last step may come a number earlier than it did before
            again = direct.run(NODE, volume_id=cage["id"], grow=True)
            assert not again.get("failed"), (number, again)
            assert direct.run(NODE, volume_id=cage["id"], grow=True)["changed"] is False, number
            assert intact(cage), number
            assert mib(cage) > 100, number
        finally:
            leave(cage)
    assert killed >= most - 1


def test_a_resize_that_is_killed_itself_is_told_and_can_be_repaired() -> None:
    """Only where a mounted ext4 can't grow: there the tools write, not the kernel's journal."""
    cage = filled("tutorial")
    try:
        nodes.extend(NODE, cage["id"], 128 / 1024)
        kill = killing(3, *writes_of(cage), calls="pwrite64,write")
        assert direct.run(NODE, *kill, volume_id=cage["id"], grow=True).get("failed")
        stopped = direct.run(NODE, volume_id=cage["id"], grow=True)
        assert stopped.get("safety_stop") and "e2fsck" in stopped["next_step"], stopped
        shell(cage, "e2fsck -fy $P || [ $? = 1 ]")
        assert not direct.run(NODE, volume_id=cage["id"], grow=True).get("failed")
        assert intact(cage) and mib(cage) > 100
    finally:
        leave(cage)


# -- growing -------------------------------------------------------------------------------------------------------

MAKE = {
    "tutorial": TUTORIAL,
    "mbr": "echo ',,L' | sfdisk -q -X dos $D; udevadm settle; mkfs.ext4 -q $P",
    "disk": "mkfs.ext4 -q $D",
    "xfs": "parted -s $D mklabel gpt mkpart primary xfs 0% 100%; udevadm settle; mkfs.xfs -q $P",
    "xfs-disk": "mkfs.xfs -q $D",
    "btrfs": "mkfs.btrfs -q $D",
    "ours": "",
}
SIZES = {"xfs": 320, "xfs-disk": 320, "btrfs": 160}  # MiB


def filled(make: str) -> Cage:
    """A volume of a kind, mounted by the role, with a file whose digest is known."""
    cage = nodes.attach(NODE, gib=SIZES.get(make, 64) / 1024)
    shell(cage, MAKE[make])
    said = direct.run(NODE, volume_id=cage["id"])
    assert not said.get("failed"), said
    shell(cage, f"head -c 3M /dev/urandom > {PLACE}/precious; sha256sum {PLACE}/precious > /root/grow.sha256; sync")
    return cage


def intact(cage: Cage) -> bool:
    return shell(cage, f"mountpoint -q {PLACE} && sha256sum --check --quiet /root/grow.sha256 && echo yes") == "yes"


def mib(cage: Cage) -> int:
    """The mounted filesystem's size."""
    return int(shell(cage, f"df --output=size -B1M {PLACE} | tail -1"))


def table(cage: Cage) -> str:
    """The whole table; a mounted disk has no digest that lasts, since ext4 initialises its inodes in its own time."""
    return shell(cage, "sfdisk -d $D 2>&1 || true; wipefs -n $D")


def identity(cage: Cage) -> str:
    """What must not change of the table: GUIDs, start, type, name; and the filesystem's UUID."""
    kept = "sfdisk -d $D 2>/dev/null | sed 's/size=[^,]*,//; /last-lba/d' || true"
    return shell(cage, f"{kept}; T=$D; [ ! -b $P ] || T=$P; blkid -o value -s UUID $T")


@pytest.mark.parametrize("make", MAKE)
def test_an_extended_volume_grows_when_asked_and_keeps_all_else(make: str) -> None:
    cage, before = filled(make), SIZES.get(make, 64)
    try:
        same, size = identity(cage), mib(cage)
        assert direct.run(NODE, volume_id=cage["id"], grow=True)["changed"] is False, "there was nothing to grow"
        # the second time an old backup GPT lies in the filesystem
        for target in (before * 2, before * 4)[: 2 if make == "tutorial" else 1]:
            nodes.extend(NODE, cage["id"], target / 1024)
            unasked = direct.run(NODE, volume_id=cage["id"])
            assert unasked["changed"] is False and "labctl volume extend" in unasked["note"]
            untouched = table(cage)
            predicted = direct.run(NODE, volume_id=cage["id"], grow=True, check=True)
            assert (predicted["plan"], predicted["changed"]) == ("grow", True)
            assert "plan: grow" in predicted["diff"]["after"]
            assert table(cage) == untouched and mib(cage) == size
            done = direct.run(NODE, volume_id=cage["id"], grow=True)
            assert not done.get("failed") and done["changed"], done
            assert identity(cage) == same and intact(cage)
            assert mib(cage) > size * 1.8, "it didn't grow"
            size = mib(cage)
            assert direct.run(NODE, volume_id=cage["id"], grow=True)["changed"] is False
    finally:
        leave(cage)


BEHIND = {
    "a byte of data": "echo data | dd of=$D bs=1M seek=100 conv=notrunc",
    "data in the last sector": "echo data | dd of=$D bs=512 seek=$(($(blockdev --getsz $D) - 1)) conv=notrunc",
    "a second partition": "echo '150000,' | sfdisk -q --force --no-reread -a $D",
    "a table that the kernel doesn't know": "echo '4096,' | sfdisk -q --force --no-reread --no-tell-kernel -N 1 $D",
    "somebody else's backup GPT": "truncate -s 128M /tmp/o; echo , | sfdisk -q -X gpt /tmp/o;"
    " tail -c 16896 /tmp/o | dd of=$D bs=512 seek=$(($(blockdev --getsz $D) - 33)) conv=notrunc",
}


@pytest.mark.parametrize("what", BEHIND)
def test_nothing_is_grown_over_what_isnt_known(what: str) -> None:
    cage = filled("tutorial")
    try:
        shell(cage, f"umount {PLACE}")
        nodes.extend(NODE, cage["id"], 128 / 1024)
        shell(cage, BEHIND[what] + "; udevadm settle")
        before = digest(cage)
        said = direct.run(NODE, volume_id=cage["id"], grow=True)
        assert said.get("safety_stop") and said["changed"] is False, said
        assert said["next_step"]
        assert digest(cage) == before
    finally:
        leave(cage)


def test_a_volume_whose_end_is_missing_is_left_alone() -> None:
    cage = filled("tutorial")
    try:
        shell(cage, f"umount {PLACE}")
        nodes.extend(NODE, cage["id"], 48 / 1024)
        before = digest(cage)
        for grow in (False, True):
            said = direct.run(NODE, volume_id=cage["id"], grow=grow)
            assert said.get("safety_stop") and "smaller" in said["msg"], said
        assert digest(cage) == before
    finally:
        leave(cage)


def test_check_mode_shows_the_plan_of_each_kind_and_writes_nothing() -> None:
    """`grow` is shown above."""
    cage = nodes.attach(NODE, gib=64 / 1024)
    try:
        for make, plan in (
            ("", "initialise"),
            (TUTORIAL, "use"),
            ("echo x | dd of=$D bs=1M seek=1 conv=notrunc", "stop"),
        ):
            shell(cage, f"blkdiscard -f -z $D; partx -d $D || true; {make}\nudevadm settle")
            before = digest(cage)
            said = direct.run(NODE, volume_id=cage["id"], check=True)
            assert said["plan"] == plan and said["diff"]["after"].startswith(f"plan: {plan}: {said['reason']}"), said
            assert digest(cage) == before
            assert bool(said.get("safety_stop")) == (plan == "stop")
    finally:
        leave(cage)


def test_growing_waits_for_the_size_that_the_cloud_says() -> None:
    cage = filled("tutorial")
    try:
        said = direct.run(NODE, volume_id=cage["id"], grow=True, size_gib=1, wait=1)
        assert said.get("failed") and not said.get("safety_stop") and "new size" in said["msg"], said
        assert intact(cage)
    finally:
        leave(cage)


# -- a volume that fails, fills up, vanishes -----------------------------------------------------------------------


def test_a_device_that_is_read_only_is_left_alone_and_told() -> None:
    cage = filled("tutorial")
    try:
        shell(cage, f"umount {PLACE}; blockdev --setro $D; blockdev --setro $P")
        before = digest(cage)
        said = direct.run(NODE, volume_id=cage["id"])
        assert said.get("safety_stop") and "read-only" in said["msg"], said
        assert digest(cage) == before
        shell(cage, "blockdev --setrw $D; blockdev --setrw $P")
        assert not direct.run(NODE, volume_id=cage["id"]).get("failed")
        assert intact(cage)
    finally:
        leave(cage)


def test_a_full_volume_is_mounted_and_its_marker_stays_whole() -> None:
    cage = filled("tutorial")
    try:
        shell(cage, f"sed -i s/{NODE}/elsewhere/ {PLACE}/.labctl/volume.json")  # as after a rebuild
        marker = shell(cage, f"cat {PLACE}/.labctl/volume.json")
        shell(cage, f"! dd if=/dev/zero of={PLACE}/full bs=1k 2>/dev/null; sync; umount {PLACE}")
        said = direct.run(NODE, volume_id=cage["id"])
        assert not said.get("failed") and "full" in said["note"], said
        assert shell(cage, f"cat {PLACE}/.labctl/volume.json; ls -A {PLACE}/.labctl") == f"{marker}\nvolume.json"
        nodes.extend(NODE, cage["id"], 128 / 1024)
        grown = direct.run(NODE, volume_id=cage["id"], grow=True)
        assert not grown.get("failed"), grown
        assert direct.run(NODE, volume_id=cage["id"])["marker"]["last_attached_to"].startswith(NODE)
        assert intact(cage)
    finally:
        leave(cage)


def test_a_marker_that_cant_be_written_on_a_full_new_lab_is_told() -> None:
    """A volume without a marker yet: without it nothing would tell whose it is, so this one does stop."""
    cage = nodes.attach(NODE, gib=64 / 1024)
    try:
        fill = "mount $P /mnt; ! dd if=/dev/zero of=/mnt/full bs=1k 2>/dev/null; umount /mnt"
        shell(cage, TUTORIAL + fill)
        said = direct.run(NODE, volume_id=cage["id"])
        assert said.get("failed") and "full" in said["msg"] and "extend" in said["next_step"], said
        assert shell(cage, f"findmnt -no SOURCE {PLACE}").endswith("p1")
    finally:
        leave(cage)


def plug(cage: Cage, loop: str, dev: str = "vdc") -> None:
    nodes.execute(NODE, "labnode-blockdev", "attach", Path(loop).name, dev, cage["id"])


def test_a_disk_that_vanishes_under_its_mount_is_told_and_comes_back() -> None:
    cage = filled("tutorial")
    dev = next(v["dev"] for v in nodes.inspect(NODE)["volumes"] if v["id"] == cage["id"])
    try:
        nodes.execute(NODE, "labnode-blockdev", "detach", cage["id"])
        gone = direct.run(NODE, volume_id=cage["id"], wait=1)
        assert gone.get("safety_stop") and "still mounted" in gone["msg"] and "drain" in gone["next_step"], gone
        plug(cage, cage["loop"], dev)
        assert direct.run(NODE, volume_id=cage["id"])["changed"] is False
        assert intact(cage)
    finally:
        leave(cage)


def test_a_disk_that_comes_back_as_another_one_isnt_mounted_twice() -> None:
    """Its old mount is of a device that is no more; both at once would write to one filesystem from two sides."""
    cage = filled("tutorial")
    entry = next(v for v in nodes.inspect(NODE)["volumes"] if v["id"] == cage["id"])
    second = nodes.run("losetup", "--find", "--show", cage["file"]).stdout.decode().strip()
    try:
        nodes.execute(NODE, "labnode-blockdev", "detach", cage["id"])
        plug(cage, second)
        twice = direct.run(NODE, volume_id=cage["id"], wait=1)
        assert twice.get("safety_stop") and "labctl drain" in twice["next_step"], twice
        assert shell(cage, f"findmnt -no SOURCE {PLACE}") == f"{cage['loop']}p1"
        drained = direct.run(NODE, volume_id=cage["id"], state="unmounted")
        assert not drained.get("failed"), drained
        mended = direct.run(NODE, volume_id=cage["id"])
        assert not mended.get("failed") and mended["partition"].startswith(second), mended
        assert intact(cage)
        shell(cage, f"umount {PLACE}")
    finally:
        nodes.execute(NODE, "labnode-blockdev", "detach", cage["id"])
        nodes.run("losetup", "--detach", second)
        plug(cage, cage["loop"], entry["dev"])
        leave(cage)


def test_another_volume_that_is_mounted_is_named_and_left_alone() -> None:
    """lab.yaml's name means another volume by now, which isn't attached or is attached beside it."""
    old, new = filled("tutorial"), nodes.attach(NODE, gib=64 / 1024)
    try:
        for wanted in (new["id"], "00000000-5d3e-4a55-8f9f-2f0d3a5f9a11"):
            said = direct.run(NODE, volume_id=wanted)
            assert said.get("safety_stop") and old["id"][:20] in said["found"] and wanted in said["expected"], said
            assert f"labctl volume detach {old['id']}" in said["next_step"]
        assert intact(old)
        assert shell(new, "head -c 64M $D | tr -d '\\0' | wc -c") == "0"
    finally:
        leave(old)
        leave(new)


# -- identities ----------------------------------------------------------------------------------------------------


def test_a_copy_is_refused_with_both_identities_and_taken_over_by_its_name_only() -> None:
    cage = filled("tutorial")
    shell(cage, f"umount {PLACE}; sed -i '\\#{PLACE}#d' /etc/fstab")
    file = Path(nodes.detach(NODE, cage["id"]))
    copy = nodes.attach(NODE, file=str(file.rename(file.with_stem("11111111-" + file.stem[9:]))))
    try:
        before = digest(copy)
        said = direct.run(NODE, volume_id=copy["id"])
        assert said.get("safety_stop") and cage["id"] in said["found"] and copy["id"] in said["expected"], said
        name = f"molecule/{cage['id']}/{shell(copy, 'blkid -o value -s UUID $P')}"
        assert f"labctl converge --accept-volume {name} " in said["next_step"]
        for wrong in ("molecule", name[:-1], name.replace("molecule", "other")):
            assert direct.run(NODE, volume_id=copy["id"], accept_marker=wrong).get("safety_stop")
        assert digest(copy) == before
        assert not direct.run(NODE, volume_id=copy["id"], accept_marker=name).get("failed")
        assert direct.run(NODE, volume_id=copy["id"])["changed"] is False
        assert intact(copy)
    finally:
        leave(copy)


def test_a_swapped_device_is_refused_by_its_serial() -> None:
    cage, other = filled("tutorial"), "22222222-5d3e-4a55-8f9f-2f0d3a5f9a11"
    try:
        shell(cage, f"umount {PLACE}; sed -i '\\#{PLACE}#d' /etc/fstab")
        before = digest(cage)
        said = direct.run(NODE, volume_id=other, device=cage["loop"])
        assert said.get("safety_stop") and other in said["expected"] and cage["id"][:20] in said["found"], said
        assert f"--accept-volume serial:{cage['id'][:20]}" in said["next_step"]
        assert digest(cage) == before
    finally:
        leave(cage)
