"""Kinds of disk, each made by the tools that make it in life, and what the role has to do with it.

`make` is a shell script that runs as root in the node: $D is the disk, $P its first partition, $ID the volume's id.
`expect` is "stop" (with `words` from the reason), "use" (mounted as it is: `keep` puts a file on it first) or
"initialise".
"""

from __future__ import annotations

from dataclasses import dataclass

ONE_PARTITION = "parted -s $D mklabel gpt mkpart primary ext4 0% 100%; udevadm settle; "
# Our own table: a filesystem's UUID of version 7 that begins with a time, and ends in the volume's id here.
OURS = (
    "U=0192f5a0-0000-7abc-8def-${ID: -12}; "
    "printf 'label: gpt\\nlabel-id: %s\\ntype=linux, uuid=%s, name=\"labctl:%.20s\"\\n' $ID $U $ID"
    " | sfdisk -q $D; udevadm settle; "
)
# What a run leaves that is cut off right before the superblock: the image's blocks, and no first two KiB.
HALF_MADE = OURS + (
    "I=/tmp/image; rm -f $I; truncate -s $(blockdev --getsize64 $P) $I; "
    "E2FSPROGS_FAKE_TIME=$((0x0192f5a00000 / 1000)) mkfs.ext4 -q -U $U -E hash_seed=$U $I; "
    "dd if=/dev/zero of=$I bs=2k count=1 conv=notrunc; dd if=$I of=$P bs=1M; "
)
LUKS = "echo secret | cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 "


@dataclass(frozen=True)
class Animal:
    """One kind of disk. `mib` is its size; xfs needs 300 and more."""

    name: str
    make: str
    expect: str
    words: str = ""
    mib: int = 64
    keep: str = ""
    format: str = "when_blank"
    check: bool = False


ZOO = [
    Animal("blank", "", "initialise"),
    Animal("blank-check", "", "initialise", check=True),
    Animal("blank-never", "", "stop", "isn't allowed", format="never"),
    Animal("ours-cut-off", OURS, "initialise"),
    Animal("ours-without-superblock", HALF_MADE, "initialise"),
    Animal("ours-half-written", HALF_MADE + "blkdiscard -z -o 32MiB $P", "initialise"),
    Animal("ours-raw-data", OURS + "echo data | dd of=$P bs=1M seek=40 conv=notrunc", "stop", "unknown kind"),
    Animal("ours-raw-data-at-start", OURS + "echo data | dd of=$P conv=notrunc", "stop", "unknown kind"),
    Animal("ours-half-and-data", HALF_MADE + "echo x | dd of=$P bs=1M seek=8 conv=notrunc", "stop", "unknown kind"),
    Animal("middle-only", "echo data | dd of=$D bs=1k seek=31001 conv=notrunc", "stop", "unknown kind"),
    Animal("last-mib-only", "echo data | dd of=$D bs=1M seek=63 conv=notrunc", "stop", "unknown kind"),
    Animal("last-byte-only", "printf x | dd of=$D bs=1 seek=67108863 conv=notrunc", "stop", "unknown kind"),
    Animal("random", "dd if=/dev/urandom of=$D bs=1M count=64", "stop"),
    Animal("raw-postgres-page", "dd if=/bin/true of=$D bs=8k seek=10 conv=notrunc", "stop", "unknown kind"),
    Animal("luks2", LUKS + "--type luks2 $D -", "stop", "LUKS"),
    Animal("luks1", LUKS + "--type luks1 $D -", "stop", "LUKS"),
    Animal("luks2-partition", ONE_PARTITION + LUKS + "--type luks2 $P -", "stop", "LUKS"),
    Animal("lvm-pv", "pvcreate -q -y $D", "stop", "LVM"),
    Animal("swap", "mkswap -q $D", "stop", "swap"),
    Animal("squashfs", "mkdir -p /tmp/s && echo x >/tmp/s/x && mksquashfs /tmp/s $D -quiet -noappend", "stop", "image"),
    Animal("empty-gpt", "parted -s $D mklabel gpt", "stop", "no partitions"),
    Animal("mbr-one-blank-partition", "echo ',,L' | sfdisk -q -X dos $D; udevadm settle", "stop", "no filesystem"),
    Animal("gpt-one-blank-partition", ONE_PARTITION, "stop", "no filesystem"),
    Animal(
        "gpt-two-ext4", "printf ',32M\\n,\\n' | sfdisk -q -X gpt $D; udevadm settle; mkfs.ext4 -q $P", "stop", "2 part"
    ),
    Animal(
        "gpt-primary-destroyed",
        ONE_PARTITION + "mkfs.ext4 -q $P; dd if=/dev/zero of=$D bs=512 count=34 conv=notrunc; udevadm settle",
        "stop",
    ),
    Animal("gpt-over-ext4", "mkfs.ext4 -q $D; echo ';' | sfdisk -q -X gpt --wipe never $D; udevadm settle", "stop"),
    Animal("marker-of-another-lab", "mkfs.ext4 -q $D", "stop", "another lab", keep="foreign"),
    Animal(
        "held-elsewhere", "mkfs.ext4 -q $D; mkdir -p /elsewhere; mount -o ro $D /elsewhere", "stop", "mounted elsewhere"
    ),
    Animal("ext4-disk", "mkfs.ext4 -q $D", "use", keep="file"),
    Animal("ext4-partition", ONE_PARTITION + "mkfs.ext4 -q $P", "use", keep="file"),
    Animal("ext4-mbr", "echo ',,L' | sfdisk -q -X dos $D; udevadm settle; mkfs.ext4 -q $P", "use", keep="file"),
    Animal("ext2-disk", "mkfs.ext2 -q $D", "use", keep="file"),
    Animal("xfs-disk", "mkfs.xfs -q $D", "use", keep="file", mib=320),
    Animal("xfs-partition", ONE_PARTITION + "mkfs.xfs -q $P", "use", keep="file", mib=320),
    Animal("btrfs-disk", "mkfs.btrfs -q $D", "use", keep="file", mib=128),
    Animal("vfat-disk", "mkfs.vfat $D", "stop"),
]
