"""Leases: Blazar's flavor reservations. A server launched with a reservation's flavor lives as long as its lease.

The requests are made with the login's own session, not with blazarclient: its one exception class says 500 for every
refusal, and the session counts, times out and repeats as for every other service.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from labctl.cloud.refusals import refusals, status_of, words_of
from labctl.cloud.session import Cloud
from labctl.cloud.wait import wait_gone, wait_until
from labctl.errors import CloudRefused
from labctl.models import Lease, Reservation, Tell

SERVICE = "reservation"
FLAVOR_KIND = "flavor:instance"
#: On its way to ACTIVE, and on its way out of the world.
COMING = frozenset({"CREATING", "PENDING", "STARTING", "UPDATING"})
ENDING = frozenset({"TERMINATING", "TERMINATED", "DELETING"})
#: States that pass by themselves; in them Blazar refuses every change. PENDING isn't one: it may last until a start.
PASSING = frozenset({"CREATING", "STARTING", "UPDATING", "TERMINATING", "DELETING"})
#: Seconds until ACTIVE: Blazar looks every 10 s (26 s seen), and takes its time on a busy site.
ACTIVE_TIMEOUT = 300
#: Seconds until a deleted lease is gone. Its servers go first, which Blazar waits for.
DELETE_TIMEOUT = 180
#: The form of dates in a request: UTC, minutes; anything else is refused.
DATE = "%Y-%m-%d %H:%M"
#: How long the lease lasts with which `can_extend` tries, and by how much it tries to prolong it.
PROBE = timedelta(hours=1)


def offered(cloud: Cloud) -> bool:
    """Whether the region has a reservation service. No request: the token's catalogue says."""
    access = cloud.compute.session.auth.get_access(cloud.compute.session)
    return any(
        endpoint.get("region") == cloud.region
        for entry in access.service_catalog.catalog
        if entry["type"] == SERVICE
        for endpoint in entry["endpoints"]
    )


