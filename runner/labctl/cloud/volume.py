"""Block volumes: find, create, attach, extend, detach, delete. Data is never touched, a state always respected."""

from __future__ import annotations

import re
from typing import Any, NoReturn

from labctl.cloud import META_LAB
from labctl.cloud.refusals import refusals, status_of, words_of
from labctl.cloud.server import UUID
from labctl.cloud.session import Cloud
from labctl.cloud.wait import wait_gone, wait_until
from labctl.errors import CloudRefused
from labctl.models import Server, Tell, Volume

#: Seconds for creating, attaching, detaching and deleting. Seconds usually; a Ceph back end under load takes a minute.
STATUS_TIMEOUT = 180

#: States that pass by themselves.
PASSING = frozenset({"creating", "attaching", "detaching", "reserved", "downloading", "extending", "deleting"})


#: The API version from which Cinder extends a volume that is attached (3.42, OpenStack Pike).
ONLINE_EXTEND = "3.42"

#: The API version from which Cinder tells users why, by resource (3.5, OpenStack Newton), and the event that says that
#: the scheduler found no back end for a new volume: it was never anywhere, so nothing can be on it.
_MESSAGES = "3.5"
_NO_BACK_END = "VOLUME_VOLUME_001_"

#: The error states in which Cinder deletes a volume.
_DELETABLE = frozenset({"error", "error_extending", "error_restoring", "error_managing"})

#: What Nova's 400 says when trying again in a second helps.
_RACES = ("status must be", "already attached to instances")
#: What it says where the site attaches volumes to servers of their own availability zone only.
_ZONES = re.compile(r"not in the same availability.?zone", re.IGNORECASE)


def find(cloud: Cloud, name: str, *, lab: str = "") -> Volume | None:
    """The volume of that name, or None; of several, the one that is tagged as the lab's. One request.

    Raises CloudRefused listing the ids when there are several and none, or more than one, is the lab's.
    """
    with refusals(f"look for volume {name}"):
        found = [v for v in cloud.compute.block_storage.volumes(details=True, name=name) if v.name == name]
    if lab and len(found) > 1:
        found = [v for v in found if (v.metadata or {}).get(META_LAB) == lab] or found
    if len(found) > 1:
        raise CloudRefused(
            f"there are {len(found)} volumes called {name}",
            expected="one",
            found="; ".join(f"{v.id} ({v.size} GiB, {v.status}, made {v.created_at})" for v in found),
            next_step="labctl adopt --volume ID tells which is the lab's; or openstack volume set --name NEW ID",
        )
    return record(found[0]) if found else None


