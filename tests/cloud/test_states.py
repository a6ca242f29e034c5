"""Quotas, states and shortages, made by the cloud's operator for a project of the tests' own.

Each must end with what happened, what was expected, what was found, where, and what to do; and nothing made in vain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from admin import Operator, project_of_its_own
from conftest import FLAVOR, IMAGE, Lab, make_server
from labctl import lifecycle, ssh, teardown
from labctl.cloud import keypair, network, server, volume
from labctl.context import Context
from labctl.errors import CloudRefused, HostUnreachable, LabctlError
from labctl.lab import Lab as LabFile
from labctl.lab import ServerSection
from labctl.models import Server, Volume
from labctl.progress import Progress
from rich.console import Console


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Operator, Lab]]:
    with project_of_its_own(tmp_path_factory.mktemp("own")) as made:
        yield made


@pytest.fixture(scope="module")
def admin(both: tuple[Operator, Lab]) -> Operator:
    return both[0]


@pytest.fixture(scope="module")
def own(both: tuple[Operator, Lab]) -> Lab:
    return both[1]


@pytest.fixture(scope="module")
def host(own: Lab) -> Server:
    """The project's one server; only the default security group is on it, which lets nobody in."""
    found = make_server(own, f"{own.prefix}-node")
    for group in own.groups:
        own.cloud.compute.compute.remove_security_group_from_server(found.id, group.name)
    return found


@pytest.fixture
def disk(own: Lab, request: pytest.FixtureRequest) -> Iterator[Volume]:
    made = volume.create(
        own.cloud, f"{own.prefix}-{abs(hash(request.node.name)) % 10000}", 1, metadata={}, tell=own.told
    )
    yield made
    volume.delete(own.cloud, made, own.told)


def context(own: Lab, folder: Path, **server_section: Any) -> Context:
    """The project as a command sees it; nobody answers questions."""
    section = ServerSection(**{"flavor": FLAVOR, "image": IMAGE, "ssh_key": str(folder / "key"), **server_section})
    ctx = Context(LabFile(lab=own.prefix, server=section), Progress(Console(quiet=True)), lambda _: False)
    ctx.site = own.cloud.site
    ctx.__dict__["cloud"] = own.cloud
    return ctx


def refused(act: Callable[[], object], exit_code: int = 3) -> LabctlError:
    """The error that it ends with, which must leave no question open."""
    with pytest.raises(LabctlError) as caught:
        act()
    error = caught.value
    assert error.exit_code == exit_code, error.as_dict()
    for name in ("what", "expected", "found", "source", "next_step"):
        assert getattr(error, name), (name, error.as_dict())
    return error


def servers_of(own: Lab) -> list[str]:
    return list(server.names(own.cloud).values())


@pytest.mark.parametrize("what", ["instances", "cores"])
def test_up_names_the_compute_quota_that_is_used_up_and_leaves_no_server(
    own: Lab, admin: Operator, tmp_path: Path, what: str
) -> None:
    before = servers_of(own)
    with admin.quota("compute", **{what: 0}):
        error = refused(lambda: lifecycle.up(context(own, tmp_path)))
    assert f"quota of {what} is used up" in error.what
    assert "of 0" in error.found
    assert "openstack server list" in error.next_step
    assert servers_of(own) == before


@pytest.mark.parametrize("what", ["volumes", "gigabytes"])
def test_the_storage_quota_that_is_used_up_is_named_and_no_volume_is_left(own: Lab, admin: Operator, what: str) -> None:
    name = f"{own.prefix}-over"
    with admin.quota("block_storage", **{what: 0}):
        error = refused(lambda: volume.create(own.cloud, name, 1, metadata={}, tell=own.told))
    assert f"quota of {what} is used up" in error.what
    assert "labctl volume list" in error.next_step
    assert volume.find(own.cloud, name) is None


def test_the_quota_of_floating_ips_is_named(own: Lab, admin: Operator, host: Server) -> None:
    bare = replace(host, address=None)
    with admin.quota("network", floatingip=0):
        error = refused(lambda: network.ensure_floating_ip(own.cloud, bare, own.name))
    assert "quota of floating IPs is used up" in error.what
    assert "openstack floating ip list" in error.next_step


def test_a_pool_without_free_addresses_is_said(own: Lab, admin: Operator, host: Server) -> None:
    with admin.full_network(external=True) as name:
        cloud = replace(own.cloud, site=replace(own.cloud.site, external_network=name))
        error = refused(lambda: network.ensure_floating_ip(cloud, replace(host, address=None), own.name))
    assert "no free address" in error.what
    assert name in error.what


def test_a_network_without_free_addresses_is_said_with_the_servers_fault(
    own: Lab, admin: Operator, tmp_path: Path
) -> None:
    with admin.full_network(external=False) as name:
        ctx = context(own, tmp_path)
        ctx.site = replace(ctx.site, network=name)
        made: list[Server] = []

        def launch() -> None:
            made.append(
                server.create(
                    own.cloud,
                    f"{own.prefix}-noaddr",
                    image=IMAGE,
                    flavor=FLAVOR,
                    network=name,
                    key_name=keypair.ensure(own.cloud, own.key, own.prefix),
                    groups=[],
                    metadata={},
                )
            )
            server.wait_active(own.cloud, made[0].id, own.told)

        try:
            error = refused(launch)
        finally:
            for one in made:
                server.delete(own.cloud, one.id, own.told)
    assert "ERROR" in error.what or "address" in error.what


