"""Whether a filesystem may take the free space behind it, which an extended volume has: pure, like the planner."""

from __future__ import annotations

from dataclasses import replace

from ansible.module_utils.block_model import GROW, Facts, Plan, Wanted, stop

#: Bytes that tables and filesystems leave unused by themselves (alignment, a last group that would be too small).
SLACK = 16 << 20
#: What each filesystem is grown with while it is mounted.
TOOLS = {"ext4": "resize2fs", "xfs": "xfs_growfs", "btrfs": "btrfs"}
GPT_ENTRIES = 16384  # bytes of a GPT's array of 128 entries; its backup and one header end the disk
MBR_SECTORS = 1 << 32  # an MBR counts sectors with 32 bits
GIB = 1 << 30


def usable_end(facts: Facts) -> int:
    """Where the only partition could end at most; without a table the disk's end."""
    sector = facts.table.sector
    if facts.table.kind == "gpt":
        return int(facts.disk.size - GPT_ENTRIES - sector)
    return int(min(facts.disk.size, MBR_SECTORS * sector) if facts.table.kind else facts.disk.size)


def behind(facts: Facts) -> int:
    """The first byte behind the only partition, or behind a whole disk's filesystem; 0 if there is no such thing."""
    if facts.table.extents:
        return max(int(extent.end) for extent in facts.table.extents)
    return 0 if facts.disk.table else int(facts.disk.filesystem_size)


def has_room(facts: Facts) -> bool:
    """Whether there is enough behind it to matter."""
    return behind(facts) > 0 and usable_end(facts) - behind(facts) > SLACK


def grow(facts: Facts, wanted: Wanted, plan: Plan) -> Plan:
    """The plan to use a filesystem, with the steps that make it fill its disk; or a stop; or as it was."""
    area = next(p.area for p in facts.partitions) if plan.number else facts.disk
    room = has_room(facts)
    table = bool(plan.number) and room
    told = facts.partitions[0].extent if plan.number else None
    kernel = table or (told is not None and told.end < facts.table.extents[0].end)
    filesystem = room or kernel or 0 < area.filesystem_size < area.size - SLACK
    if not filesystem:
        return plan
    now, then = _gib(area.filesystem_size), _gib(usable_end(facts) - (told.start if told else 0))
    sizes = f"{now} of {then} GiB" if area.filesystem_size else f"not all of {then} GiB"
    if not wanted.grow:
        how = f"labctl volume extend {-(-facts.disk.size // GIB)}"
        return replace(plan, note=f"the {plan.filesystem} uses {sizes}; to grow it: {how}")
    refusal = _refusal(facts, plan, room, area.filesystem_size)
    if refusal:
        return refusal
    reason = f"{area.path} holds {plan.filesystem}, which uses {sizes}: grown while it is mounted"
    return replace(plan, action=GROW, reason=reason, grow_table=table, tell_kernel=kernel, grow_filesystem=True)


def _refusal(facts: Facts, plan: Plan, room: bool, filesystem_size: int) -> Plan | None:
    if plan.filesystem not in TOOLS:
        return stop(
            f"{plan.device} holds {plan.filesystem}, which can't be grown while it is mounted",
            expected=" or ".join(TOOLS),
            found=plan.filesystem,
            next_step="grow it by hand: labctl drain, then the filesystem's own tool after a snapshot of the volume",
        )
    if facts.missing_tool:
        return stop(
            f"{facts.missing_tool}, which grows {plan.filesystem}, isn't installed on this host",
            expected=facts.missing_tool,
            found="no such program",
            next_step="apt-get install e2fsprogs fdisk xfsprogs btrfs-progs (what of it is missing), then run again",
        )
    if not filesystem_size:
        return stop(
            f"the superblock of {plan.device} doesn't say how large the {plan.filesystem} is",
            expected="one filesystem on one device",
            found="an unknown size",
            next_step="grow it by hand after a snapshot of the volume",
        )
    if facts.table.extents and facts.table.sector != 512:
        return stop(
            f"{facts.disk.path} has sectors of {facts.table.sector} bytes: its table isn't enlarged by labctl",
            expected="sectors of 512 bytes",
            found=str(facts.table.sector),
            next_step=f"after a snapshot of the volume: `echo ,+ | sfdisk --no-reread -N 1 {facts.disk.path}`",
        )
    return _not_free(facts) if room else None


def _not_free(facts: Facts) -> Plan | None:
    content, what = facts.behind, "partition" if facts.table.extents else "filesystem"
    if content.data_at is not None:
        return stop(
            f"there is data behind the {what} on {facts.disk.path}: growing would overwrite it",
            expected="zeros, or a backup of the disk's own GPT",
            found=f"a byte that isn't zero at offset {content.data_at}",
            next_step=f"look at it with `hexdump -C -s {content.data_at} -n 512 {facts.disk.path}`; "
            "labctl never overwrites what it doesn't know",
        )
    if not content.proven_zero:
        limit = -(-facts.disk.size // GIB)
        return stop(
            f"there is too much behind the {what} on {facts.disk.path} to be read whole",
            expected="every byte read, so that nothing is lost",
            found=f"{_gib(content.bytes_read)} GiB read, all zero",
            next_step=f"set block_volume_read_limit_gib: {limit} (reading takes a while, once)",
        )
    return None


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}".rstrip("0").rstrip(".")
