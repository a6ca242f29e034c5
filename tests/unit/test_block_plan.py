"""What may be done to a volume, as a table: each case names what would be lost if the decision were another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ansible.module_utils
import pytest

ansible.module_utils.__path__.append(str(Path(__file__).parents[2] / "roles/block_volume/module_utils"))

from ansible.module_utils import block_write  # noqa: E402
from ansible.module_utils.block_model import (  # noqa: E402
    GROW,
    INITIALISE,
    NEVER,
    STOP,
    USE,
    Area,
    Content,
    Extent,
    Facts,
    Marker,
    MountPoint,
    Partition,
    Plan,
    Table,
    Wanted,
)
from ansible.module_utils.block_plan import decide, identity, marker_identity, refuse_path  # noqa: E402

GIB = 1 << 30
ID = "0b6b2d0e-5d3e-4a55-8f9f-2f0d3a5f9a11"
FS = "6318a73b-2fe1-4efb-acd9-8313367ac135"
WANTED = Wanted(mount_point="/mnt/block", volume_id=ID, lab="food")
ZERO = Content(proven_zero=True, bytes_read=2 * GIB, seconds=2)
DATA = Content(data_at=GIB, bytes_read=GIB, seconds=1)
DISK = Area(path="/dev/vdb", size=2 * GIB, content=ZERO)
GPT = ((510, "PMBR"), (512, "gpt"), (2 * GIB - 512, "gpt"))
EXTENT = Extent(1, 1 << 20, 2 * GIB - (2 << 20))
BIGGER = Extent(1, 1 << 20, 4 * GIB - (2 << 20))  # the same partition on a disk of 4 GiB
TABLE = Table(kind="gpt", guid="1" * 8, extents=(EXTENT,), names={1: "primary"})
OURS = Table(kind="gpt", guid=ID, extents=(EXTENT,), names={1: f"labctl:{ID[:20]}"})
EXT4 = Area(
    "/dev/vdb1", EXTENT.size, kind="ext4", usage="filesystem", uuid=FS, signatures=((1080, "ext4"),),
    filesystem_size=EXTENT.size,
)  # fmt: skip
MARKER = {"lab": "food", "volume_id": ID, "filesystem_uuid": FS, "layout_version": 1}


def blank(**changes: Any) -> Facts:
    return Facts(disk=replace(DISK, **changes), serial=ID[:20])


def whole(kind: str, usage: str = "filesystem", **changes: Any) -> Facts:
    area = Area("/dev/vdb", 2 * GIB, kind=kind, usage=usage, uuid=FS, signatures=((0, kind),), filesystem_size=2 * GIB)
    return Facts(disk=replace(area, **changes))


def partitioned(area: Area = EXT4, table: Table = TABLE, **changes: Any) -> Facts:
    disk = Area("/dev/vdb", 2 * GIB, table="gpt", signatures=GPT)
    return replace(Facts(disk=disk, table=table, partitions=(Partition(EXTENT, area),)), **changes)


def on_disk(**changes: Any) -> Facts:
    return replace(partitioned(), disk=replace(partitioned().disk, **changes))


def extended(table: Table = TABLE, area: Area = EXT4, behind: Content = ZERO, **changes: Any) -> Facts:
    """The tutorial's volume after Cinder made its 2 GiB 4 GiB."""
    disk = Area("/dev/vdb", 4 * GIB, table="gpt", signatures=GPT[:2])
    facts = Facts(disk=disk, table=table, partitions=(Partition(EXTENT, area),), behind=behind)
    return replace(facts, **changes)


def extended_whole(kind: str = "ext4", behind: Content = ZERO, **changes: Any) -> Facts:
    return replace(whole(kind, size=4 * GIB), behind=behind, **changes)