def _ask(cloud: Cloud, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    from openstack.exceptions import raise_from_response

    where = {"service_type": SERVICE, "region_name": cloud.region, "interface": cloud.compute.compute.interface}
    given = {"json": body} if body is not None else {}
    response = cloud.compute.session.request(path, method, endpoint_filter=where, raise_exc=False, **given)
    raise_from_response(response)
    return dict(response.json()) if response.content else {}


def record(found: Mapping[str, Any]) -> Lease:
    """labctl's record of a lease as the API shows it."""
    return Lease(
        id=str(found["id"]),
        name=str(found["name"]),
        status=str(found["status"]),
        starts=_date(str(found["start_date"])),
        ends=_date(str(found["end_date"])),
        user_id=str(found.get("user_id") or ""),
        project_id=str(found.get("project_id") or ""),
        reservations=tuple(_reservation(one) for one in found.get("reservations") or ()),
    )


def _date(text: str) -> datetime:
    """A date of Blazar's, which says no time zone and means UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def _reservation(found: Mapping[str, Any]) -> Reservation:
    """`flavor_id` is the new, private flavor there; the one that was asked for is JSON in `resource_properties`."""
    try:
        asked = json.loads(str(found.get("resource_properties") or "{}"))
    except ValueError:
        asked = {}
    asked = asked if isinstance(asked, dict) else {}
    return Reservation(
        id=str(found["id"]),
        status=str(found.get("status") or ""),
        kind=str(found.get("resource_type") or ""),
        flavor=str(asked.get("name") or ""),
        flavor_id=str(asked.get("id") or ""),
        amount=int(found.get("amount") or 0),
    )


def list_leases(cloud: Cloud) -> list[Lease]:
    """All leases of the project, whoever's and in whatever state, ended ones too. One request."""
    with refusals("list the leases"):
        return [record(one) for one in _ask(cloud, "GET", "/leases")["leases"]]


def get(cloud: Cloud, lease_id: str) -> Lease | None:
    """The lease with that id, or None. One request."""
    with refusals(f"read lease {lease_id}"):
        try:
            return record(_ask(cloud, "GET", f"/leases/{lease_id}")["lease"])
        except Exception as error:
            if status_of(error) == 404:
                return None
            raise


def create(
    cloud: Cloud, name: str, flavor_id: str, lasts: timedelta, *, starts: datetime | None = None, source: str = ""
) -> Lease:
    """Asks for a lease of one server of a flavor, from now on (or `starts`); it isn't ACTIVE yet.

    Does not look for an existing one. `source`: where the duration came from. Raises CloudRefused in Blazar's words.
    """
    begin = starts or datetime.now(UTC)
    request = {
        "name": name,
        "start_date": begin.strftime(DATE) if starts else "now",
        "end_date": (begin + lasts).strftime(DATE),  # cut to the minute, so never longer than asked for
        "reservations": [{"resource_type": FLAVOR_KIND, "flavor_id": flavor_id, "amount": 1, "affinity": None}],
        "events": [],
    }
    with refusals(f"make the lease {name}"):
        try:
            return record(_ask(cloud, "POST", "/leases", request)["lease"])
        except Exception as error:
            if (said := _refusal(cloud, error, name, request, source)) is not None:
                raise said from error
            raise


def _refusal(cloud: Cloud, error: Exception, name: str, request: Mapping[str, Any], source: str) -> CloudRefused | None:
    """Blazar's refusal of a new lease, with what can be done about it."""
    status, said = status_of(error), words_of(error)
    if status is None or status == 401:
        return None
    lasts = f"from {request['start_date']} to {request['end_date']} UTC"
    if status == 500 and cloud.by_application_credential and "nternal" in said:
        return CloudRefused(
            f"could not make the lease {name}",
            expected="a login by password or token: a lease makes a trust, and Keystone lets no application credential"
            " do that",
            found=f"HTTP {status}: {said}",
            next_step="log in by password or token, or make the lease in Horizon and name it in lab.yaml (lease.name)",
            detail=said,
        )
    too_long = "duration" in said.lower()
    return CloudRefused(
        f"could not make the lease {name}",
        expected=f"room for one server {lasts}",
        found=f"HTTP {status}: {said}",
        source=source,
        next_step="set a shorter lease.days or lease.hours in lab.yaml"
        if too_long
        else "look at the site's lease calendar, then set another flavor or a shorter lease in lab.yaml",
        detail=said,
    )


def wait_active(cloud: Cloud, lease_id: str, tell: Tell, timeout: float = ACTIVE_TIMEOUT) -> Lease:
    """Waits until the lease is ACTIVE. Raises CloudRefused when it ends or errs instead, and after `timeout` s."""

    def look() -> tuple[Lease | None, str]:
        lease = get(cloud, lease_id)
        if lease is None or lease.status not in {*COMING, "ACTIVE"}:
            raise CloudRefused(
                f"lease {lease.name if lease else lease_id} didn't become ACTIVE",
                expected="ACTIVE",
                found=lease.status if lease else "no lease of that id",
                next_step=f"openstack reservation lease delete {lease_id}, then run the same command again",
            )
        return (lease if lease.status == "ACTIVE" else None), f"lease {lease.name} is {lease.status}"

    lease, seen, passed = wait_until(look, tell, timeout)
    if lease is None:
        raise CloudRefused(
            f"{seen} after {passed:.0f} s",
            expected=f"ACTIVE within {timeout:.0f} s",
            next_step="run the same command again to go on waiting",
        )
    return lease


def can_extend(cloud: Cloud, flavor_id: str, name: str, tell: Tell) -> bool:
    """Whether this site prolongs leases of flavors, found out on a lease that carries nothing and is deleted again.

    Blazar's own flavor plugin answers 409 and leaves the lease in ERROR; Chameleon's version of it can. Raises
    CloudRefused where not even such a lease is given.
    """
    tell("asking the site whether it can prolong a lease, on an empty one")
    probe = create(cloud, name, flavor_id, PROBE)
    try:
        wait_active(cloud, probe.id, tell)
        try:
            _ask(cloud, "PUT", f"/leases/{probe.id}", {"end_date": (probe.ends + PROBE).strftime(DATE)})
        except Exception as error:
            if status_of(error) is None:
                raise
            return False
        return True
    finally:
        delete(cloud, probe.id, tell)


def extend(cloud: Cloud, lease: Lease, ends: datetime, tell: Tell) -> Lease:
    """Moves a lease's end. Only for a site that is known to do that: elsewhere the lease is in ERROR afterwards."""
    with refusals(f"extend the lease {lease.name} to {ends.strftime(DATE)} UTC"):
        _ask(cloud, "PUT", f"/leases/{lease.id}", {"end_date": ends.strftime(DATE)})
    return wait_active(cloud, lease.id, tell)


def delete(cloud: Cloud, lease_id: str, tell: Tell, timeout: float = DELETE_TIMEOUT) -> bool:
    """Ends a lease AND DELETES ITS SERVERS, and waits until it is gone. False when there was none.

    Blazar deletes none that is on its way to another state: that passes first.
    """
    seen: list[str] = []

    def look() -> str:
        left = get(cloud, lease_id)
        if left is None:
            return ""
        seen.append(left.status)
        if left.status not in PASSING:
            _request_deletion(cloud, left)
        return f"lease {left.name} is {left.status}, to be deleted"

    wait_gone(look, tell, timeout)
    return bool(seen)


def _request_deletion(cloud: Cloud, lease: Lease) -> None:
    with refusals(f"delete lease {lease.name} ({lease.id})"):
        try:
            _ask(cloud, "DELETE", f"/leases/{lease.id}")
        except Exception as error:
            now = get(cloud, lease.id)
            if status_of(error) is None or (now is not None and now.status == lease.status):
                raise  # not a state that began since the last look
