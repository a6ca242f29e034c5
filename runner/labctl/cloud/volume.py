"""Block volumes: find, create, attach, detach, delete. A volume's data is never touched, its state always respected."""

from __future__ import annotations

from typing import Any

from labctl.cloud.refusals import refusals, status_of, words_of
from labctl.cloud.session import Cloud
from labctl.cloud.wait import wait_until
from labctl.errors import CloudRefused
from labctl.models import Server, Tell, Volume

#: Seconds for creating, attaching, detaching and deleting. Seconds usually; a Ceph back end under load takes a minute.
STATUS_TIMEOUT = 180

#: States that pass by themselves.
PASSING = frozenset({"creating", "attaching", "detaching", "reserved", "downloading", "extending", "deleting"})


#: What Nova's 400 says when trying again in a second helps.
_RACES = ("status must be", "already attached to instances")


def find(cloud: Cloud, name: str) -> Volume | None:
    """The volume of that name, or None. One request. Raises CloudRefused listing the ids when there are several."""
    with refusals(f"look for volume {name}"):
        found = [v for v in cloud.compute.block_storage.volumes(details=True, name=name) if v.name == name]
    if len(found) > 1:
        raise CloudRefused(
            f"there are {len(found)} volumes called {name}",
            expected="one",
            found="; ".join(f"{v.id} ({v.size} GiB, {v.status}, made {v.created_at})" for v in found),
            next_step="rename the others: openstack volume set --name NEW ID",
        )
    return record(found[0]) if found else None


def list_volumes(cloud: Cloud) -> list[Volume]:
    """All volumes of the project."""
    with refusals("list the volumes"):
        return [record(v) for v in cloud.compute.block_storage.volumes(details=True)]


def get(cloud: Cloud, volume_id: str) -> Volume | None:
    """The volume with that id, or None. One request."""
    with refusals(f"read volume {volume_id}"):
        try:
            return record(cloud.compute.block_storage.get_volume(volume_id))
        except Exception as error:
            if status_of(error) == 404:
                return None
            raise


def record(volume: Any) -> Volume:
    """labctl's record of an openstacksdk volume."""
    attachment: dict[str, Any] = next(iter(volume.attachments or []), {})
    return Volume(
        id=str(volume.id),
        name=str(volume.name or ""),
        size_gib=int(volume.size),
        status=str(volume.status),
        attached_to=attachment.get("server_id"),
        device=attachment.get("device"),
        metadata={str(k): str(v) for k, v in (volume.metadata or {}).items()},
    )


def size_note(volume: Volume, wanted_gib: int) -> str:
    """A sentence when an existing volume has another size than lab.yaml asks for, else "". Sizes in GiB."""
    if volume.size_gib == wanted_gib:
        return ""
    if volume.size_gib > wanted_gib:
        return f"volume {volume.name} has {volume.size_gib} GiB, lab.yaml asks for {wanted_gib}: volumes never shrink"
    return (
        f"volume {volume.name} has {volume.size_gib} GiB, lab.yaml asks for {wanted_gib}: kept as it is; "
        f"to grow it: labctl volume extend {volume.name} {wanted_gib}"
    )


def create(
    cloud: Cloud, name: str, size_gib: int, *, metadata: dict[str, str], tell: Tell, timeout: float = STATUS_TIMEOUT
) -> Volume:
    """Makes a volume of `size_gib` GiB (of the site's `volume_type`, if set) and waits for `available`.

    Doesn't look for an existing one: `find` does. Raises CloudRefused with the quota's words, or the state's.
    """
    request: dict[str, Any] = {"name": name, "size": size_gib, "metadata": metadata}
    if cloud.site.volume_type:
        request["volume_type"] = cloud.site.volume_type
    with refusals(f"create volume {name} of {size_gib} GiB"):
        made = cloud.compute.block_storage.create_volume(**request)
    return wait_status(cloud, str(made.id), "available", tell, timeout)