USED = [
    ("a tutorial-made volume", partitioned()),
    ("a whole-disk ext4", whole("ext4")),
    ("a whole-disk xfs", whole("xfs")),
    ("an ext4 that wipefs calls ext3", whole("ext4", signatures=((1080, "ext3"),))),
    ("our own volume", partitioned(table=OURS, marker=Marker(MARKER))),
    ("our volume, mounted", partitioned(mount_point=MountPoint(source="/dev/vdb1", ours=True), marker=Marker(MARKER))),
    ("our volume, mounted, the disk is busy by that", partitioned(
        replace(EXT4, busy=True, mounted_at=("/mnt/block", "/srv/x")), mount_point=MountPoint("/dev/vdb1", True))),
    ("a marker with fields of later versions", partitioned(marker=Marker({**MARKER, "postgres_major": 17}))),
    ("a grown disk whose backup GPT isn't at its end", on_disk(signatures=GPT[:2])),
    ("a grown disk, nobody asked to grow", extended(behind=Content())),
    ("a grown disk, its table enlarged and the kernel not told", extended(replace(TABLE, extents=(BIGGER,)))),
    ("a grown whole-disk filesystem", extended_whole()),
    ("a journal not replayed, its marker half written", partitioned(marker=Marker(problem="garbage", stale=True))),
]  # fmt: skip

