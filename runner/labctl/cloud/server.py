"""Servers: find, create, wait, tag, delete."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from labctl.cloud import META_LAB
from labctl.cloud.refusals import refusals, status_of
from labctl.cloud.session import Cloud
from labctl.cloud.wait import wait_gone, wait_until
from labctl.errors import CloudRefused
from labctl.models import Server, Tell

#: Seconds until ACTIVE. A KVM server takes 20 to 60 s, one whose image isn't on the hypervisor yet several minutes.
ACTIVE_TIMEOUT = 600
#: Seconds until a deleted server is gone. Usually 5 s; a hypervisor under load took minutes.
DELETE_TIMEOUT = 300
#: What an id of OpenStack looks like.
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
#: How often a deletion that ends in ERROR is asked for.
DELETE_TRIES = 3
#: Nova goes on saying ACTIVE of a server that it deletes and SHUTOFF of one that it starts: the task says more.
_BUSY_WITH = {"deleting": "DELETING", "powering-on": "STARTING"}
#: States in which Nova still shows a server that is no more.
GONE = frozenset({"DELETED", "SOFT_DELETED"})
#: Seconds until Nova's record shows an address that Neutron has associated (1 to 2 s seen).
ADDRESS_TIMEOUT = 60


def find(cloud: Cloud, name: str, tell: Tell | None = None, *, lab: str = "") -> Server | None:
    """The server of that name, or None; of several, the one that is tagged as the lab's. One request.

    One that is being deleted has the status DELETING; with `tell` it is waited for until it is gone, so that a new
    one can have its address and volume. Raises CloudRefused when the project has several of that name: names aren't
    unique, and guessing one could cost data.
    """
    with refusals(f"look for server {name}"):
        listed = cloud.compute.compute.servers(details=True, name=f"^{name}$")
        # A server is listed for a moment after its deletion.
        found = [s for s in listed if s.name == name and s.status not in GONE]
    if tell is not None:
        for deleting in [s for s in found if s.task_state == "deleting"]:
            _wait_gone(cloud, str(deleting.id), tell, DELETE_TIMEOUT)
            found.remove(deleting)
    if lab and len(found) > 1:
        found = [s for s in found if (s.metadata or {}).get(META_LAB) == lab] or found
    if len(found) > 1:
        raise CloudRefused(
            f"there are {len(found)} servers called {name}",
            expected="one",
            found="; ".join(f"{s.id} ({s.status}, made {s.created_at})" for s in found),
            next_step="labctl adopt --server ID tells which is the lab's; or openstack server set --name NEW ID",
        )
    return record(found[0]) if found else None


def called(cloud: Cloud, name_or_id: str) -> list[Server]:
    """Every server of that name, or the one of that id. One request, or two."""
    with refusals(f"look for server {name_or_id}"):
        listed = cloud.compute.compute.servers(details=True, name=f"^{re.escape(name_or_id)}$")
        found = [record(s) for s in listed if s.name == name_or_id and s.status not in GONE]
    by_id = None if found or not UUID.fullmatch(name_or_id) else get(cloud, name_or_id)
    return [by_id] if by_id else found


def list_servers(cloud: Cloud) -> list[Server]:
    """All servers of the project. One request a page."""
    with refusals("list the servers"):
        return [record(s) for s in cloud.compute.compute.servers(details=True) if s.status not in GONE]


def image_name(cloud: Cloud, image_id: str) -> str:
    """The name of an image, "" for one that was deleted since. One request."""
    with refusals(f"read image {image_id}"):
        try:
            return str(cloud.compute.image.get_image(image_id).name)
        except Exception as error:
            if status_of(error) in (403, 404):
                return ""
            raise


def names(cloud: Cloud) -> dict[str, str]:
    """Names of the project's servers by id. One request."""
    with refusals("list the servers"):
        return {str(s.id): str(s.name) for s in cloud.compute.compute.servers(details=False)}


def get(cloud: Cloud, server_id: str) -> Server | None:
    """The server with that id, or None. One request."""
    with refusals(f"read server {server_id}"):
        try:
            server = record(cloud.compute.compute.get_server(server_id))
            return None if server.status in GONE else server
        except Exception as error:
            if status_of(error) == 404:
                return None
            raise


def record(server: Any) -> Server:
    """labctl's record of an openstacksdk server."""
    addresses = [entry for network in (server.addresses or {}).values() for entry in network]

    def address(kind: str) -> str | None:
        return next(
            (str(e["addr"]) for e in addresses if e.get("OS-EXT-IPS:type") == kind and e.get("version", 4) == 4), None
        )

    fault = getattr(server, "fault", None) or {}
    return Server(
        id=str(server.id),
        name=str(server.name),
        status=_BUSY_WITH.get(str(server.task_state), str(server.status)),
        address=address("floating"),
        fixed_address=address("fixed"),
        key_name=server.key_name,
        metadata={str(k): str(v) for k, v in (server.metadata or {}).items()},
        fault=" ".join(str(fault.get(k) or "") for k in ("code", "message")).strip(),
        flavor=_flavor_name(server),
        ran=server.launched_at is not None,
        zone=str(server.availability_zone or ""),
        user_id=str(server.user_id or ""),
        image_id=str((server.image or {}).get("id") or "") or None,
        created=str(server.created_at or ""),
    )