def set_metadata(cloud: Cloud, volume_id: str, **metadata: str) -> None:
    """Adds or replaces metadata items; others stay."""
    with refusals(f"tag volume {volume_id}"):
        cloud.compute.block_storage.set_volume_metadata(volume_id, **metadata)


def wait_status(cloud: Cloud, volume_id: str, wanted: str, tell: Tell, timeout: float = STATUS_TIMEOUT) -> Volume:
    """Waits for the status `wanted`. Raises CloudRefused on an error state and after `timeout` seconds."""
    seen: list[Volume] = []

    def look() -> tuple[Volume | None, str]:
        volume = get(cloud, volume_id)
        if volume is None:
            raise CloudRefused(
                f"volume {volume_id} vanished while it was waited for", next_step="openstack volume list"
            )
        seen[:] = [volume]
        if volume.status.startswith("error"):
            raise _in_error(volume)
        return (volume if volume.status == wanted else None), f"volume {volume.name} is {volume.status}"

    volume, _, _ = wait_until(look, tell, timeout)
    if volume is None:
        raise _stuck(seen[0], wanted, timeout)
    return volume


def attach(cloud: Cloud, server: Server, volume: Volume, tell: Tell, timeout: float = STATUS_TIMEOUT) -> Volume:
    """Attaches the volume and waits for `in-use` by this server; nothing to do when it is already.

    A passing state (still detaching from a deleted server, say) is waited for. Raises CloudRefused when another
    server has it, when it is in an error state, and after `timeout` seconds.
    """
    asked: list[bool] = []

    def look() -> tuple[Volume | None, str]:
        now = get(cloud, volume.id)
        if now is None:
            raise CloudRefused(f"volume {volume.name} ({volume.id}) is gone", next_step="openstack volume list")
        said = f"attaching volume {now.name}: it is {now.status}"
        if now.status.startswith("error"):
            raise _in_error(now)
        if now.status == "in-use" and now.attached_to == server.id:
            return now, said
        if now.status == "in-use":
            refuse_if_used(cloud, now, server)
        elif now.status == "available":
            refused = _request_attachment(cloud, server, volume)
            asked.append(True)
            said = f"{said}; the cloud says: {refused}" if refused else said
        elif now.status not in PASSING:
            raise _stuck(now, "available", 0)
        return None, said

    attached, seen, _ = wait_until(look, tell, timeout)
    if attached is None:
        now = get(cloud, volume.id) or volume
        raise _stuck(now, "in-use", timeout, said=seen)
    return attached


def _request_attachment(cloud: Cloud, server: Server, volume: Volume) -> str:
    """Asks Nova to attach. Returns why it can't right now, "" when it accepts; a refusal for good raises."""
    with refusals(f"attach volume {volume.name} to server {server.name}"):
        try:
            cloud.compute.compute.create_volume_attachment(server.id, volume=volume.id)
        except Exception as error:
            # 409: the server is busy with another task. 400: the volume's state changed since it was read, or
            # Cinder calls it available while Nova still tidies up the last attachment (both seen).
            said = words_of(error)
            if status_of(error) == 409 or (status_of(error) == 400 and any(text in said for text in _RACES)):
                return said
            raise
    return ""


def refuse_if_used(cloud: Cloud, volume: Volume, server: Server | None) -> None:
    """Raises when a server other than this one has the volume; one that is gone or being deleted is no reason to.

    No request for a volume that nobody has, or this server.
    """
    from labctl.cloud import server as servers

    if volume.attached_to is None or (server is not None and volume.attached_to == server.id):
        return
    other = servers.get(cloud, volume.attached_to)
    if other is None or other.status == "DELETING":
        return
    raise CloudRefused(
        f"volume {volume.name} is in use by another server",
        expected="a volume that no server has",
        found=f"attached to {other.name} ({other.id}, {other.status})",
        next_step=f"labctl volume detach {volume.name} (or labctl down in that server's lab), then the same again",
    )


