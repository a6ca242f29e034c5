"""Which lease a lab's server lives in: found by what it is, made where there is none, watched, ended.

A lease is the lab's if it has the lab's name, is this user's and this project's, runs, and reserves the flavor that
lab.yaml asks for, for long enough. Its name alone says nothing: names aren't unique, and ended leases stay listed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from labctl import clock
from labctl.cloud import META_LEASE, META_LEASE_ENDS
from labctl.cloud import credential as credentials
from labctl.cloud import lease as leases
from labctl.cloud import server as servers
from labctl.cloud.wait import wait_gone
from labctl.context import Context
from labctl.errors import CloudRefused, ConfigError
from labctl.models import Lease, Reservation, Server
from labctl.status import left_text

#: The timer on the host drains that long before the end (role lease_guard); then nothing is started any more, either.
DRAIN_BEFORE = timedelta(minutes=15)
#: A lease that has less left is not used for a new server: the next one would be due at once.
SHORTEST_USE = timedelta(hours=1)
#: Seconds that Blazar gets to delete the server of a lease that ended (20 s seen).
END_TIMEOUT = 180


@dataclass(frozen=True)
class Wish:
    """What a lease must be like to be used for the lab's server."""

    name: str
    flavor: str
    user_id: str
    project_id: str


def name_of(lab: str) -> str:
    """What labctl calls the leases that it makes."""
    return f"labctl-{lab}"


# -- decisions -----------------------------------------------------------------------------------------------------


def choose(listed: Iterable[Lease], wish: Wish, now: datetime) -> tuple[list[Lease], list[str]]:
    """The leases that would do, best first, and a sentence about each of ours that looks right and is not."""
    would_do, notes = [], []
    for lease in listed:
        if (lease.name, lease.user_id, lease.project_id) != (wish.name, wish.user_id, wish.project_id):
            continue
        if lease.status in leases.ENDING:
            continue
        if problem := _unfit(lease, wish, now):
            notes.append(f"Lease {lease.name} ({lease.id}) is not used: {problem}")
        else:
            would_do.append(lease)
    return sorted(would_do, key=lambda lease: (lease.status == "ACTIVE", lease.ends), reverse=True), notes


def _unfit(lease: Lease, wish: Wish, now: datetime) -> str:
    if lease.status not in {*leases.COMING, "ACTIVE"}:
        return f"it is in {lease.status}. openstack reservation lease delete {lease.id} removes it, and its servers."
    if lease.starts > now + timedelta(minutes=2):
        return f"it starts on {shown(lease.starts)}."
    if reservation_for(lease, wish.flavor) is None:
        held = ", ".join(f"{one.amount} of {one.flavor or one.kind} ({one.status})" for one in lease.reservations)
        return f"it reserves {held or 'nothing'}, not {wish.flavor}."
    if lease.ends - now < SHORTEST_USE:
        return f"it ends on {shown(lease.ends)}."
    return ""


def reservation_for(lease: Lease, flavor: str) -> Reservation | None:
    """The part of a lease that gives a server of that flavor (name or id)."""
    for one in lease.reservations:
        usable = one.kind == leases.FLAVOR_KIND and one.status in ("pending", "active") and one.amount > 0
        if usable and flavor in (one.flavor, one.flavor_id):
            return one
    return None


def shown(moment: datetime) -> str:
    """A moment for people."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def iso(moment: datetime) -> str:
    """A moment for machines: ISO 8601 in UTC, to the second."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# -- finding and making --------------------------------------------------------------------------------------------


def needed(ctx: Context) -> bool:
    """Whether a server of this lab needs a lease. Raises CloudRefused where it does and the cloud has none."""
    if ctx.site.needs_lease is False:
        return False
    there = leases.offered(ctx.cloud)
    if ctx.site.needs_lease and not there:
        raise CloudRefused(
            f"{ctx.site.name} needs leases, and region {ctx.cloud.region} has no reservation service.",
            expected="Blazar in the catalogue",
            source=ctx.lab.source("lease.required"),
            next_step="check cloud.region in lab.yaml, or set lease.required: false",
        )
    return there


def ensure(ctx: Context, *, besides: Lease | None = None, lasts: timedelta | None = None) -> Lease | None:
    """An ACTIVE lease with room for the lab's server, made if there is none; None where the site has no leases.

    `besides`: the lease to get away from, so that only one that ends later will do. `lasts`: how long a new one does.
    """
    if not needed(ctx):
        return None
    cloud, lab = ctx.cloud, ctx.lab
    wish = _wish(ctx)
    with ctx.progress.step(f"lease {wish.name}") as step:
        candidates, notes = choose(leases.list_leases(cloud), wish, datetime.now(UTC))
        for note in notes:
            ctx.progress.note(note)
        if besides is not None:
            candidates = [one for one in candidates if one.id != besides.id and one.ends > besides.ends]
        lease = next((one for one in candidates if _has_room(ctx, one)), None)
        if lease is None and lab.lease.name:
            raise _no_lease_of_that_name(ctx, wish)
        if lease is None:
            flavor_id = servers.flavor_id(cloud, wish.flavor)
            source = ctx.lab.source("lease.days")
            lease = leases.create(cloud, wish.name, flavor_id, lasts or lab.lease.duration, source=source)
        if lease.status != "ACTIVE":
            lease = leases.wait_active(cloud, lease.id, step.tell)
        step.result(f"ends {shown(lease.ends)}")
    return lease