def _flavor_name(server: Any) -> str:
    """The name of a server's flavor; older APIs give only its id."""
    flavor = server.flavor or {}
    return str(flavor.get("original_name") or flavor.get("name") or flavor.get("id") or "")


def count_of_flavor(cloud: Cloud, flavor_id: str) -> int:
    """How many servers of the project have that flavor, without those that are no more. One request."""
    with refusals(f"count the servers of flavor {flavor_id}"):
        listed = list(cloud.compute.compute.servers(details=True, flavor=flavor_id))
    return len([one for one in listed if one.status not in GONE and one.task_state != "deleting"])


def create(
    cloud: Cloud,
    name: str,
    *,
    image: str,
    flavor: str,
    network: str,
    key_name: str,
    groups: Sequence[str],
    metadata: dict[str, str],
    zone: str | None = None,
    user_data: str | None = None,
) -> Server:
    """Asks for a new server and reads it back by its id; it is BUILD then. `groups` are security group ids or names.

    `zone`: the availability zone, where the cloud's choice won't do.

    Does not look for an existing one of that name: `find` does. Raises CloudRefused listing what there is when
    image, flavor or network don't exist, and with the quota's words when it is used up.
    """
    image_id, wanted_flavor, network_id = _image(cloud, image), flavor_id(cloud, flavor), network_of(cloud, network)
    request: dict[str, Any] = {
        "name": name,
        "image_id": image_id,
        "flavor_id": wanted_flavor,
        "networks": [{"uuid": network_id}],
        "key_name": key_name,
        "security_groups": [{"name": group} for group in groups],
        "metadata": metadata,
    }
    if zone is not None:
        request["availability_zone"] = zone
    if user_data is not None:
        import base64

        request["user_data"] = base64.b64encode(user_data.encode()).decode()
    with refusals(f"create server {name} ({flavor}, {image})"):
        made = cloud.compute.compute.create_server(**request)
        return record(cloud.compute.compute.get_server(made.id))


def check_choices(cloud: Cloud, image: str, flavor: str, network: str) -> None:
    """Raises CloudRefused, listing what there is, unless a server could be made of these. Three requests."""
    _image(cloud, image)
    flavor_id(cloud, flavor)
    network_of(cloud, network)


def _image(cloud: Cloud, wanted: str) -> str:
    with refusals(f"look for image {wanted}"):
        found = [i for i in cloud.compute.image.images(name=wanted) if i.name == wanted]
        if not found:
            everything = list(cloud.compute.image.images())
            found = [i for i in everything if i.id == wanted]
    if not found:
        raise _absent("image", wanted, [str(i.name) for i in everything if i.status == "active"])
    active = [i for i in found if i.status == "active"]
    if len(active) != 1:
        raise CloudRefused(
            f"image {wanted} is not one usable image",
            expected="exactly one that is active",
            found="; ".join(f"{i.id} ({i.status}, {i.visibility}, made {i.created_at})" for i in found),
            next_step="give the image's id instead of its name in lab.yaml",
        )
    return str(active[0].id)


def flavor_id(cloud: Cloud, wanted: str) -> str:
    """The id of the flavor with that name (or id). Raises CloudRefused listing what there is."""
    with refusals(f"look for flavor {wanted}"):
        flavors = list(cloud.compute.compute.flavors(details=False))
    for flavor in flavors:
        if wanted in (flavor.name, flavor.id):
            return str(flavor.id)
    raise _absent("flavor", wanted, [str(f.name) for f in flavors])


def network_of(cloud: Cloud, wanted: str) -> str:
    """The id of the network with that name (or id). Raises CloudRefused listing what there is."""
    with refusals(f"look for network {wanted}"):
        networks = list(cloud.compute.network.networks())
    found = [n for n in networks if wanted in (n.name, n.id)]
    if not found:
        raise _absent("network", wanted, [str(n.name) for n in networks])
    if len(found) > 1:
        raise CloudRefused(
            f"there are {len(found)} networks called {wanted}",
            expected="one",
            found="; ".join(str(n.id) for n in found),
            next_step="give the network's id instead of its name in lab.yaml",
        )
    return str(found[0].id)


def _absent(kind: str, wanted: str, names: list[str]) -> CloudRefused:
    shown = sorted(set(names), key=lambda n: (not n.startswith("CC-"), n))
    more = f" and {len(shown) - 40} more" if len(shown) > 40 else ""
    return CloudRefused(
        f"there is no {kind} {wanted}",
        expected=f"one of: {', '.join(shown[:40])}{more}" if shown else f"at least one {kind} in the project",
        found=wanted,
        source="lab.yaml",
        next_step=f"set another {kind} in lab.yaml",
    )


