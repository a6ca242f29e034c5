"""Leases in the cloud's own Blazar: found by what they are, made, reused, refused in Blazar's words, ended.

Skipped where the cloud has none. What is made carries the run's prefix, ends by itself within hours, and is removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from conftest import FLAVOR, IMAGE, Lab
from labctl import leases as decisions
from labctl.cloud import META_LEASE, META_LEASE_ENDS, keypair, lease, server, volume
from labctl.cloud.wait import wait_until
from labctl.context import Context
from labctl.errors import CloudRefused, ConfigError
from labctl.lab import Lab as LabFile
from labctl.lab import LeaseSection, ServerSection
from labctl.models import Lease, Server
from labctl.progress import Progress
from rich.console import Console

HOURS = timedelta(hours=3)


@pytest.fixture(scope="module", autouse=True)
def blazar(lab: Lab) -> Iterator[None]:
    if not lease.offered(lab.cloud):
        pytest.skip("this cloud has no Blazar")
    yield
    for left in lease.list_leases(lab.cloud):
        if lab.prefix in left.name and left.status not in lease.ENDING:
            lease.delete(lab.cloud, left.id, lab.told)


def context(lab: Lab, suffix: str, **section: Any) -> Context:
    """The lab's cloud as a command sees it that needs a lease. Nobody is there to say yes."""
    written = LabFile(
        lab=f"{lab.prefix}-{suffix}", server=ServerSection(flavor=FLAVOR), lease=LeaseSection(required=True, **section)
    )
    ctx = Context(written, Progress(Console(quiet=True)), lambda _: False)
    ctx.site = replace(lab.cloud.site, needs_lease=True, lease_extendable=section.get("extendable"))
    ctx.__dict__["cloud"] = lab.cloud
    return ctx


def launch(lab: Lab, ctx: Context, found: Lease) -> Server:
    made = server.create(
        lab.cloud,
        ctx.lab.server_name,
        image=IMAGE,
        flavor=decisions.launch_flavor(found, FLAVOR),
        network=lab.cloud.site.network,
        key_name=keypair.ensure(lab.cloud, lab.key, lab.prefix),
        groups=["default"],
        metadata={"labctl_lab": ctx.lab.lab, **decisions.tags(found)},
    )
    return server.wait_active(lab.cloud, made.id, lab.told)


@pytest.fixture(scope="module")
def doomed(lab: Lab) -> Server:
    """A server with a volume, whose lease ends within three minutes: while it does, the other tests run."""
    ctx = context(lab, "brief", hours=2)
    flavor = server.flavor_id(lab.cloud, FLAVOR)
    brief = lease.create(lab.cloud, decisions.name_of(ctx.lab.lab), flavor, timedelta(minutes=3))
    made = launch(lab, ctx, lease.wait_active(lab.cloud, brief.id, lab.told))
    kept = volume.create(lab.cloud, f"{lab.prefix}-kept", 1, metadata={}, tell=lab.told)
    volume.attach(lab.cloud, made, kept, lab.told)
    return made


def test_near_its_end_nothing_is_started_any_more(lab: Lab, doomed: Server) -> None:
    ctx = context(lab, "brief", hours=2)
    with pytest.raises(CloudRefused) as caught:
        decisions.watched(ctx, doomed)
    assert caught.value.next_step == "labctl rebuild --new-lease"
    wish = decisions.Wish(decisions.name_of(ctx.lab.lab), FLAVOR, lab.cloud.user_id, lab.cloud.project_id)
    assert decisions.choose(lease.list_leases(lab.cloud), wish, datetime.now(UTC))[0] == []


@pytest.fixture(scope="module")
def ctx(lab: Lab) -> Context:
    return context(lab, "l", hours=3)


@pytest.fixture(scope="module")
def ours(ctx: Context) -> Lease:
    """The lease that the first `up` makes."""
    made = decisions.ensure(ctx)
    assert made is not None
    return made


def test_a_lease_is_made_in_utc_and_the_next_run_finds_it(lab: Lab, ctx: Context, ours: Lease) -> None:
    assert ours.status == "ACTIVE"
    assert abs(ours.ends - datetime.now(UTC) - HOURS) < timedelta(minutes=10), "dates are sent and read in UTC"
    assert (ours.user_id, ours.project_id) == (lab.cloud.user_id, lab.cloud.project_id)
    before = lab.cloud.requests
    assert decisions.ensure(ctx) == ours
    assert lab.cloud.requests - before == 2


def test_a_lease_of_the_name_that_starts_later_is_told_and_not_used(lab: Lab, ctx: Context, ours: Lease) -> None:
    begins = datetime.now(UTC) + timedelta(days=1)
    later = lease.create(lab.cloud, ours.name, server.flavor_id(lab.cloud, FLAVOR), HOURS, starts=begins)
    try:
        assert decisions.ensure(ctx) == ours
        wish = decisions.Wish(ours.name, FLAVOR, lab.cloud.user_id, lab.cloud.project_id)
        _, notes = decisions.choose(lease.list_leases(lab.cloud), wish, datetime.now(UTC))
        assert [note for note in notes if later.id in note and "starts" in note]
    finally:
        assert lease.delete(lab.cloud, later.id, lab.told)
    assert not lease.delete(lab.cloud, later.id, lab.told)


