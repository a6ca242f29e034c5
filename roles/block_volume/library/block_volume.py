#!/usr/bin/python
"""Mounts a volume, after proving which one it is; makes a filesystem only on a disk proven blank."""

from __future__ import annotations

DOCUMENTATION = r"""
module: block_volume
short_description: Mount a Cinder volume by identity, and never lose what is on it
description:
  - Finds the disk by the volume's id, reads its whole state once, lets a pure function decide (use, initialise, grow,
    stop), and does what the decision says. Whatever isn't provably blank or provably the right volume ends the run
    before a byte is written.
  - With O(state=unmounted) it is the way back. A plain unmount, never a lazy one.
options:
  volume_id: {description: Cinder volume id. The disk's serial is its beginning., type: str, default: ""}
  device: {description: Path of a whole disk for hosts whose disks have no serial., type: str, default: ""}
  mount_point: {description: Where to mount., type: str, required: true}
  state: {description: Wanted state., type: str, choices: [mounted, unmounted], default: mounted}
  format:
    description: Whether a blank disk gets a partition table and an ext4 filesystem.
    type: str
    choices: [when_blank, never]
    default: when_blank
  owner: {description: User who gets the root directory of a new filesystem., type: str, default: root}
  lab: {description: Lab that the volume belongs to., type: str, default: ""}
  accept_marker: {description: Identity that a safety stop printed; takes such a volume over., type: str, default: ""}
  grow: {description: Whether the filesystem takes the room that an extended volume has., type: bool, default: false}
  size_gib: {description: Size in GiB that the disk must have before it is grown., type: int, default: 0}
  wait: {description: Seconds to wait for the disk to appear., type: int, default: 60}
  read_limit_gib: {description: Largest disk in GiB that is read whole to prove it blank., type: int, default: 256}
  host_keys:
    description: Whether the server's SSH host keys are those that lie on the volume, so that a new server is known.
    type: bool
    default: false
author: labctl
attributes:
  check_mode: {support: full, description: Shows the plan.}
  diff_mode: {support: full, description: Shows what would differ.}
"""

EXAMPLES = r"""
- name: Mount the lab's volume
  block_volume:
    volume_id: 0b6b2d0e-5d3e-4a55-8f9f-2f0d3a5f9a11
    mount_point: /mnt/block
    owner: cc
    lab: food
"""

RETURN = r"""
mount_point: {description: Where it is mounted., type: str, returned: always}
filesystem_uuid: {description: UUID of the filesystem., type: str, returned: when there is one}
filesystem: {description: Its kind., type: str, returned: when there is one}
device: {description: The disk., type: str, returned: always}
partition: {description: What is mounted; the disk itself if it has no table., type: str, returned: when there is one}
size: {description: Size of the disk in bytes., type: int, returned: always}
plan: {description: use, initialise, grow or stop., type: str, returned: always}
reason: {description: Why., type: str, returned: always}
note: {description: What a person may want to know of it., type: str, returned: when there is something}
changes: {description: What was done, or would be., type: list, elements: str, returned: always}
protected: {description: Whether the bare mount point is immutable., type: bool, returned: when it could be seen}
marker: {description: Identity that is on the volume., type: dict, returned: when there is one}
host_keys: {description: The host's public keys., type: list, elements: str, returned: when they are kept on the volume}
"""

import errno
import fcntl
import os
import pwd
import re
import time
from dataclasses import replace
from typing import Any

from ansible.module_utils import (
    block_bytes,
    block_facts,
    block_grow,
    block_host,
    block_model,
    block_plan,
    block_room,
    block_unmount,
    block_write,
    host_keys,
)
from ansible.module_utils.basic import AnsibleModule

LOCK = "/run/labctl-block-volume.lock"


