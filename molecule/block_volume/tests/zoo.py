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
# What is made by a kernel that the node doesn't have is written here as its own documents say.
WRITE = "python3 - $D << 'END'\nimport os, struct, sys\nd = open(sys.argv[1], 'r+b')\nsize = d.seek(0, 2)\n"
# include/uapi/linux/raid/md_p.h: version 1 lies 4 KiB into the device, 0.90 in the last whole 64 KiB
MD12 = (
    WRITE
    + """
sb = bytearray(256 + 2 * 2)
struct.pack_into('<4I16s32s', sb, 0, 0xa92b4efc, 1, 0, 0, b'sixteen letters!', b'node:0')
struct.pack_into('<QIIQII', sb, 64, 1, 1, 0, 65536, 0, 2)
struct.pack_into('<QQQ', sb, 128, 2048, size // 512 - 2048, 8)
struct.pack_into('<I', sb, 220, 2)
total = sum(struct.unpack('<65I', sb))
struct.pack_into('<I', sb, 216, ((total & 0xffffffff) + (total >> 32)) & 0xffffffff)
d.seek(4096); d.write(sb)
END
"""
)
MD090 = (
    WRITE
    + """
words = [0] * 1024
words[0:12] = [0xa92b4efc, 0, 90, 0, 0, 0x11111111, 1, 1, 65472, 2, 2, 0]
words[13:16] = [0x22222222, 0x33333333, 0x44444444]
total = sum(words)
words[38] = ((total & 0xffffffff) + (total >> 32)) & 0xffffffff
d.seek((size & ~0xffff) - 0x10000); d.write(struct.pack('<1024I', *words))
END
"""
)
# zpool's on-disk format: a label at 0 with uberblocks from 128 KiB on, copies at 256 KiB and at the end
ZFS = (
    WRITE
    + """
for label in (0, 1 << 18, size - (1 << 19), size - (1 << 18)):
    for number in range(8):
        d.seek(label + (128 << 10) + number * 1024); d.write(struct.pack('<5Q', 0x00bab10c, 5000, 4, 7, 1))
END
"""
)
# bufpage.h: a heap page of 8 KiB with its header (layout version 4) and one tuple at its end
POSTGRES = (
    WRITE
    + """
for number in range(16):
    page = bytearray(8192)
    struct.pack_into('<QHHHHHHI', page, 0, 0x16B3748, 0, 4, 28, 8144, 8192, 8192 | 4, 0)
    page[8144:] = struct.pack('<IIIHHHBBI', 731, 0, 0, 0, number, 2, 8, 24, 42).ljust(48, b'x')
    d.seek(number * 8192); d.write(page)
END
"""
)
HOLD = (
    "python3 -c 'import os, sys, time; os.open(sys.argv[1], os.O_RDWR | os.O_EXCL); time.sleep(600)' $D "
    ">/dev/null 2>&1 & echo $! >/tmp/holder; sleep 1"
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
    Animal("raw-postgres-file", POSTGRES, "stop", "unknown kind"),
    Animal("mdraid-1.2", MD12, "stop", "software RAID"),
    Animal("mdraid-0.90", MD090, "stop", "software RAID"),
    Animal("zfs", ZFS, "stop"),
    Animal("bcache", "make-bcache -B $D", "stop", "bcache"),
    Animal(
        "iso",
        "mkdir -p /tmp/i && echo x >/tmp/i/x && genisoimage -quiet -o /tmp/iso /tmp/i && dd if=/tmp/iso of=$D",
        "stop",
        "disc image",
    ),
    Animal("luks2", LUKS + "--type luks2 $D -", "stop", "LUKS"),
    Animal("luks1", LUKS + "--type luks1 $D -", "stop", "LUKS"),
    Animal("luks2-partition", ONE_PARTITION + LUKS + "--type luks2 $P -", "stop", "LUKS"),
    Animal("lvm-pv", "pvcreate -q -y $D", "stop", "LVM"),
    Animal("lvm-pv-partition", ONE_PARTITION + "pvcreate -q -y $P", "stop", "LVM"),
    Animal("swap", "mkswap -q $D", "stop", "swap"),
    Animal("swap-partition", ONE_PARTITION + "mkswap -q $P", "stop", "swap"),
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
    Animal("held-by-a-program", "mkfs.ext4 -q $D; " + HOLD, "stop", "in use"),
    Animal("ext4-disk", "mkfs.ext4 -q $D", "use", keep="file"),
    Animal("ext4-partition", ONE_PARTITION + "mkfs.ext4 -q $P", "use", keep="file"),
    Animal("ext4-mbr", "echo ',,L' | sfdisk -q -X dos $D; udevadm settle; mkfs.ext4 -q $P", "use", keep="file"),
    Animal("ext2-disk", "mkfs.ext2 -q $D", "use", keep="file"),
    Animal("ext3-partition", ONE_PARTITION + "mkfs.ext3 -q $P", "use", keep="file"),
    Animal("xfs-disk", "mkfs.xfs -q $D", "use", keep="file", mib=320),
    Animal("xfs-partition", ONE_PARTITION + "mkfs.xfs -q $P", "use", keep="file", mib=320),
    Animal("btrfs-disk", "mkfs.btrfs -q $D", "use", keep="file", mib=128),
    Animal("btrfs-partition", ONE_PARTITION + "mkfs.btrfs -q $P", "use", keep="file", mib=128),
    # what knows no owners, or what this kernel can't mount
    Animal("vfat-disk", "mkfs.vfat $D", "stop", "owners"),
    Animal("vfat-partition", ONE_PARTITION + "mkfs.vfat $P", "stop", "owners"),
    Animal("exfat-disk", "mkfs.exfat $D", "stop", "owners"),
    Animal("ntfs-partition", ONE_PARTITION + "mkntfs -q -Q $P", "stop", "owners"),
    Animal("f2fs-disk", "mkfs.f2fs -q $D", "stop"),
    Animal("jfs-disk", "mkfs.jfs -q $D", "stop"),
    Animal("nilfs2-disk", "mkfs.nilfs2 -q $D", "stop", mib=136),
    Animal("udf-disk", "mkudffs $D", "stop"),
]