def called(cloud: Cloud, name_or_id: str) -> list[Volume]:
    """Every volume of that name, or the one of that id. One request, or two."""
    with refusals(f"look for volume {name_or_id}"):
        listed = cloud.compute.block_storage.volumes(details=True, name=name_or_id)
        found = [record(v) for v in listed if v.name == name_or_id]
    by_id = None if found or not UUID.fullmatch(name_or_id) else get(cloud, name_or_id)
    return [by_id] if by_id else found


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
        zone=str(volume.availability_zone or ""),
        user_id=str(volume.user_id or ""),
        created=str(volume.created_at or ""),
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

    Doesn't look for an existing one: `find` does. Raises CloudRefused with the quota's words, or the state's; where
    the cloud found no room for it, nothing of it stays.
    """
    request: dict[str, Any] = {"name": name, "size": size_gib, "metadata": metadata}
    if cloud.site.volume_type:
        request["volume_type"] = cloud.site.volume_type
    with refusals(f"create volume {name} of {size_gib} GiB"):
        made = cloud.compute.block_storage.create_volume(**request)
    try:
        return wait_status(cloud, str(made.id), "available", tell, timeout)
    except CloudRefused as refused:
        now = get(cloud, str(made.id))
        why = never_placed(cloud, now) if now else ""
        if now is None or not why:
            raise
        delete(cloud, now, tell)
        raise CloudRefused(
            f"the cloud found no room for volume {name}",
            expected=f"a new volume of {size_gib} GiB",
            found=f"{why} It was deleted again: there was never anything on it.",
            source=refused.source,
            next_step="the same command again in some minutes; else a smaller volume.size_gib, or the site's help desk",
        ) from refused


def never_placed(cloud: Cloud, volume: Volume) -> str:
    """What the cloud says where it found no back end for a new volume, on which there can be nothing; else "".

    One request for a volume in state error that no server has; none for another.
    """
    if volume.status != "error" or volume.attached_to:
        return ""
    query = {"resource_uuid": volume.id}
    answer = cloud.compute.block_storage.get("/messages", params=query, microversion=_MESSAGES)
    if answer.status_code != 200:  # before Newton there are no messages: the volume stays what it is, in error
        return ""
    for said in answer.json().get("messages", []):
        if said.get("resource_uuid") == volume.id and str(said.get("event_id", "")).startswith(_NO_BACK_END):
            return str(said.get("user_message") or "the cloud found no back end for it")
    return ""


def set_metadata(cloud: Cloud, volume_id: str, **metadata: str) -> None:
    """Adds or replaces metadata items; others stay."""
    with refusals(f"tag volume {volume_id}"):
        cloud.compute.block_storage.set_volume_metadata(volume_id, **metadata)


def wait_status(cloud: Cloud, volume_id: str, wanted: str, tell: Tell, timeout: float = STATUS_TIMEOUT) -> Volume:
    """Waits for the status `wanted`. Raises CloudRefused on an error state and after `timeout` seconds."""

    def look() -> tuple[Volume | None, str]:
        volume = _standing(cloud, volume_id)
        return (volume if volume.status == wanted else None), f"volume {volume.name} is {volume.status}"

    volume, _, _ = wait_until(look, tell, timeout)
    return volume or _raise_stuck(cloud, volume_id, wanted, timeout)


def settled(
    cloud: Cloud, volume_id: str, tell: Tell, timeout: float = STATUS_TIMEOUT, *, deletable: bool = False
) -> Volume:
    """Waits until the volume is in none of the states that pass by themselves.

    Raises CloudRefused on an error state; with `deletable`, only where Cinder would not even delete it.
    """

    def look() -> tuple[Volume | None, str]:
        volume = _standing(cloud, volume_id, _DELETABLE if deletable else frozenset())
        return (None if volume.status in PASSING else volume), f"volume {volume.name} is {volume.status}"

    volume, _, _ = wait_until(look, tell, timeout)
    return volume or _raise_stuck(cloud, volume_id, "available or in-use", timeout)


def _standing(cloud: Cloud, volume_id: str, accepted: frozenset[str] = frozenset()) -> Volume:
    """The volume as it is now. Raises CloudRefused when it is gone or in an error state that isn't accepted."""
    volume = get(cloud, volume_id)
    if volume is None:
        raise CloudRefused(f"volume {volume_id} is gone", next_step="openstack volume list")
    if volume.status.startswith("error") and volume.status not in accepted:
        raise _in_error(volume)
    return volume


def _raise_stuck(cloud: Cloud, volume_id: str, wanted: str, waited: float, said: str = "") -> NoReturn:
    raise _stuck(_standing(cloud, volume_id), wanted, waited, said)


def extend(cloud: Cloud, volume: Volume, size_gib: int, tell: Tell, timeout: float = STATUS_TIMEOUT) -> Volume:
    """Makes the volume `size_gib` GiB large, attached or not, and waits until it is; nothing to do when it is.

    What is on it doesn't change: the partition and the filesystem are grown on the host. Raises CloudRefused with
    the quota's words, when it is larger already, and where the cloud can't extend an attached volume.
    """
    now = settled(cloud, volume.id, tell, timeout)
    if now.size_gib == size_gib:
        return now
    if now.size_gib > size_gib:
        raise CloudRefused(f"volume {now.name} has {now.size_gib} GiB: volumes never shrink", found=f"{size_gib} asked")
    body = {"os-extend": {"new_size": size_gib}}
    advice = (
        "if it can't be extended while it is attached: labctl volume detach, extend, labctl up" if _used(now) else ""
    )
    with refusals(f"extend volume {now.name} from {now.size_gib} to {size_gib} GiB", next_step=advice):
        from openstack.exceptions import raise_from_response

        version = ONLINE_EXTEND if _used(now) else None
        raise_from_response(
            cloud.compute.block_storage.post(f"/volumes/{now.id}/action", json=body, microversion=version)
        )
    extended = settled(cloud, now.id, tell, timeout)
    if extended.size_gib != size_gib:
        raise CloudRefused(
            f"the cloud didn't extend volume {now.name}",
            expected=f"{size_gib} GiB",
            found=f"{extended.size_gib} GiB, {extended.status}",
            next_step="run the same command again; why: openstack volume message list",
        )
    return extended