STOPPED = [
    ("data in the middle", blank(content=DATA), "unknown kind"),
    ("only samples of a huge disk read", blank(size=2**42, content=Content(bytes_read=GIB, seconds=1)), "too large"),
    ("nothing read at all", blank(content=Content()), "too large"),
    ("blkid missing", blank(unknown=("blkid isn't installed",)), "unknown counts as data"),
    ("wipefs failed on a partition", partitioned(replace(EXT4, unknown=("wipefs: I/O error",))), "unknown counts"),
    ("the root disk", Facts(disk=DISK, root_disk=True), "runs from"),
    ("a partition named instead of a disk", replace(blank(), whole_disk=False), "isn't a disk"),
    ("a device without size", blank(size=0), "isn't a disk"),
    ("LUKS", whole("crypto_LUKS", "crypto"), "LUKS"),
    ("an LVM physical volume", whole("LVM2_member", "raid"), "LVM"),
    ("a software RAID member", whole("linux_raid_member", "raid"), "software RAID"),
    ("a ZFS pool's member, which libblkid calls a filesystem", whole("zfs_member"), "ZFS"),
    ("bcache", whole("bcache", "other"), "bcache"),
    ("swap space", whole("swap", "other"), "swap"),
    ("a disc image", whole("iso9660"), "disc image"),
    ("a FAT with its boot sector", whole("vfat", signatures=((0, "vfat"), (510, "dos"))), "owners"),
    ("an NTFS, which ntfs-3g would mount and write to", whole("ntfs"), "owners"),
    ("a squashfs", whole("squashfs"), "read-only image"),
    ("an unknown member", whole("newthing_member", "raid"), "something larger"),
    ("a signature that only wipefs knows", whole("", "", signatures=((0, "odd"),)), "odd"),
    ("ext4 with a damaged superblock", whole("", "", signatures=((1080, "ext4"),)), "damaged"),
    ("a GPT's header at the end and nothing else", blank(content=DATA, signatures=((2 * GIB - 512, "gpt"),)), "gpt"),
    ("contradicting signatures", whole("", "", ambivalent=True, signatures=((0, "xfs"), (1080, "ext4"))), "contradict"),
    ("ext4 with an old RAID's superblock behind it", whole("ext4", signatures=((0, "ext4"), (9, "mdraid"))), "else"),
    ("a filesystem without UUID", whole("minix", uuid=""), "no UUID"),
    ("an empty GPT", replace(partitioned(table=Table("gpt")), partitions=()), "no partitions"),
    ("two partitions", partitioned(table=replace(TABLE, extents=(EXTENT, Extent(2, 5, 5))),
        partitions=(Partition(EXTENT, EXT4), Partition(Extent(2, 5, 5), EXT4))), "2 partitions"),
    ("a partition that only the kernel knows", partitioned(table=replace(TABLE, extents=())), "disagree"),
    ("a partition that only the disk knows", replace(partitioned(), partitions=()), "disagree"),
    ("a table overwritten while the kernel still knows it", replace(partitioned(), disk=DISK), "no partition table"),
    ("a destroyed primary GPT", on_disk(signatures=GPT[2:]), "primary GPT"),
    ("a GPT whose end is cut off", on_disk(table="PMBR", signatures=GPT[:1]), "smaller"),
    ("a GPT over a whole-disk ext4", on_disk(kind="ext4", usage="filesystem"), "something else"),
    ("a GPT beside a ZFS label", on_disk(signatures=(*GPT, (9, "zfs_member"))), "something else"),
    ("somebody's blank partition", partitioned(Area("/dev/vdb1", GIB, content=ZERO)), "no filesystem"),
    ("somebody's partition with raw data", partitioned(Area("/dev/vdb1", GIB, content=DATA)), "no filesystem"),
    ("a disk smaller than its partition", on_disk(size=GIB), "smaller than its partition"),
    ("a disk smaller than its filesystem", whole("ext4", size=GIB), "smaller than its filesystem"),
    ("a table that was enlarged over a blank partition", replace(
        partitioned(Area("/dev/vdb1", GIB, content=ZERO), replace(OURS, extents=(BIGGER,))),
        disk=extended().disk), "disagree"),
    ("a disk whose serial is another volume's", replace(partitioned(), serial="11111111-5d3e-4a55-8"), "serial"),
    ("our table, and raw data in the partition",
        partitioned(Area("/dev/vdb1", GIB, content=DATA), OURS), "unknown kind"),
    ("our table of another volume, blank partition",
        partitioned(Area("/dev/vdb1", GIB, content=ZERO), replace(OURS, guid="other")), "no filesystem"),
    ("LUKS in a partition", partitioned(replace(EXT4, kind="crypto_LUKS", usage="crypto")), "LUKS"),
    ("a table in a partition", partitioned(replace(EXT4, kind="", usage="", table="dos")), "of its own"),
    ("mounted elsewhere", partitioned(replace(EXT4, mounted_at=("/data",))), "mounted elsewhere"),
    ("held by device-mapper", partitioned(replace(EXT4, holders=("dm-0",))), "in use by dm-0"),
    ("used as swap", whole("ext4", swap=True), "swap"),
    ("held in another namespace", partitioned(replace(EXT4, busy=True)), "isn't mounted here"),
    ("read-only volume", partitioned(replace(EXT4, read_only=True)), "read-only"),
    ("mounted read-only", partitioned(mount_point=MountPoint("/dev/vdb1", True, read_only=True)), "read-only"),
    ("two devices with the same filesystem", partitioned(same_uuid=("/dev/vdc1",)), "a copy"),
    ("blank but in use", blank(holders=("dm-0",)), "can't be had alone"),
    ("blank but opened exclusively", blank(busy=True), "can't be had alone"),
    ("blank but read-only", blank(read_only=True), "can't be had alone"),
    ("another mount in the way", partitioned(mount_point=MountPoint("/dev/vdc1")), "something else is mounted"),
    ("files under the mount point", partitioned(mount_point=MountPoint(entries=("postgres_data",))), "isn't empty"),
    ("a link as mount point", partitioned(mount_point=MountPoint(symlink=True)), "symbolic link"),
    ("a file as mount point", partitioned(mount_point=MountPoint(not_directory=True)), "isn't a directory"),
    ("a foreign fstab line", partitioned(mount_point=MountPoint(fstab_claim="/dev/vdc1 /mnt/block")), "claims"),
    ("another lab's volume", partitioned(marker=Marker({**MARKER, "lab": "mine"})), "another lab"),
    ("a copy of the volume", partitioned(marker=Marker({**MARKER, "volume_id": "other"})), "copy of another volume"),
    ("files of another volume", partitioned(marker=Marker({**MARKER, "filesystem_uuid": "o"})), "another file"),
    ("a newer layout", partitioned(marker=Marker({**MARKER, "layout_version": 2})), "newer labctl"),
    ("a marker without a version", partitioned(marker=Marker({"lab": "food"})), "newer labctl"),
    ("an unreadable marker", partitioned(marker=Marker(problem="it isn't JSON")), "can't be read"),
]  # fmt: skip