class Run:
    """One run of the module: its parameters, what it has found out, and what it has done so far."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module, self.params, self.check = module, module.params, module.check_mode
        self.done: list[str] = []
        self.result: dict[str, Any] = {"mount_point": self.params["mount_point"], "changes": self.done}
        self.wanted = block_model.Wanted(
            mount_point=self.params["mount_point"],
            volume_id=self.params["volume_id"],
            lab=self.params["lab"],
            format=self.params["format"],
            accept_marker=self.params["accept_marker"],
            grow=self.params["grow"],
        )

    def fail(self, message: str, **extra: Any) -> None:
        """End the run; `changed` says whether anything was written before."""
        self.module.fail_json(msg=message, **{**self.result, "changed": bool(self.done) and not self.check, **extra})

    def refuse(self, plan: Any) -> None:
        """End the run with a safety stop."""
        self.fail(
            plan.reason,
            safety_stop=True,
            plan=block_model.STOP,
            reason=plan.reason,
            expected=plan.expected,
            found=plan.found,
            next_step=plan.next_step,
            diff={"before": "", "after": f"plan: {block_model.STOP}: {plan.reason}\n"},
        )

    # -- which disk ---------------------------------------------------------------------------------------

    def locate(self, seconds: int) -> str:
        """The one disk that is meant, waiting up to `seconds` for it; "" if there is none."""
        deadline = time.monotonic() + seconds
        while True:
            if not os.path.ismount(self.wanted.mount_point):  # else udev was done with it long ago
                block_host.ask("udevadm", "settle", "--timeout=10")
            found = self.matches()
            if len(found) == 1 or time.monotonic() >= deadline:
                break
            time.sleep(0.5)
        if len(found) > 1:
            self.refuse(
                block_model.stop(
                    "more than one disk matches", "exactly one", ", ".join(found), "detach the one that isn't meant"
                )
            )
        return str(found[0]) if found else ""

    def matches(self) -> list[str]:
        """Every disk that fits the volume id and the explicit path."""
        by_id = block_host.find_disks(self.params["volume_id"]) if self.params["volume_id"] else []
        if not self.params["device"]:
            return list(by_id)
        if not os.path.exists(self.params["device"]):
            return []
        explicit = block_host.kernel_path(os.stat(self.params["device"]).st_rdev)
        if not explicit:
            self.fail(f"{self.params['device']} isn't a block device", expected="a disk", found="something else")
        return sorted({explicit, *by_id})

    def missing(self) -> None:
        """End the run: the volume isn't attached."""
        serials = block_host.disk_serials()
        seen = ", ".join(f"{path} (serial {serial})" for path, serial in serials.items()) or "no disk with a serial"
        name = self.params["volume_id"] or self.params["device"]
        if os.path.ismount(self.wanted.mount_point):
            self.refuse(
                block_model.stop(
                    f"the disk of volume {name} is gone while it is still mounted at {self.wanted.mount_point}",
                    expected="its disk",
                    found=seen,
                    next_step="labctl drain (it stops what uses the mount and unmounts it), then labctl up",
                )
            )
        self.fail(
            f"volume {name} isn't attached to this host: no sign of it in {self.params['wait']} s",
            expected=f"a disk whose serial begins with {name[:20]}" if self.params["volume_id"] else name,
            found=seen,
            next_step="attach the volume (labctl reattach-volume)",
        )

    def refuse_other(self) -> None:
        """End the run if another volume is mounted: the lab's name for its volume may mean another one by now."""
        here = [m for m in block_host.mounts() if m.target == self.wanted.mount_point]
        number = here[-1].number if here else 0
        serial = block_host.serial_of(block_host.kernel_path(block_host.disk_of(number) or number)) if here else ""
        if not serial or not self.wanted.volume_id or self.wanted.volume_id[:20] in serial:
            return
        marker = block_facts.marker_below(self.wanted.mount_point).values
        self.refuse(
            block_model.stop(
                f"another volume than the lab's is mounted at {self.wanted.mount_point}",
                expected=f"volume {self.wanted.volume_id}",
                found=f"{here[-1].source}, serial {serial}, marker {block_plan.marker_identity(marker)}",
                next_step=f"labctl volume detach {marker.get('volume_id') or 'ID'} (it drains first), then labctl up; "
                "if the mounted one is right, give its name in lab.yaml (volume.name)",
            )
        )

    # -- mounted ------------------------------------------------------------------------------------------

    def mounted(self) -> None:
        """Bring the volume to its mount point."""
        self.refuse_other()
        disk = self.locate(self.params["wait"])
        if not disk:
            self.missing()
        self.wait_for_size(disk)
        facts = self.look(disk, self.params["read_limit_gib"] << 30)
        plan = block_plan.decide(facts, self.wanted)
        self.result.update(plan=plan.action, reason=plan.reason, **({"note": plan.note} if plan.note else {}))
        if plan.action == block_model.STOP:
            self.refuse(plan)
        changes = self.pending(facts, plan)
        before, after = self.picture(facts, plan, changes)
        self.result["diff"] = {"before": before, "after": after} if changes else {"before": "", "after": ""}
        try:
            if self.check or not changes:
                self.result.update(changes=changes, marker=dict(facts.marker.values), **self.names(plan))
            else:
                self.apply(facts, plan)
            if self.params["host_keys"] and (facts.mount_point.ours or not self.check):
                self.identity()
        except block_write.Refused as error:
            self.refuse(block_model.stop(str(error), next_step="run again; if it stays, look at the disk by hand"))
        except (block_write.Failed, host_keys.Failed, OSError) as error:
            self.fail(str(error), next_step="see `dmesg` on the host, then run again")

    def identity(self) -> None:
        """The server's SSH host keys, which lie on the volume."""
        kept = host_keys.bring(self.wanted.mount_point, self.check)
        self.result.update(changes=[*self.result["changes"], *kept.changes], host_keys=list(kept.public))
        if kept.changes:
            self.result["diff"]["after"] += "\n".join([*kept.changes, ""])
        if kept.note:
            self.result["note"] = "; ".join(part for part in (self.result.get("note"), kept.note) if part)

    def wait_for_size(self, disk: str) -> None:
        """Wait until the disk is as large as the cloud says: a server learns of it a moment later."""
        expected, deadline = self.params["size_gib"] << 30, time.monotonic() + self.params["wait"]
        if not self.wanted.grow:
            return
        while (size := block_bytes.device_size(disk)) < expected:
            if time.monotonic() >= deadline:
                self.fail(
                    f"{disk} hasn't got its new size on this host within {self.params['wait']} s",
                    expected=f"{expected} bytes ({self.params['size_gib']} GiB)",
                    found=f"{size} bytes",
                    next_step="run it again; if it stays so: labctl drain, labctl volume detach, labctl up",
                )
            time.sleep(0.5)

    def look(self, disk: str, limit: int) -> Any:
        """The snapshot of a disk; a device that can't be read is a safety stop."""
        try:
            facts = block_facts.snapshot(disk, self.wanted, limit)
        except OSError as error:
            self.refuse(
                block_model.stop(
                    f"{disk} can't be read, and unknown counts as data",
                    found=str(error),
                    next_step="look at `dmesg` on the host",
                )
            )
        self.result.update(device=disk, size=facts.disk.size)
        return facts

    def pending(self, facts: Any, plan: Any) -> list[str]:
        """What has to be done, in words; empty if everything is as it should be."""
        changes = []
        if plan.action == block_model.INITIALISE:
            changes.append(
                f"{'finish the' if plan.resume else 'GPT, one partition and'} ext4 filesystem on {plan.device}"
            )
        if plan.action == block_model.INITIALISE or self.fstab(plan) is not None:
            changes.append("line in /etc/fstab")
        if not facts.mount_point.ours:
            changes.append(f"mount at {self.wanted.mount_point}")
        if plan.action == block_model.INITIALISE:
            changes.append(f"owner of {self.wanted.mount_point}: {self.params['owner']}")
        if self.new_marker(facts.marker, plan) is not None:
            changes.append(f"marker {block_model.MARKER_PATH}")
        if plan.grow_table:
            changes.append(f"partition {plan.number} up to byte {block_room.usable_end(facts)} of {facts.disk.path}")
        if plan.tell_kernel:
            changes.append(f"the kernel's idea of partition {plan.number}")
        if plan.grow_filesystem:
            changes.append(f"{plan.filesystem} as large as {plan.device}")
        return changes

    def fstab(self, plan: Any) -> str | None:
        """The new text of /etc/fstab, None if it is right."""
        text = block_write.read_fstab()
        new = block_write.fstab_with(text, block_write.fstab_line(plan, self.wanted), self.wanted.mount_point)
        return None if new == text else str(new)

    def new_marker(self, marker: Any, plan: Any) -> dict[str, Any] | None:
        """The marker to write, None if the one there is right."""
        wanted = block_write.marker_for(marker.values, plan, self.wanted, block_facts.attached_to())
        return None if wanted == dict(marker.values) else dict(wanted)

    def picture(self, facts: Any, plan: Any, changes: list[str]) -> tuple[str, str]:
        """Before and after, for --diff."""
        marker = facts.marker.values
        who = f"{block_plan.marker_identity(marker)}, last on {marker.get('last_attached_to')}" if marker else "none"
        before = [
            f"disk: {facts.disk.path}, {facts.disk.size} bytes",
            f"content: {self.content(facts, plan)}",
            f"mounted at {self.wanted.mount_point}: {facts.mount_point.source or 'nothing'}",
            f"marker: {who}",
        ]
        return "\n".join(before) + "\n", "\n".join([f"plan: {plan.action}: {plan.reason}", *changes]) + "\n"

    def content(self, facts: Any, plan: Any) -> str:
        """What is on the disk, for --diff."""
        if not plan.usable:
            return "blank" if not plan.resume else "the beginning of a filesystem of ours"
        size = next(a.filesystem_size for a in block_plan.areas(facts) if a.path == plan.device)
        return f"{plan.filesystem} {plan.uuid}" + (f", {size} bytes" if plan.grow_filesystem else "")

    def names(self, plan: Any) -> dict[str, str]:
        """What is known of the filesystem."""
        if not plan.usable:
            return {}
        return {"filesystem_uuid": plan.uuid, "filesystem": plan.filesystem, "partition": plan.device}

    def apply(self, facts: Any, plan: Any) -> None:
        """Do what the plan says, from the bottom up: table, filesystem, fstab, mount, owner, marker."""
        fresh = plan.action == block_model.INITIALISE
        if fresh:
            block_write.initialise(
                plan, facts, self.wanted, lambda: self.done.append(f"ext4 filesystem on {plan.device}")
            )
            facts = self.look(facts.disk.path, 0)
            plan = block_plan.decide(facts, replace(self.wanted, format=block_model.NEVER, grow=False))
            if plan.action != block_model.USE:
                self.refuse(plan)
        self.result.update(self.names(plan))
        old, new = block_write.read_fstab(), self.fstab(plan)
        if new is not None:
            block_write.write_fstab(new)
            self.done.append("line in /etc/fstab")
        marker = facts.marker
        if not facts.mount_point.ours:
            try:
                self.result["protected"] = block_write.mount(plan, self.wanted)
            except (block_write.Refused, block_write.Failed):
                block_write.write_fstab(old)
                raise
            self.done.append(f"mount at {self.wanted.mount_point}")
            marker = self.look_again(plan, old)
        if fresh or (plan.adopt and block_plan.ours(facts, self.wanted) and self.empty()):
            user = pwd.getpwnam(self.params["owner"])
            block_write.own(self.wanted.mount_point, user.pw_uid, user.pw_gid)
            plan = replace(plan, adopt=False)
        wanted = self.new_marker(marker, plan)
        if wanted is not None:
            self.mark(dict(marker.values), wanted)
        self.result["marker"] = wanted or dict(marker.values)
        if plan.action == block_model.GROW:
            self.grow(facts, plan)

    def mark(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        """Write the marker; on a full volume one that says the same but for the host stays as it is."""
        try:
            block_write.write_marker(self.wanted.mount_point, new)
            self.done.append(f"marker {block_model.MARKER_PATH}")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self.result["note"] = f"the volume is full: {block_model.MARKER_PATH} still names the last host"
            if {**old, "last_attached_to": new["last_attached_to"]} != new:
                self.fail(
                    f"the volume is full: its marker {block_model.MARKER_PATH} can't be written",
                    expected="a few KiB of free space",
                    found="none; the volume is mounted, and its files are as they were",
                    next_step="free some space on it, or labctl volume extend SIZE; then run again",
                )

    def grow(self, facts: Any, plan: Any) -> None:
        """Table, kernel, filesystem: what the plan says is left of it."""
        if plan.grow_table:
            block_grow.grow_table(facts, lambda: self.done.append(f"partition {plan.number} enlarged"))
        if plan.tell_kernel:
            block_grow.tell_kernel(facts)
            self.done.append("told the kernel")
        path = self.wanted.mount_point
        try:
            try:
                block_grow.grow_filesystem(plan, path)
            except block_grow.Mounted:
                block_grow.grow_unmounted(plan, path)
                block_write.mount(plan, self.wanted)
        except block_grow.Mounted:
            self.fail(
                f"this kernel doesn't let {plan.filesystem} grow while it is mounted, and {path} is in use",
                needs_unmount=True,
                expected="the capability CAP_SYS_RESOURCE, which a virtual machine has, or nobody who uses the volume",
                found="a container without it; the partition has its new size already, the filesystem the old one",
                next_step="labctl drain, then the same command again",
            )
        self.done.append(f"{plan.filesystem} as large as {plan.device}")
        self.result["note"] = f"the volume has {block_bytes.device_size(plan.device) / 2**30:.2f} GiB now"

    def look_again(self, plan: Any, old_fstab: str) -> Any:
        """The marker as it is after the journal's replay; another identity undoes the mount."""
        marker = block_facts.marker_below(self.wanted.mount_point)
        verdict = block_plan.identity(marker, self.wanted, plan)
        if verdict.action == block_model.STOP:
            block_host.ask("umount", self.wanted.mount_point)
            block_write.write_fstab(old_fstab)
            self.refuse(replace(verdict, found=f"{verdict.found} (seen after the journal's replay; unmounted again)"))
        return marker

    def empty(self) -> bool:
        """Whether the mounted filesystem holds nothing but what mkfs makes."""
        return set(os.listdir(self.wanted.mount_point)) <= {"lost+found"}

    # -- unmounted ----------------------------------------------------------------------------------------

    def unmounted(self) -> None:
        """Take the volume from its mount point; the line in fstab stays (nofail, by UUID)."""
        path = self.wanted.mount_point
        here = [m for m in block_host.mounts() if m.target == path]
        self.result.update(plan="unmount", reason="drain")
        if not here:
            self.result.update(reason=f"nothing is mounted at {path}", protected=block_write.is_protected(path))
            return
        device = block_host.kernel_path(here[-1].number)
        disk = self.locate(0) if self.params["volume_id"] or self.params["device"] else ""
        same = not disk or not device or re.fullmatch(rf"{re.escape(disk)}(p?\d+)?", device)
        if not same and not self.left_behind():
            self.fail(f"{path} is another volume's mount", expected=disk, found=device, next_step="unmount it by hand")
        self.result.update(partition=device or here[-1].source)
        users = block_unmount.users_of(here[-1].number, path)
        if users:
            self.fail(
                f"{path} is in use: {'; '.join(users[:10])}",
                expected="no user",
                found="; ".join(users),
                next_step="stop them (labctl drain stops the stack first), then run again",
            )
        self.done.append(f"unmount {path}")
        if self.check:
            return
        if self.params["host_keys"] and same and (note := host_keys.leave(path)):
            self.result["note"] = note
        problem = block_unmount.unmount(path, device)
        if problem:
            self.done.clear()
            self.fail(f"{path} couldn't be unmounted: {problem}", next_step="stop what uses it, then run again")
        self.result["protected"] = block_write.protect(path)

    def left_behind(self) -> bool:
        """Whether the mount is our volume's by fstab: it came back as another disk, and the mount is of the old one."""
        fields = [line.split() for line in block_write.read_fstab().splitlines()]
        ours = f"x-labctl.volume={self.wanted.volume_id}"
        return any(len(f) > 3 and f[1] == self.wanted.mount_point and ours in f[3].split(",") for f in fields)


def main() -> None:
    """Entry point for Ansible."""
    module = AnsibleModule(
        argument_spec={
            "volume_id": {"type": "str", "default": ""},
            "device": {"type": "str", "default": ""},
            "mount_point": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["mounted", "unmounted"], "default": "mounted"},
            "format": {"type": "str", "choices": ["when_blank", "never"], "default": "when_blank"},
            "owner": {"type": "str", "default": "root"},
            "lab": {"type": "str", "default": ""},
            "accept_marker": {"type": "str", "default": ""},
            "grow": {"type": "bool", "default": False},
            "size_gib": {"type": "int", "default": 0},
            "wait": {"type": "int", "default": 60},
            "read_limit_gib": {"type": "int", "default": 256},
            "host_keys": {"type": "bool", "default": False},
        },
        required_one_of=[("volume_id", "device")],
        supports_check_mode=True,
    )
    run = Run(module)
    validate(run)
    with open(LOCK, "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs at once would judge a disk that the other one is changing
        getattr(run, run.params["state"])()
    changes = run.result["changes"]
    module.exit_json(changed=bool(changes), **run.result)


def validate(run: Run) -> None:
    """Refuse parameters that can't be right before looking at any disk."""
    params = run.params
    if not params["volume_id"] and not params["device"]:
        run.fail(
            "neither block_volume_id nor block_volume_device says which disk is meant", next_step="set one of them"
        )
    if params["volume_id"] and not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z-]{7,63}", params["volume_id"]):
        run.fail(f"'{params['volume_id']}' isn't a volume id", expected="a Cinder volume id (a UUID)")
    if params["device"] and not params["device"].startswith("/dev/"):
        run.fail(f"'{params['device']}' isn't a device", expected="a path below /dev")
    if not block_write.plain_name(params["lab"]):
        run.fail(f"'{params['lab']}' can't be a lab's name", expected="letters, digits, . _ @ + -, at most 64")
    refused = block_plan.refuse_path(params["mount_point"])
    if refused:
        run.fail(
            f"{params['mount_point']} can't be the mount point: {refused}",
            next_step="choose another block_volume_mount_point",
        )
    try:
        pwd.getpwnam(params["owner"])
    except KeyError:
        run.fail(
            f"there is no user {params['owner']} on this host",
            expected="block_volume_owner exists",
            found="no such user",
        )


if __name__ == "__main__":
    main()