def refuse_if_unmakeable(ctx: Context, server: Server | None) -> None:
    """Raises CloudRefused where a server needs a lease, none would do, and the login may not make one."""
    login = credentials.of_login(ctx.cloud) if server is None else None
    if login is None or login.unrestricted or not needed(ctx):
        return
    wish = _wish(ctx)
    candidates, _ = choose(leases.list_leases(ctx.cloud), wish, datetime.now(UTC))
    if not any(_has_room(ctx, one) for one in candidates):
        raise CloudRefused(
            f"The login may not make a lease for {ctx.lab.server_name}.",
            expected="a login by password or token, or an unrestricted application credential; or a lease with room",
            found=f"application credential {login.name}, which is restricted; no lease {wish.name} that would do",
            source=ctx.cloud.login_source,
            next_step=f"{ctx.cloud.login_help}; or make the lease in Horizon and name it as lease.name in lab.yaml",
        )


def _wish(ctx: Context) -> Wish:
    lab = ctx.lab
    return Wish(lab.lease.name or name_of(lab.lab), lab.server.flavor, ctx.cloud.user_id, ctx.cloud.project_id)


def _has_room(ctx: Context, lease: Lease) -> bool:
    reservation = reservation_for(lease, ctx.lab.server.flavor)
    return reservation is not None and servers.count_of_flavor(ctx.cloud, reservation.id) < reservation.amount


def _no_lease_of_that_name(ctx: Context, wish: Wish) -> CloudRefused:
    return CloudRefused(
        f"There is no lease {wish.name} that a server could be launched in.",
        expected=f"an active lease of yours with room for a server of flavor {wish.flavor}, for {SHORTEST_USE} or more",
        source=ctx.lab.source("lease.name"),
        next_step="make it in Horizon, or leave lease.name out of lab.yaml and labctl makes one",
    )


def launch_flavor(lease: Lease | None, flavor: str) -> str:
    """What to launch the server with: the lease's own flavor."""
    reservation = lease and reservation_for(lease, flavor)
    return reservation.launch_flavor if reservation else flavor


def tags(lease: Lease | None) -> dict[str, str]:
    """What a server in the lease is tagged with."""
    return {META_LEASE: lease.id, META_LEASE_ENDS: iso(lease.ends)} if lease else {}


# -- a server's lease ----------------------------------------------------------------------------------------------


def of_server(cloud: Any, server: Server) -> Lease | None:
    """The lease that a server lives in, or None. One request, and none for a server without a lease.

    A server that was launched by hand isn't tagged; its flavor names its reservation.
    """
    if lease_id := server.metadata.get(META_LEASE):
        return leases.get(cloud, lease_id)
    if not server.flavor.startswith("reservation:"):
        return None
    for lease in leases.list_leases(cloud):
        if any(one.launch_flavor == server.flavor for one in lease.reservations):
            return lease
    return None


def outlived(ctx: Context, server: Server | None) -> Server | None:
    """The server, or None if its lease has ended: Blazar deletes it within seconds, which is waited for."""
    ends = server.metadata.get(META_LEASE_ENDS) if server else None
    if server is None or ends is None or datetime.fromisoformat(ends) > datetime.now(UTC):
        return server
    lease = of_server(ctx.cloud, server)
    if lease is not None and lease.status not in leases.ENDING and lease.ends > datetime.now(UTC):
        return server
    ctx.progress.note(f"The lease of {server.name} has ended, and the server goes with it. The volume stays.")
    server_id, name = server.id, server.name

    def look() -> str:
        return f"server {name} is being deleted with its lease" if servers.get(ctx.cloud, server_id) else ""

    wait_gone(look, ctx.progress.tell, END_TIMEOUT)
    return None


