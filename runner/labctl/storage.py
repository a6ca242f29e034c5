"""Volumes by hand: list, create, attach, detach, extend, delete. What is mounted is never pulled away."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from labctl import ansible, lifecycle, ssh
from labctl.ansible import Outcome
from labctl.cloud import FINISHED, META_EXTEND, META_LAB, UNFINISHED
from labctl.cloud import server as servers
from labctl.cloud import volume as volumes
from labctl.context import Context
from labctl.errors import CloudRefused, ConfigError, HostUnreachable, SafetyStop
from labctl.models import Server, Volume


@dataclass(frozen=True)
class Listed:
    """A volume of the project. `lab`: the one that lab.yaml names; `made_for`: the lab that labctl made it for."""

    name: str
    id: str
    size_gib: int
    status: str
    attached_to: str
    lab: bool
    made_for: str


def overview(ctx: Context) -> list[Listed]:
    """All volumes of the project, the lab's own first. Two requests."""
    found, names = volumes.list_volumes(ctx.cloud), servers.names(ctx.cloud)
    rows = [
        Listed(
            name=v.name,
            id=v.id,
            size_gib=v.size_gib,
            status=v.status,
            attached_to=names.get(v.attached_to or "", v.attached_to or ""),
            lab=v.name == ctx.lab.volume_name,
            made_for=v.metadata.get(META_LAB, ""),
        )
        for v in found
    ]
    return sorted(rows, key=lambda row: (not row.lab, row.made_for != ctx.lab.lab, row.name))


def named(ctx: Context, name: str) -> Volume:
    """The volume of that name or id. Raises CloudRefused where there is none."""
    by_id = re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", name)
    found = volumes.get(ctx.cloud, name) if by_id else volumes.find(ctx.cloud, name, lab=ctx.lab.lab)
    if found is None:
        raise CloudRefused(f"There is no volume {name}.", next_step="labctl volume list")
    return found


def is_labs(ctx: Context, volume: Volume) -> bool:
    """Whether it is the volume that lab.yaml names."""
    return volume.name == ctx.lab.volume_name


def create(ctx: Context, name: str, size_gib: int) -> Volume:
    """A new, empty volume of `size_gib` GiB; one that labctl made for this lab with that size is taken for it."""
    found = volumes.find(ctx.cloud, name)
    if found is None:
        with ctx.progress.step(f"volume {name}") as step:
            metadata = {META_LAB: ctx.lab.lab}
            return volumes.create(ctx.cloud, name, size_gib, metadata=metadata, tell=step.tell)
    if found.metadata.get(META_LAB) != ctx.lab.lab or found.size_gib != size_gib:
        raise ConfigError(
            f"There is a volume {name} already.",
            expected=f"none, or one of {size_gib} GiB made for the lab {ctx.lab.lab}",
            found=f"{found.id}, {found.size_gib} GiB, made for {found.metadata.get(META_LAB) or 'nobody'}",
            next_step=f"another name, or labctl volume extend {name} SIZE",
        )
    ctx.progress.note(f"Volume {name} is there already.")
    return volumes.settled(ctx.cloud, found.id, ctx.progress.tell)


def attach(ctx: Context, name: str) -> Volume:
    """Attach a volume to the lab's server; one that another server has is refused. Mounts nothing."""
    server, volume = lifecycle.existing_server(ctx), named(ctx, name)
    if is_labs(ctx, volume):
        return lifecycle.attach(ctx, server, volume)
    with ctx.progress.step(f"attach {volume.name}") as step:
        return volumes.attach(ctx.cloud, server, volume, step.tell)


def detach(ctx: Context, name: str) -> Volume:
    """Detach a volume from the lab's server, drained first; from under a mounted filesystem never."""
    volume = volumes.settled(ctx.cloud, named(ctx, name).id, ctx.progress.tell)
    if volume.attached_to is None:
        ctx.progress.note(f"Volume {volume.name} is attached to no server.")
        return volume
    server = servers.find(ctx.cloud, ctx.lab.server_name, ctx.progress.tell, lab=ctx.lab.lab)
    if server is None or volume.attached_to != server.id:
        raise CloudRefused(
            f"volume {volume.name} is attached to a server that isn't this lab's",
            expected=f"attached to {ctx.lab.server_name}",
            found=f"{servers.names(ctx.cloud).get(volume.attached_to, '')} ({volume.attached_to})",
            next_step="detach it in that server's lab",
        )
    if server.status != "SHUTOFF":
        release(ctx, server, volume)
    with ctx.progress.step(f"detach {volume.name}") as step:
        return volumes.detach(ctx.cloud, server.id, volume, step.tell)