MOVED = Extent(1, 2 << 20, 4 * GIB - (3 << 20))
NOT_GROWN = [
    ("a byte of data behind the partition", extended(behind=DATA), "data behind"),
    ("only samples of what is behind it were read", extended(behind=Content(bytes_read=GIB, seconds=1)), "too much"),
    ("nothing of what is behind it was read", extended(behind=Content()), "too much"),
    ("data behind a whole-disk filesystem", extended_whole(behind=DATA), "data behind"),
    ("the table's partition begins elsewhere than the kernel's",
        extended(replace(TABLE, extents=(MOVED,))), "disagree"),
    ("the table's partition is smaller than the kernel's",
        extended(replace(TABLE, extents=(replace(EXTENT, size=GIB),))), "disagree"),
    ("a second partition", extended(replace(TABLE, extents=(EXTENT, Extent(2, 3 * GIB, 5))),
        partitions=(Partition(EXTENT, EXT4), Partition(Extent(2, 3 * GIB, 5), EXT4))), "2 partitions"),
    ("a second partition that the kernel doesn't know",
        extended(replace(TABLE, extents=(EXTENT, Extent(2, 3 * GIB, 5)))), "disagree"),
    ("a disk that shrank", on_disk(size=GIB), "smaller than its partition"),
    ("a filesystem that can't be grown while it is mounted", extended(area=replace(EXT4, kind="ext2")), "ext2"),
    ("sectors of 4096 bytes", extended(replace(TABLE, sector=4096)), "sectors"),
    ("a filesystem of unknown size", extended(area=replace(EXT4, filesystem_size=0)), "how large"),
    ("no tool to grow it", extended(missing_tool="xfs_growfs"), "xfs_growfs"),
    ("a read-only volume", extended(area=replace(EXT4, read_only=True)), "read-only"),
    ("another lab's volume", extended(marker=Marker({**MARKER, "lab": "mine"})), "another lab"),
    ("a copy that is attached, too", extended(same_uuid=("/dev/vdc1",)), "a copy"),
    ("a table of two kinds", extended(disk=replace(extended().disk, signatures=(*GPT[:2], (9, "xfs")))), "else on it"),
]  # fmt: skip

MBR = ((510, "dos"),)
MBR_TABLE = Table(kind="dos", extents=(EXTENT,), names={1: ""})
FULL = replace(EXT4, size=BIGGER.size, filesystem_size=EXTENT.size)
TOLD = (Partition(BIGGER, FULL),)
BIGGER_TABLE = replace(TABLE, extents=(BIGGER,))
# (case, facts, the steps that are left: table, kernel, filesystem)
GROWN = [
    ("the tutorial's GPT", extended(), (True, True, True)),
    ("an MBR", extended(MBR_TABLE, disk=replace(extended().disk, table="dos", signatures=MBR)), (True, True, True)),
    ("an xfs", extended(area=replace(EXT4, kind="xfs", signatures=((0, "xfs"),))), (True, True, True)),
    ("a whole-disk ext4", extended_whole(), (False, False, True)),
    ("a whole-disk btrfs", extended_whole("btrfs"), (False, False, True)),
    ("cut off before the kernel was told", extended(BIGGER_TABLE), (False, True, True)),
    ("cut off before the filesystem", extended(BIGGER_TABLE, partitions=TOLD), (False, False, True)),
    ("extended once more after that", extended(BIGGER_TABLE, partitions=TOLD,
        disk=replace(extended().disk, size=8 * GIB)), (True, True, True)),
    ("mounted, as it is while labctl works", extended(mount_point=MountPoint("/dev/vdb1", True)), (True, True, True)),
]  # fmt: skip
NOTHING_TO_GROW = [
    ("a disk as it was made", partitioned()),
    ("a whole-disk ext4", whole("ext4")),
    ("grown already", extended(BIGGER_TABLE, partitions=(
        Partition(BIGGER, replace(FULL, filesystem_size=BIGGER.size)),))),
    ("the last group that ext4 leaves out", extended(BIGGER_TABLE, partitions=(
        Partition(BIGGER, replace(FULL, filesystem_size=BIGGER.size - (7 << 20))),))),
    ("an MBR's end at 2 TiB", Facts(
        disk=Area("/dev/vdb", 3 << 40, table="dos", signatures=MBR),
        table=replace(MBR_TABLE, extents=(Extent(1, 1 << 20, (2 << 40) - (1 << 20)),)),
        partitions=(Partition(Extent(1, 1 << 20, (2 << 40) - (1 << 20)),
            replace(EXT4, size=(2 << 40) - (1 << 20), filesystem_size=(2 << 40) - (1 << 20))),))),
]  # fmt: skip