def _used(volume: Volume) -> bool:
    return volume.status == "in-use" or volume.attached_to is not None


def attach(cloud: Cloud, server: Server, volume: Volume, tell: Tell, timeout: float = STATUS_TIMEOUT) -> Volume:
    """Attaches the volume and waits for `in-use` by this server; nothing to do when it is already.

    A passing state (still detaching from a deleted server, say) is waited for. Raises CloudRefused when another
    server has it, when it is in an error state, and after `timeout` seconds.
    """
    asked: list[bool] = []

    def look() -> tuple[Volume | None, str]:
        now = _standing(cloud, volume.id)
        said = f"attaching volume {now.name}: it is {now.status}"
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
    return attached or _raise_stuck(cloud, volume.id, "in-use", timeout, seen)


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
            if status_of(error) == 400 and _ZONES.search(said):
                raise _elsewhere(server, volume, said) from error
            raise
    return ""


def _elsewhere(server: Server, volume: Volume, said: str) -> CloudRefused:
    return CloudRefused(
        f"volume {volume.name} is in another availability zone than server {server.name}",
        expected=f"a server in the volume's zone, {volume.zone}",
        found=f"server {server.id} in {server.zone}",
        source=f"volume {volume.id}",
        next_step=f"set server.availability_zone: {volume.zone} in lab.yaml, then labctl rebuild",
        detail=said,
    )


def refuse_if_broken(volume: Volume) -> None:
    """Raises for a volume in an error state: before a server is made for it, or deleted. No request."""
    if volume.status.startswith("error"):
        raise _in_error(volume)


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
        source=f"volume {volume.id}",
        next_step=f"labctl volume detach {volume.name} (or labctl down in that server's lab), then the same again",
    )


def detach(cloud: Cloud, server_id: str, volume: Volume, tell: Tell, timeout: float = STATUS_TIMEOUT) -> Volume:
    """Detaches the volume from the server and waits for `available`; nothing to do when it is. Unmount first.

    Raises CloudRefused when another server has it, on an error state, and after `timeout` seconds.
    """

    def look() -> tuple[Volume | None, str]:
        now = _standing(cloud, volume.id)
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
    return detached or _raise_stuck(cloud, volume.id, "available", timeout, seen)


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
    if _used(now):
        raise CloudRefused(
            f"volume {now.name} is attached and was not deleted",
            expected="a volume that no server has",
            found=f"{now.status} by server {now.attached_to}",
            next_step="labctl drain, then labctl volume detach",
        )
    with refusals(f"delete volume {now.name}"):
        cloud.compute.block_storage.delete_volume(now.id, ignore_missing=True)

    def look() -> str:
        left = get(cloud, volume.id)
        if left is not None and left.status.startswith("error"):
            raise _in_error(left)
        return f"volume {volume.name} is being deleted" if left else ""

    wait_gone(look, tell, timeout)
    return True


def _in_error(volume: Volume) -> CloudRefused:
    return CloudRefused(
        f"volume {volume.name} is in state {volume.status}",
        expected="available or in-use",
        found=volume.status,
        source=f"volume {volume.id}",
        next_step="ask the site's help desk to reset its state; labctl never does, the data could be half-written",
    )


def _stuck(volume: Volume, wanted: str, waited: float, said: str = "") -> CloudRefused:
    advice = {
        "detaching": "a detach hangs: unmount it on the old server or delete that server; else the site's help desk",
        "attaching": "an attachment was begun and not finished: openstack volume attachment list, or the help desk",
        "reserved": "an attachment was begun and not finished: openstack volume attachment list, or the help desk",
        "in-use": "detach it from its server first",
    }
    after = f" after {waited:.0f} s" if waited else ""
    return CloudRefused(
        f"volume {volume.name} is {volume.status}{after}",
        expected=wanted,
        found=f"{volume.status}" + (f", {said}" if said else ""),
        source=f"volume {volume.id}",
        next_step=advice.get(volume.status, "run the same command again, or look: openstack volume show " + volume.id),
    )