def release(ctx: Context, server: Server, volume: Volume) -> None:
    """Have nothing of a volume mounted on the server. Raises where that isn't so, or can't be known."""
    place = ctx.lab.volume.mount_point
    drained = True
    if is_labs(ctx, volume) or place in mounted_at(ctx, server, volume):
        drained = lifecycle.drain_host(ctx, server, force=False, volume=volume)
    where = mounted_at(ctx, server, volume) if drained else []
    if where or not drained:
        raise SafetyStop(
            f"volume {volume.name} isn't detached: "
            + (f"it is mounted at {', '.join(where)}" if where else "nobody knows whether it is mounted"),
            expected="nothing of it mounted",
            found=f"server {server.name}, {server.status}",
            next_step="umount it there, then the same again; for a server that can't be reached: labctl down --force",
        )


def mounted_at(ctx: Context, server: Server, volume: Volume) -> list[str]:
    """Where the server has the volume mounted. Raises HostUnreachable."""
    script = Path(__file__).with_name("host_mounts.py")
    return [str(place) for place in ssh.run_python(ctx.login(server), script, volume.id)]


def extend(ctx: Context, name: str, size_gib: int) -> tuple[Volume, Outcome | None]:
    """Make a volume `size_gib` GiB large, in the cloud and, where it is the lab's, on the host as well.

    Run again it continues: what is large enough already is left as it is. The outcome is None where no host was asked.
    """
    volume = volumes.settled(ctx.cloud, named(ctx, name or ctx.lab.volume_name).id, ctx.progress.tell)
    if size_gib < volume.size_gib:
        raise ConfigError(
            f"Volume {volume.name} can't be made smaller.",
            expected=f"at least {volume.size_gib} GiB, which it has",
            found=f"{size_gib} GiB",
            next_step="labctl volume list; for less space, back up and restore into a new volume",
        )
    with ctx.progress.step(f"extend {volume.name}") as step:
        grown = volumes.extend(ctx.cloud, volume, size_gib, step.tell)
        step.result(f"{volume.size_gib} → {grown.size_gib} GiB" if volume.size_gib != grown.size_gib else "has it")
    server = servers.find(ctx.cloud, ctx.lab.server_name, ctx.progress.tell, lab=ctx.lab.lab)
    if not is_labs(ctx, grown):
        return grown, None
    if server is None or grown.attached_to != server.id or server.status != "ACTIVE":
        ctx.progress.note(
            f"No running server has it: run this again after labctl up, which mounts {grown.name} as it is."
        )
        return grown, None
    return grown, _grow(ctx, server, grown)


def _grow(ctx: Context, server: Server, volume: Volume) -> Outcome:
    """Grow partition and filesystem on the host, with the services running wherever the host's kernel allows it.

    Where it doesn't, the server is tagged until they run again: a run that is cut off between must be finished.
    """
    stopped = server.metadata.get(META_EXTEND) == UNFINISHED
    only = () if stopped else ("block_volume",)
    try:
        outcome = lifecycle.converge_host(ctx, server, volume, only=only, never_format=True, grow=True)
    except ansible.UnmountNeeded as refused:
        ctx.progress.note(f"{refused.what}: the services stop for a moment.")
        servers.set_metadata(ctx.cloud, server.id, **{META_EXTEND: UNFINISHED})
        stopped = True
        if not lifecycle.drain_host(ctx, server, force=False):
            raise HostUnreachable(f"{server.name} couldn't be drained.", next_step="labctl status") from None
        outcome = lifecycle.converge_host(ctx, server, volume, never_format=True, grow=True)
    if stopped:
        servers.set_metadata(ctx.cloud, server.id, **{META_EXTEND: FINISHED})
    return outcome


def doomed(ctx: Context, name: str) -> Volume:
    """The volume to delete. Raises CloudRefused for one that a server has."""
    volume = named(ctx, name)
    if volume.attached_to:
        raise CloudRefused(
            f"volume {volume.name} is attached and was not deleted",
            expected="a volume that no server has",
            found=f"{volume.status}, server {servers.names(ctx.cloud).get(volume.attached_to, volume.attached_to)}",
            next_step=f"labctl volume detach {volume.name}",
        )
    return volume


def delete(ctx: Context, volume: Volume) -> None:
    """Delete a volume with its data."""
    with ctx.progress.step(f"delete volume {volume.name}") as step:
        volumes.delete(ctx.cloud, volume, step.tell)