@pytest.mark.parametrize(("facts", "words"), [pytest.param(f, w, id=name) for name, f, w in NOT_GROWN])
def test_what_growing_could_destroy_stops(facts: Facts, words: str) -> None:
    plan = decide(facts, replace(WANTED, grow=True))
    assert plan.action == STOP, plan
    assert words in plan.reason + plan.found
    assert plan.next_step


@pytest.mark.parametrize(("facts"), [pytest.param(f, id=name) for name, f, _words in STOPPED])
def test_nothing_that_stops_is_grown(facts: Facts) -> None:
    assert decide(facts, replace(WANTED, grow=True)).action == STOP


@pytest.mark.parametrize(("facts", "steps"), [pytest.param(f, s, id=name) for name, f, s in GROWN])
def test_an_extended_volume_is_grown_from_where_it_is(facts: Facts, steps: tuple[bool, bool, bool]) -> None:
    plan = decide(facts, replace(WANTED, grow=True))
    assert (plan.action, plan.uuid) == (GROW, FS), plan
    assert (plan.grow_table, plan.tell_kernel, plan.grow_filesystem) == steps


@pytest.mark.parametrize(("facts"), [pytest.param(f, id=name) for name, f, _steps in GROWN])
def test_nothing_grows_unasked_and_the_note_says_how(facts: Facts) -> None:
    plan = decide(facts, WANTED)
    assert plan.action == USE
    assert "labctl volume extend" in plan.note


@pytest.mark.parametrize(("facts"), [pytest.param(f, id=name) for name, f in NOTHING_TO_GROW])
def test_growing_again_changes_nothing(facts: Facts) -> None:
    plan = decide(facts, replace(WANTED, grow=True))
    assert (plan.action, plan.note) == (USE, ""), plan


@pytest.mark.parametrize(("facts"), [pytest.param(f, id=name) for name, f in USED])
def test_what_holds_a_filesystem_is_mounted_as_it_is(facts: Facts) -> None:
    plan = decide(facts, WANTED)
    assert plan.action == USE, plan
    assert plan.uuid == FS


@pytest.mark.parametrize(("facts", "words"), [pytest.param(f, w, id=name) for name, f, w in STOPPED])
def test_what_could_lose_data_stops(facts: Facts, words: str) -> None:
    plan = decide(facts, WANTED)
    assert plan.action == STOP, plan
    assert words in plan.reason
    assert plan.next_step


@pytest.mark.parametrize(("facts"), [pytest.param(f, id=name) for name, f, _words in STOPPED])
def test_nothing_that_stops_is_initialised_for_having_no_id(facts: Facts) -> None:
    assert decide(facts, replace(WANTED, volume_id="", lab="")).action != INITIALISE


def test_a_blank_disk_is_initialised() -> None:
    plan = decide(blank(), WANTED)
    assert (plan.action, plan.device, plan.resume) == (INITIALISE, "/dev/vdb", False)