def test_too_long_is_refused_in_blazars_words_and_nothing_is_made(lab: Lab) -> None:
    ctx = context(lab, "long", days=360)
    with pytest.raises(CloudRefused) as caught:
        decisions.ensure(ctx)
    assert "uration" in caught.value.detail
    assert caught.value.detail in caught.value.found
    assert "lease.days" in caught.value.next_step
    assert ctx.lab.lab not in str([one.name for one in lease.list_leases(lab.cloud)])


def test_a_flavor_that_is_gone_is_named_with_what_there_is(lab: Lab) -> None:
    ctx = context(lab, "gone", hours=2)
    ctx.lab = ctx.lab.model_copy(update={"server": ServerSection(flavor="lct-gone")})
    with pytest.raises(CloudRefused, match="no flavor lct-gone"):
        decisions.ensure(ctx)


def test_a_lease_that_lab_yaml_names_is_never_made_by_labctl(lab: Lab) -> None:
    with pytest.raises(CloudRefused, match="no lease"):
        decisions.ensure(context(lab, "hand", name=f"{lab.prefix}-by-hand"))


@pytest.fixture(scope="module")
def inhabitant(lab: Lab, ctx: Context, ours: Lease) -> Server:
    """A server within the lease."""
    return launch(lab, ctx, ours)


def test_a_server_in_a_lease_is_tagged_and_the_lease_is_full(
    lab: Lab, ctx: Context, ours: Lease, inhabitant: Server
) -> None:
    assert inhabitant.flavor == f"reservation:{ours.reservations[0].id}"
    assert inhabitant.metadata[META_LEASE] == ours.id
    before = lab.cloud.requests
    assert decisions.watched(ctx, inhabitant) == inhabitant
    assert decisions.outlived(ctx, inhabitant) == inhabitant
    assert lab.cloud.requests - before == 1, "what a no-op up and a status may cost"
    # launched by hand: no tag, and still known
    untagged = replace(inhabitant, metadata={})
    assert decisions.of_server(lab.cloud, untagged) == ours
    assert decisions.watched(ctx, untagged).metadata[META_LEASE_ENDS] == decisions.iso(ours.ends)
    # a second lab of that name finds no room in it
    assert not decisions._has_room(ctx, ours)


def test_a_server_without_a_lease_costs_no_request(lab: Lab, ctx: Context, node: Server) -> None:
    before = lab.cloud.requests
    assert decisions.watched(ctx, node) == node
    assert decisions.describe(ctx, node) is None
    assert lab.cloud.requests == before


def test_extending_asks_an_empty_lease_first_and_leaves_the_servers_alone(
    lab: Lab, ctx: Context, ours: Lease, inhabitant: Server
) -> None:
    """Upstream Blazar answers 409 and leaves the lease in ERROR: that must hit the empty one, which is gone after."""
    with pytest.raises(ConfigError, match="that long already"):
        decisions.extend(ctx, inhabitant, timedelta(minutes=30))
    extended = decisions.extend(ctx, inhabitant, timedelta(hours=6))
    now = lease.get(lab.cloud, ours.id)
    assert now is not None
    assert now.status == "ACTIVE"
    assert extended == (now.ends > ours.ends)
    assert not [one for one in lease.list_leases(lab.cloud) if one.name.endswith("-probe")]


def test_a_site_that_cant_extend_is_not_asked(lab: Lab, ctx: Context, inhabitant: Server) -> None:
    never = context(lab, "l", extendable=False)
    before = lab.cloud.requests
    assert decisions.extend(never, inhabitant, timedelta(hours=9)) is False
    assert lab.cloud.requests - before == 1


def test_a_renewal_is_made_first_ends_later_and_is_found_again(
    lab: Lab, ctx: Context, ours: Lease, inhabitant: Server
) -> None:
    """An interrupted rebuild onto a new lease, run again, goes on with the lease that it made."""
    new = decisions.renewed(ctx, inhabitant, timedelta(hours=8))
    assert new.id != ours.id
    assert new.ends > ours.ends
    assert decisions.renewed(ctx, inhabitant, timedelta(hours=8)) == new
    assert server.get(lab.cloud, inhabitant.id) is not None
    decisions.end(ctx, keep=new.id)
    assert lease.get(lab.cloud, ours.id) is not None, "a lease with a server in it is never ended"
    decisions.end(ctx)
    assert lease.get(lab.cloud, new.id) is None


def test_the_end_of_the_lease_takes_the_server_and_leaves_the_volume(lab: Lab, doomed: Server) -> None:
    """And the next run notices, waits until the server is gone, and makes a lease anew."""
    ctx = context(lab, "brief", hours=2)
    gone, seen, _ = wait_until(lambda: _over(ctx, doomed), lab.told, 300, 2)
    assert gone, seen
    assert server.find(lab.cloud, doomed.name, lab.told) is None
    kept = volume.find(lab.cloud, f"{lab.prefix}-kept")
    assert kept is not None
    assert volume.wait_status(lab.cloud, kept.id, "available", lab.told, 60).attached_to is None
    ended = lease.get(lab.cloud, doomed.metadata[META_LEASE])
    assert ended is not None
    assert ended.status in lease.ENDING
    new = decisions.ensure(ctx)
    assert new is not None
    assert new.id != ended.id, "a lease that has ended is of no use, whatever its name"
    decisions.end(ctx)
    assert lease.get(lab.cloud, new.id) is None


def _over(ctx: Context, doomed: Server) -> tuple[bool | None, str]:
    """Whether the server is no more, as the commands find out."""
    return (True if decisions.outlived(ctx, doomed) is None else None), "the server lives on"