def watched(ctx: Context, server: Server, *, check: bool = False) -> Server:
    """The server tagged with its lease's end as it is now, from which the host gets its timer. One request.

    Raises CloudRefused where the end is so near that nothing should be started any more.
    """
    lease = of_server(ctx.cloud, server)
    if lease is None:
        return server
    now_tagged = tags(lease)
    if any(server.metadata.get(key) != value for key, value in now_tagged.items()) and not check:
        servers.set_metadata(ctx.cloud, server.id, **now_tagged)
    left = lease.ends - datetime.now(UTC)
    if left <= DRAIN_BEFORE:
        raise CloudRefused(
            f"The lease of {server.name} ends {left_text(left)}, and the server with it.",
            expected=f"more than {DRAIN_BEFORE.seconds // 60} minutes, or the services would be cut off",
            found=f"lease {lease.name} ({lease.id}) ends {shown(lease.ends)}",
            next_step="labctl rebuild --new-lease",
        )
    if lease.status == "ERROR":
        ctx.progress.note(
            f"Lease {lease.name} ({lease.id}) is in ERROR. The server goes on until {shown(lease.ends)};"
            " labctl rebuild --new-lease replaces both."
        )
    return replace(server, metadata={**server.metadata, **now_tagged})


def renewed(ctx: Context, server: Server, lasts: timedelta) -> Lease:
    """A lease that ends later than the server's, made before the server goes: if the site refuses, nothing is lost."""
    lease = ensure(ctx, besides=of_server(ctx.cloud, server), lasts=lasts)
    if lease is None:
        raise ConfigError(f"{ctx.site.name} has no leases.", source="--new-lease", next_step="labctl rebuild")
    return lease


def end(ctx: Context, *, keep: str = "") -> None:
    """End every lease that labctl made for the lab, but the one with the id `keep` and any that has servers left."""
    if not leases.offered(ctx.cloud):
        return
    for lease in _made(ctx):
        if lease.id == keep:
            continue
        with ctx.progress.step(f"end lease {lease.name}") as step:
            if any(servers.count_of_flavor(ctx.cloud, one.id) for one in lease.reservations):
                ctx.progress.note(f"Lease {lease.name} ({lease.id}) stays: a server that isn't the lab's lives in it.")
                continue
            leases.delete(ctx.cloud, lease.id, step.tell)


def possessions(ctx: Context) -> list[str]:
    """The leases that `end` would end, in words."""
    if not leases.offered(ctx.cloud):
        return []
    return [f"lease {one.name} ({one.id}, {one.status}, ends {shown(one.ends)})" for one in _made(ctx)]


def _made(ctx: Context) -> list[Lease]:
    """The lab's leases that labctl made and that still are: a lease that the user made is the user's to end."""
    whose = (name_of(ctx.lab.lab), ctx.cloud.user_id, ctx.cloud.project_id)
    return [
        one
        for one in leases.list_leases(ctx.cloud)
        if (one.name, one.user_id, one.project_id) == whose and one.status not in leases.ENDING
    ]


# -- looking and prolonging ----------------------------------------------------------------------------------------


def describe(ctx: Context, server: Server | None) -> dict[str, Any] | None:
    """The lease of the lab's server for `lease show`, or None."""
    lease = of_server(ctx.cloud, server) if server else None
    if lease is None:
        return None
    left = lease.ends - datetime.now(UTC)
    return {
        "id": lease.id,
        "name": lease.name,
        "status": lease.status,
        "starts": iso(lease.starts),
        "ends": iso(lease.ends),
        "seconds_left": int(left.total_seconds()),
        "drains_at": iso(lease.ends - DRAIN_BEFORE),
        "flavor": ", ".join(f"{one.amount} x {one.flavor or one.kind}" for one in lease.reservations),
        "made_by_labctl": lease.name == name_of(ctx.lab.lab),
    }


def extend(ctx: Context, server: Server, lasts: timedelta) -> bool:
    """Let the server's lease end `lasts` from now. False, with nothing changed, where the site can't prolong it.

    A site of which that isn't known is asked on an empty lease: the wrong answer would ruin one that carries a server.
    """
    clock.refuse_if_wrong(ctx.cloud)
    lease = of_server(ctx.cloud, server)
    if lease is None:
        raise CloudRefused(f"{server.name} lives in no lease.", next_step="labctl status")
    ends = datetime.now(UTC) + lasts
    if ends <= lease.ends:
        raise ConfigError(
            "The lease lasts that long already.",
            expected=f"an end after {shown(lease.ends)}",
            found=shown(ends),
            source="--days, --hours or lab.yaml",
            next_step="labctl lease extend --days N",
        )
    with ctx.progress.step(f"extend lease {lease.name}") as step:
        extendable = ctx.site.lease_extendable
        if extendable is None:
            flavor = next((one.flavor_id for one in lease.reservations if one.flavor_id), "")
            extendable = leases.can_extend(ctx.cloud, flavor, f"{name_of(ctx.lab.lab)}-probe", step.tell)
        if not extendable:
            step.result("the site can't")
            return False
        lease = leases.extend(ctx.cloud, lease, ends, step.tell)
        step.result(f"ends {shown(lease.ends)}")
    return True