def test_a_blank_disk_stays_blank_when_told_so() -> None:
    assert decide(blank(), replace(WANTED, format=NEVER)).action == STOP


@pytest.mark.parametrize("content", [ZERO, replace(DATA, unfinished=True)])
def test_a_run_cut_off_before_or_in_mkfs_is_finished(content: Content) -> None:
    plan = decide(partitioned(Area("/dev/vdb1", GIB, content=content), OURS), WANTED)
    assert (plan.action, plan.device, plan.resume) == (INITIALISE, "/dev/vdb1", True)


def test_a_run_cut_off_in_its_table_is_finished() -> None:
    plan = decide(blank(content=replace(DATA, unfinished=True)), WANTED)
    assert (plan.action, plan.device, plan.resume) == (INITIALISE, "/dev/vdb", True)


def test_an_unfinished_filesystem_counts_only_under_our_own_table() -> None:
    content = replace(DATA, unfinished=True)
    assert decide(partitioned(Area("/dev/vdb1", GIB, content=content)), WANTED).action == STOP


def test_an_unmarked_volume_is_adopted_and_a_marked_one_isnt() -> None:
    assert decide(partitioned(), WANTED).adopt
    assert not decide(partitioned(marker=Marker(MARKER)), WANTED).adopt


def test_another_identity_is_accepted_only_by_its_own_name() -> None:
    facts = partitioned(marker=Marker({**MARKER, "lab": "mine"}))
    name = marker_identity(facts.marker.values)
    assert f"labctl converge --accept-volume {name}" in decide(facts, WANTED).next_step
    assert decide(facts, replace(WANTED, accept_marker="mine/other")).action == STOP
    assert decide(facts, replace(WANTED, accept_marker=name)).accepted


def test_without_a_lab_or_an_id_the_filesystem_is_still_compared() -> None:
    bare = replace(WANTED, lab="", volume_id="")
    assert decide(partitioned(marker=Marker({**MARKER, "lab": "mine"})), bare).action == USE
    assert decide(partitioned(marker=Marker({**MARKER, "filesystem_uuid": "other"})), bare).action == STOP


def test_the_marker_is_compared_again_once_the_journal_is_replayed() -> None:
    plan = decide(partitioned(marker=Marker(problem="garbage", stale=True)), WANTED)
    assert identity(Marker({**MARKER, "lab": "mine"}), WANTED, plan).action == STOP


@pytest.mark.parametrize(
    "path", ["/", "/etc", "/usr/x", "/home", "/var/lib", "/mnt", "x", "/a/../etc", "/a b", "/a\n/b"]
)
def test_system_paths_are_no_mount_points(path: str) -> None:
    assert refuse_path(path)


@pytest.mark.parametrize("path", ["/mnt/block", "/data", "/srv/labctl/block", "/home/cc/volume"])
def test_other_paths_are(path: str) -> None:
    assert not refuse_path(path)


def test_fstab_keeps_every_other_byte() -> None:
    plan = Plan(USE, "", "/dev/vdb1", 1, "ext4", FS)
    line = block_write.fstab_line(plan, WANTED)
    text = "# a comment\nUUID=x  /  ext4\tdefaults 0 1\n\n/dev/sr0 /media/cdrom auto noauto"
    new = block_write.fstab_with(text, line, "/mnt/block")
    assert new == f"{text}\n{line}\n"
    assert block_write.fstab_with(new, line, "/mnt/block") == new
    older = new.replace(FS, "older")
    assert block_write.fstab_with(older, line, "/mnt/block") == new
    assert line.split()[3].startswith("defaults,nofail,x-systemd.device-timeout=30s")


def test_the_marker_keeps_what_it_doesnt_know() -> None:
    plan = decide(partitioned(), WANTED)
    first = block_write.marker_for({}, plan, WANTED, "a")
    assert first["origin"] == "adopted"
    again = block_write.marker_for({**first, "postgres_major": 17}, plan, replace(WANTED, lab=""), "b")
    assert again == {**first, "postgres_major": 17, "last_attached_to": "b"}