def detach(cloud: Cloud, server_id: str, volume: Volume, tell: Tell, timeout: float = STATUS_TIMEOUT) -> Volume:
    """Detaches the volume from the server and waits for `available`; nothing to do when it is. Unmount first.

    Raises CloudRefused when another server has it, on an error state, and after `timeout` seconds.
    """

    def look() -> tuple[Volume | None, str]:
        now = get(cloud, volume.id)
        if now is None:
            raise CloudRefused(f"volume {volume.name} ({volume.id}) is gone", next_step="openstack volume list")
        if now.status.startswith("error"):
            raise _in_error(now)
        if now.status == "in-use" and now.attached_to and now.attached_to != server_id:
            raise CloudRefused(
                f"volume {now.name} is attached to another server",
                expected=f"attached to {server_id}, or to none",
                found=now.attached_to,
                next_step="detach it in the lab of that server, or: openstack server remove volume SERVER VOLUME",
            )
        said = f"detaching volume {now.name}: it is {now.status}"
        if now.status == "in-use":
            refused = _request_detachment(cloud, server_id, volume)
            said = f"{said}; the cloud says: {refused}" if refused else said
        return (now if now.status == "available" else None), said

    detached, seen, _ = wait_until(look, tell, timeout)
    if detached is None:
        raise _stuck(get(cloud, volume.id) or volume, "available", timeout, said=seen)
    return detached


def _request_detachment(cloud: Cloud, server_id: str, volume: Volume) -> str:
    with refusals(f"detach volume {volume.name}"):
        try:
            cloud.compute.compute.delete_volume_attachment(server_id, volume.id, ignore_missing=True)
        except Exception as error:
            if status_of(error) in (400, 409):
                return words_of(error)
            raise
    return ""


def delete(cloud: Cloud, volume: Volume, tell: Tell, timeout: float = STATUS_TIMEOUT) -> bool:
    """Deletes the volume and its data, and waits until it is gone; False when it was gone already.

    Raises CloudRefused when a server has it.
    """
    now = get(cloud, volume.id)
    if now is None:
        return False
    if now.attached_to or now.status == "in-use":
        raise CloudRefused(
            f"volume {now.name} is attached and was not deleted",
            expected="a volume that no server has",
            found=f"{now.status} by server {now.attached_to}",
            next_step="labctl drain, then labctl volume detach",
        )
    with refusals(f"delete volume {now.name}"):
        cloud.compute.block_storage.delete_volume(now.id, ignore_missing=True)

    def look() -> tuple[bool | None, str]:
        left = get(cloud, volume.id)
        if left is not None and left.status.startswith("error"):
            raise _in_error(left)
        return (True if left is None else None), f"volume {volume.name} is being deleted"

    gone, seen, passed = wait_until(look, tell, timeout)
    if not gone:
        raise CloudRefused(f"{seen}, and not gone after {passed:.0f} s", next_step="run the same command again")
    return True


def _in_error(volume: Volume) -> CloudRefused:
    return CloudRefused(
        f"volume {volume.name} is in state {volume.status}",
        expected="available or in-use",
        found=f"{volume.status} ({volume.id})",
        next_step="ask the site's help desk to reset its state; labctl never does, the data could be half-written",
    )


def _stuck(volume: Volume, wanted: str, waited: float, said: str = "") -> CloudRefused:
    advice = {
        "detaching": "a detach hangs: unmount it on the old server or delete that server; else the site's help desk",
        "reserved": "an attachment was begun and not finished: openstack volume attachment list, or the help desk",
        "in-use": "detach it from its server first",
    }
    after = f" after {waited:.0f} s" if waited else ""
    return CloudRefused(
        f"volume {volume.name} is {volume.status}{after}",
        expected=wanted,
        found=f"{volume.status} ({volume.id})" + (f", {said}" if said else ""),
        next_step=advice.get(volume.status, "run the same command again, or look: openstack volume show " + volume.id),
    )
