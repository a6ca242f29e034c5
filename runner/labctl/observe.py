"""Asks the cloud and the host what is there, for `labctl status`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from labctl import host_probe, leases, ssh, store_access
from labctl.cloud import server as servers
from labctl.cloud import store as stores
from labctl.cloud import volume as volumes
from labctl.context import Context
from labctl.errors import ConvergeFailed, HostUnreachable
from labctl.status import ObjectStoreStatus, ServerStatus, Status, VolumeStatus


def status(ctx: Context) -> Status:
    """The lab as it is. A host that can't be asked leaves its part unknown and says why."""
    lab, cloud = ctx.lab, ctx.cloud
    server = servers.find(cloud, lab.server_name, lab=lab.lab)
    volume = volumes.find(cloud, lab.volume_name, lab=lab.lab)
    container = stores.stat(cloud, lab.container_name)
    lease = leases.of_server(cloud, server) if server else None
    found = Status(
        lab.lab,
        ctx.site.name,
        ServerStatus(
            lab.server_name, server.id, server.status, server.address, leases.iso(lease.ends) if lease else None
        )
        if server
        else ServerStatus(lab.server_name),
        VolumeStatus(lab.volume_name, volume.id, volume.size_gib, bool(server and volume.attached_to == server.id))
        if volume
        else VolumeStatus(lab.volume_name),
        ObjectStoreStatus(lab.container_name, objects=container.objects if container else None),
        credential=store_access.status_of(server),
    )
    if not server or server.status != "ACTIVE" or not server.address:
        return found
    try:
        host = ssh.run_python(
            ctx.login(server),
            Path(host_probe.__file__),
            lab.volume.mount_point,
            lab.object_store.mount_point,
        )
    except (HostUnreachable, ConvergeFailed) as error:
        return replace(found, host_error=f"{error.what} {error.found or error.detail}".strip())
    return found.with_host(host)