def test_no_valid_host_is_said_and_tried_once_more_only_on_request(own: Lab, admin: Operator, tmp_path: Path) -> None:
    with admin.flavor(**{"aggregate_instance_extra_specs:labctl": "nowhere"}) as flavor:
        ctx = context(own, tmp_path, flavor=flavor.name)
        own_name = ctx.lab.server_name
        error = refused(lambda: lifecycle.provide(ctx))
        first = server.find(own.cloud, own_name)
        assert first is not None and (first.status, first.ran) == ("ERROR", False)
        assert "No valid host" in error.found
        assert "labctl up --retry" in error.next_step
        # without the request it is neither deleted nor made again
        refused(lambda: lifecycle.provide(ctx))
        same = server.find(own.cloud, own_name)
        assert same is not None and same.id == first.id
        # on request: that one goes, and the next is made twice at most
        ctx.retry = True
        made: list[str] = []
        create = ctx.cloud.compute.compute.create_server

        def counted(**request: Any) -> Any:
            made.append(str(request["name"]))
            if len(made) == 2:  # somebody else's server went: there is room at last
                admin.cloud.compute.delete_flavor_extra_specs_property(
                    flavor.id, "aggregate_instance_extra_specs:labctl"
                )
            return create(**request)

        ctx.cloud.compute.compute.create_server = counted
        try:
            with pytest.raises(HostUnreachable):  # nobody has the key of the image here; but it runs
                ssh_times_out(ctx)
        finally:
            del ctx.cloud.compute.compute.create_server
        assert made == [own_name, own_name]
        now = server.find(own.cloud, own_name)
        assert now is not None and now.status == "ACTIVE" and now.id != first.id
        teardown.destroy(ctx, force=True)
        assert server.find(own.cloud, own_name) is None


def ssh_times_out(ctx: Context) -> None:
    """`provide`, which gives up on the login at once."""
    wait = lifecycle.wait_for_login
    lifecycle.wait_for_login = lambda _ctx, one: ssh.wait_for_login(  # type: ignore[assignment]
        replace(_ctx.login(one), user="nobody-of-this-name"), lambda _: None, timeout=0
    )
    try:
        lifecycle.provide(ctx)
    finally:
        lifecycle.wait_for_login = wait


def test_a_server_that_is_active_and_never_answers_by_ssh_is_said(own: Lab, host: Server, tmp_path: Path) -> None:
    """Its security group drops what comes: a time-out, not a refusal."""
    ctx = context(own, tmp_path)
    ssh.ensure_key(ctx.ssh_key)
    address = network.ensure_floating_ip(own.cloud, host, own.name).address
    login = ctx.login(replace(host, address=address))
    error = refused(lambda: ssh.wait_for_login(login, own.told, timeout=3), exit_code=4)
    assert address in error.what
    assert "security group" in error.next_step


def test_a_volume_in_error_is_refused_before_a_server_is_made_or_deleted(
    own: Lab, admin: Operator, disk: Volume, host: Server, tmp_path: Path
) -> None:
    ctx = context(own, tmp_path, name=host.name)
    ctx.lab = ctx.lab.model_copy(update={"volume": ctx.lab.volume.model_copy(update={"name": disk.name})})
    before = servers_of(own)
    commands: tuple[Callable[[], object], ...] = (
        lambda: lifecycle.up(ctx),
        lambda: lifecycle.rebuild(ctx, force=True),
        lambda: volume.attach(own.cloud, host, disk, own.told),
        lambda: volume.settled(own.cloud, disk.id, own.told),
    )
    for status, acts in (("error", commands), ("error_deleting", commands[:1]), ("error_extending", commands[3:])):
        with admin.volume_status(disk.id, status):
            for act in acts:
                error = refused(act)
                assert status in error.what
                assert "help desk" in error.next_step
    assert servers_of(own) == before


@pytest.mark.parametrize("status", ["detaching", "reserved", "attaching"])
def test_a_state_that_should_pass_and_doesnt_is_waited_for_and_then_said(
    own: Lab, admin: Operator, disk: Volume, host: Server, status: str
) -> None:
    with admin.volume_status(disk.id, status):
        own.told.words.clear()
        for act in (
            lambda: volume.attach(own.cloud, host, disk, own.told, timeout=3),
            lambda: volume.detach(own.cloud, host.id, disk, own.told, timeout=3),
        ):
            error = refused(act)
            assert f"is {status} after 3 s" in error.what
            assert disk.id in error.source
        assert any(status in word for word in own.told.words)
    assert volume.attach(own.cloud, host, disk, own.told).attached_to == host.id
    volume.detach(own.cloud, host.id, disk, own.told)


def test_a_volume_in_use_by_another_server_stops_up_and_rebuild_before_anything_is_made(
    own: Lab, disk: Volume, host: Server, tmp_path: Path
) -> None:
    volume.attach(own.cloud, host, disk, own.told)
    try:
        ctx = context(own, tmp_path)
        ctx.lab = ctx.lab.model_copy(update={"volume": ctx.lab.volume.model_copy(update={"name": disk.name})})
        before = servers_of(own)
        for act in (lambda: lifecycle.up(ctx), lambda: lifecycle.rebuild(ctx)):
            error = refused(act)
            assert isinstance(error, CloudRefused)
            assert host.name in error.found and host.id in error.found
        assert servers_of(own) == before
    finally:
        volume.detach(own.cloud, host.id, disk, own.told)