def _undeletable(server: Server) -> CloudRefused:
    return CloudRefused(
        f"server {server.name} can't be deleted",
        expected="gone",
        found=f"ERROR after {DELETE_TRIES} tries: {server.fault}",
        next_step=f"ask the site's help desk to delete {server.id}, then run the same command again",
        detail=server.fault,
    )


def _in_error(server: Server) -> CloudRefused:
    """With what the cloud says; "No valid host" is the usual one, where the site is full or lacks such hosts."""
    advice = "labctl rebuild --force makes it anew; the volume and the container stay"
    if not server.ran:
        advice = "labctl up --retry makes it once more; if that fails, too: another flavor, later, or the help desk"
    return CloudRefused(
        f"server {server.name} is in ERROR" + ("" if server.ran else ": it never ran"),
        expected="ACTIVE",
        found=server.fault or "no reason given by the cloud",
        source=f"server {server.id}, flavor {server.flavor}",
        next_step=advice,
        detail=server.fault,
    )


def wait_active(cloud: Cloud, server_id: str, tell: Tell, timeout: float = ACTIVE_TIMEOUT) -> Server:
    """Waits until the server is ACTIVE. A stopped or paused one is refused at once, with what to run.

    Raises CloudRefused with the fault's text on ERROR, when it vanishes, and after `timeout` seconds.
    """
    seen: list[Server] = []

    def look() -> tuple[Server | None, str]:
        server = get(cloud, server_id)
        if server is None:
            raise CloudRefused(
                f"server {server_id} vanished while it was waited for", next_step="run the same command again"
            )
        seen[:] = [server]
        if server.status == "ERROR":
            raise _in_error(server)
        if server.status in _START_WITH:
            raise CloudRefused(
                f"server {server.name} is {server.status}",
                expected="ACTIVE",
                found=server.status,
                next_step=f"openstack server {_START_WITH[server.status]} {server.id}, then run the same command again",
            )
        return (server if server.status == "ACTIVE" else None), f"server {server.name} is {server.status}"

    server, _, passed = wait_until(look, tell, timeout)
    if server is None:
        raise CloudRefused(
            f"server {seen[0].name} is still {seen[0].status} after {passed:.0f} s",
            expected=f"ACTIVE within {timeout:.0f} s",
            found=seen[0].status,
            next_step="run the same command again to go on waiting, or labctl down",
        )
    return server


_START_WITH = {
    "SHUTOFF": "start",
    "PAUSED": "unpause",
    "SUSPENDED": "resume",
    "SHELVED": "unshelve",
    "SHELVED_OFFLOADED": "unshelve",
    "RESCUE": "unrescue",
}


def start(cloud: Cloud, server_id: str) -> None:
    """Starts a server that is SHUTOFF (`wait_active` waits for it); nothing happens to one that runs."""
    with refusals(f"start server {server_id}"):
        try:
            cloud.compute.compute.start_server(server_id)
        except Exception as error:
            if status_of(error) != 409:
                raise


def wait_address(cloud: Cloud, server_id: str, tell: Tell, timeout: float = ADDRESS_TIMEOUT) -> Server:
    """Waits until the server's record shows its floating IP. Raises CloudRefused after `timeout` seconds."""

    def look() -> tuple[Server | None, str]:
        server = get(cloud, server_id)
        return (server if server and server.address else None), "the server's record has no floating IP yet"

    server, seen, passed = wait_until(look, tell, timeout)
    if server is None:
        raise CloudRefused(
            f"{seen} after {passed:.0f} s",
            expected="the associated address",
            found="none",
            next_step="run the same command again; if it stays so: openstack server show " + server_id,
        )
    return server


def set_metadata(cloud: Cloud, server_id: str, **metadata: str) -> None:
    """Adds or replaces metadata items; others stay. At most 255 characters a value."""
    with refusals(f"tag server {server_id}"):
        cloud.compute.compute.set_server_metadata(server_id, **metadata)


def delete(cloud: Cloud, server_id: str, tell: Tell, *, wait: bool = True, timeout: float = DELETE_TIMEOUT) -> bool:
    """Deletes the server, waits until it is gone; its volumes and floating IP stay. False when there was none."""
    with refusals(f"delete server {server_id}"):
        try:
            cloud.compute.compute.delete_server(server_id, ignore_missing=False)
        except Exception as error:
            if status_of(error) == 404:
                return False
            raise

    if wait:
        _wait_gone(cloud, server_id, tell, timeout)
    return True


def _wait_gone(cloud: Cloud, server_id: str, tell: Tell, timeout: float) -> None:
    tries = 1

    def look() -> str:
        nonlocal tries
        server = get(cloud, server_id)
        if server is None:
            return ""
        if server.status == "ERROR":
            # A deletion that failed half-way (Nova's database was busy, seen) leaves ERROR; asking again finishes it.
            if tries == DELETE_TRIES:
                raise _undeletable(server)
            tries += 1
            with refusals(f"delete server {server.name}"):
                cloud.compute.compute.delete_server(server_id, ignore_missing=True)
        return f"server {server.name} is being deleted"

    wait_gone(look, tell, timeout)
