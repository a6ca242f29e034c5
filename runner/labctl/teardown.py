"""The end of a lab: what `destroy` would delete, named with sizes and counts, and the deletion of just that.

Only what carries the lab's tag or mark is the lab's; what is gone already is no error, so that a half-built or
half-deleted lab goes the same way.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from labctl import leases, lifecycle, ssh, store_access
from labctl.cloud import credential as credentials
from labctl.cloud import keypair as keypairs
from labctl.cloud import network as networks
from labctl.cloud import ownership
from labctl.cloud import server as servers
from labctl.cloud import store as stores
from labctl.cloud import volume as volumes
from labctl.context import Context
from labctl.models import Container, Volume

#: What `destroy --keep` may name.
VOLUME, CONTAINER = "volume", "container"
KEEPABLE = (VOLUME, CONTAINER)


@dataclass(frozen=True)
class Possessions:
    """What `destroy` would delete, and what stays though it has one of the lab's names; in words."""

    lines: tuple[str, ...]
    stays: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.lines)


def possessions(ctx: Context, keep: Collection[str] = ()) -> Possessions:
    """Everything that `destroy` would delete. Raises CloudRefused where it would have to touch somebody else's."""
    lab, cloud, lines, stays = ctx.lab, ctx.cloud, [], []
    server = lifecycle.find_server(ctx)
    if server is not None:
        ownership.refuse_untagged(server, lab.lab)
        lines.append(f"server {server.name} ({server.id}, {server.status}, {server.address or 'no address'})")
    lines += leases.possessions(ctx)
    lines += [f"floating IP {ip.floating_ip_address}" for ip in networks.floating_ips(cloud, lab.lab)]
    if volume := lifecycle.find_volume(ctx):
        text = f"volume {volume.name} ({volume.id}, {volume.size_gib} GiB)"
        if reason := _stays(ctx, volume, keep, VOLUME):
            stays.append(f"{text}: {reason}")
        else:
            # before anything is deleted: one that another server has can't be
            volumes.refuse_if_used(cloud, volume, server)
            lines.append(f"{text} with all its data")
    for container in stores.with_segments(cloud, lab.container_name):
        text = f"container {container.name} ({container.objects} objects, {container.bytes / 1e6:.1f} MB)"
        if reason := _container_stays(ctx, keep):
            stays.append(f"{text}: {reason}")
        else:
            lines.append(f"{text} with all its data")
    lines += [f"application credential {one.name}" for one in credentials.list_ours(cloud, lab.lab)]
    if keys := store_access.s3_keys(ctx):
        lines.append(f"S3 keys {', '.join(keys)}")
    groups = networks.groups_made(cloud, [ctx.security_group.name])
    lines += [f"security group {group.name}, unless something else uses it" for group in groups]
    if ctx.ssh_key.exists() and (pair := keypairs.made(cloud, ssh.ensure_key(ctx.ssh_key), f"labctl-{lab.lab}")):
        lines.append(f"key pair {pair} (the key itself stays: {ctx.ssh_key})")
    return Possessions(tuple(lines), tuple(stays))


def destroy(ctx: Context, *, force: bool = False, keep: Collection[str] = ()) -> None:
    """Delete the lab with all its data: server, lease, address, volume, container, credential, group, key pair.

    `keep`: of KEEPABLE, what stays. A host whose volume is deleted anyway needn't be drained.
    """
    lab, cloud = ctx.lab, ctx.cloud
    doomed_volume = lifecycle.find_volume(ctx)
    if doomed_volume is not None and _stays(ctx, doomed_volume, keep, VOLUME):
        doomed_volume = None
    server = servers.find(cloud, lab.server_name, ctx.progress.tell, lab=lab.lab)
    lifecycle.down(ctx, force=force or doomed_volume is not None)
    if doomed_volume is not None:
        with ctx.progress.step(f"delete volume {doomed_volume.name}") as step:
            if server is not None and doomed_volume.attached_to == server.id:
                # Cinder hears of a server's end a moment later
                volumes.wait_status(cloud, doomed_volume.id, "available", step.tell)
            settled = volumes.settled(cloud, doomed_volume.id, step.tell, deletable=True)
            volumes.delete(cloud, settled, step.tell)
    if not _container_stays(ctx, keep):
        with ctx.progress.step(f"delete container {lab.container_name}") as step:
            deleted = stores.delete_container(cloud, lab.container_name, step.tell)
            step.result(f"{deleted} objects")
    with ctx.progress.step("security group and key pair"):
        networks.delete_groups(cloud, [ctx.security_group.name])
        if ctx.ssh_key.exists():
            keypairs.delete(cloud, ssh.ensure_key(ctx.ssh_key), f"labctl-{lab.lab}")


def _stays(ctx: Context, it: Volume | Container, keep: Collection[str], kind: str) -> str:
    """Why something isn't deleted, "" if it is."""
    if kind in keep:
        return f"--keep {kind}"
    return "" if ownership.tagged(it, ctx.lab.lab) else "not known to be this lab's (labctl adopt tells that it is)"


def _container_stays(ctx: Context, keep: Collection[str]) -> str:
    """The same for the container, and for those of its segments with it."""
    container = stores.stat(ctx.cloud, ctx.lab.container_name)
    if container is None:  # what is left of it are segments, which nothing else could use
        return f"--keep {CONTAINER}" if CONTAINER in keep else ""
    return _stays(ctx, container, keep, CONTAINER)
