"""A project that others share: what a mate made is never used, changed or deleted, whatever its name is."""

from __future__ import annotations

import http.client
import io
import json
import secrets
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CLOUD, CLOUDS_FILE, FLAVOR, IMAGE, Lab, Told
from labctl import adopt, lifecycle, teardown
from labctl.cloud import META_LAB, keypair, network, store, volume
from labctl.cloud import server as servers
from labctl.context import Context
from labctl.errors import CloudRefused, ConfigError
from labctl.lab import Lab as LabFile
from labctl.models import Server, Volume
from labctl.progress import Progress
from rich.console import Console


@pytest.fixture(scope="module")
def mate(lab: Lab) -> Iterator[Any]:
    """A connection of another user of the same project, made with the sandbox's administrator."""
    passwords = CLOUDS_FILE.with_name("passwords.json")
    if not passwords.is_file():
        pytest.skip("needs the sandbox's administrator")
    import openstack

    auth = lab.cloud.auth_url

    def connect(name: str, word: str, project: str) -> Any:
        where = {"project_name": project, "user_domain_name": "Default", "project_domain_name": "Default"}
        made = openstack.connect(
            auth={"auth_url": auth, "username": name, "password": word, **where}, region_name=lab.cloud.region
        )
        made.session.session.headers["Connection"] = "close"
        return made

    admin = connect("admin", json.loads(passwords.read_text())["admin"], "admin")
    project = admin.identity.get_project(lab.cloud.project_id)
    word = secrets.token_hex(16)
    user = admin.identity.create_user(name=f"{lab.prefix}-mate", password=word, domain_id=project.domain_id)
    try:
        role = admin.identity.find_role("member")
        admin.identity.assign_project_role_to_user(project.id, user.id, role.id)
        yield connect(user.name, word, project.name)
    finally:
        admin.identity.delete_user(user.id)


@pytest.fixture
def theirs(lab: Lab, mate: Any) -> Iterator[Volume]:
    """A volume of the mate's, by the name that a lab of ours would look for."""
    name = f"block-persist-{lab.prefix}-{secrets.token_hex(2)}"
    made = mate.block_storage.create_volume(name=name, size=1)
    yield volume.wait_status(lab.cloud, made.id, "available", lab.told)
    left = volume.get(lab.cloud, made.id)
    if left:
        volume.delete(lab.cloud, left, lab.told)


def context(lab: Lab, name: str, tmp_path: Path, **sections: Any) -> Context:
    key = tmp_path / "id_ed25519"
    data = {"lab": name, "site": CLOUD, "server": {"flavor": FLAVOR, "image": IMAGE, "ssh_key": str(key)}, **sections}
    ctx = Context(LabFile.model_validate(data), Progress(Console(quiet=True)), lambda _: True)
    ctx.site = lab.cloud.site
    ctx.__dict__["cloud"] = lab.cloud
    return ctx


def test_a_mates_volume_of_the_labs_name_is_neither_used_nor_deleted(lab: Lab, theirs: Volume, tmp_path: Path) -> None:
    ctx = context(lab, theirs.name.removeprefix("block-persist-"), tmp_path)
    for command in (lifecycle.provide, lifecycle.rebuild, teardown.possessions, teardown.destroy):
        with pytest.raises(CloudRefused, match="isn't this lab's") as caught:
            command(ctx)
        assert theirs.id in caught.value.found and "another user" in caught.value.found
    now = volume.get(lab.cloud, theirs.id)
    assert now is not None and (now.status, now.metadata) == ("available", theirs.metadata)
    assert servers.find(lab.cloud, ctx.lab.server_name) is None, "something was made before it was refused"


def test_of_two_volumes_of_one_name_the_tagged_one_is_the_labs(lab: Lab, theirs: Volume, tmp_path: Path) -> None:
    name = theirs.name.removeprefix("block-persist-")
    ctx = context(lab, name, tmp_path)
    ours = volume.create(lab.cloud, theirs.name, 1, metadata={META_LAB: name}, tell=lab.told)
    assert lifecycle.existing_volume(ctx).id == ours.id
    assert teardown.possessions(ctx).lines == (f"volume {ours.name} ({ours.id}, 1 GiB) with all its data",)
    teardown.destroy(ctx)
    assert volume.get(lab.cloud, ours.id) is None
    assert volume.get(lab.cloud, theirs.id) is not None


def test_adopt_lists_duplicates_and_takes_the_one_that_is_named_by_id(
    lab: Lab, theirs: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = theirs.name.removeprefix("block-persist-")
    monkeypatch.setattr(adopt, "Context", lambda given, *_: context(lab, given.lab, tmp_path))
    with pytest.raises(CloudRefused, match="isn't yours to adopt") as caught:
        adopt.look(adopt.Wish(name, CLOUD), None, Progress(Console(quiet=True)), lambda _: True)
    assert theirs.id in caught.value.next_step
    ours = volume.create(lab.cloud, theirs.name, 1, metadata={}, tell=lab.told)
    with pytest.raises(CloudRefused, match="there are 2 volumes") as caught:
        adopt.look(adopt.Wish(name, CLOUD), None, Progress(Console(quiet=True)), lambda _: True)
    assert theirs.id in caught.value.found and f"{ours.id} (available, yours" in caught.value.found
    wish = adopt.Wish(name, CLOUD, volume=ours.id)
    plan = adopt.look(wish, None, Progress(Console(quiet=True)), lambda _: True)
    assert plan.found.volume is not None and plan.found.volume.id == ours.id
    assert volume.get(lab.cloud, ours.id) == ours, "looking changed something"
    adopt.carry_out(plan, tmp_path / "lab.yaml")
    adopted = volume.get(lab.cloud, ours.id)
    assert adopted is not None and adopted.metadata == {META_LAB: name}
    assert volume.get(lab.cloud, theirs.id) == theirs
    # by its name alone it is found now, and there is nothing left to do
    again = adopt.look(adopt.Wish(), tmp_path / "lab.yaml", Progress(Console(quiet=True)), lambda _: True)
    assert again.found.volume is not None and again.found.volume.id == ours.id and not again.pending
    with pytest.raises(ConfigError, match="another lab"):
        adopt.look(adopt.Wish("other"), tmp_path / "lab.yaml", Progress(Console(quiet=True)), lambda _: True)
    volume.delete(lab.cloud, ours, lab.told)


def test_a_mates_server_of_the_labs_name_is_neither_used_nor_deleted(
    lab: Lab, mate: Any, node: Server, tmp_path: Path
) -> None:
    made = mate.compute.create_server(
        name=f"node-persist-{lab.prefix}-m",
        image_id=mate.image.find_image(IMAGE).id,
        flavor_id=mate.compute.find_flavor(FLAVOR).id,
        networks=[{"uuid": mate.network.find_network(lab.cloud.site.network).id}],
    )
    try:
        ctx = context(lab, f"{lab.prefix}-m", tmp_path)
        for command in (
            lifecycle.provide,
            lifecycle.down,
            lifecycle.drain,
            teardown.destroy,
            lifecycle.existing_server,
        ):
            with pytest.raises(CloudRefused, match="isn't this lab's"):
                command(ctx)
        there = servers.get(lab.cloud, made.id)
        assert there is not None and there.status != "DELETING"
        # and one that is ours, but not known to be the lab's, isn't deleted on a guess either
        ours = context(lab, "unused", tmp_path, server={"name": node.name})
        with pytest.raises(CloudRefused, match="isn't this lab's"):
            lifecycle.down(ours)
    finally:
        servers.delete(lab.cloud, made.id, lab.told)


def test_a_container_with_data_that_nobody_tagged_is_not_used_and_outlives_destroy(lab: Lab, tmp_path: Path) -> None:
    name = f"{lab.prefix}-c"
    ctx = context(lab, name, tmp_path, object_store={"container": f"{lab.prefix}-data"})
    store.ensure_container(lab.cloud, ctx.lab.container_name, {})
    lifecycle.provide_container(ctx)  # empty: taken, and tagged
    assert store.stat(lab.cloud, ctx.lab.container_name).metadata[META_LAB] == name  # type: ignore[union-attr]

    somebodys = context(lab, name, tmp_path, object_store={"container": f"{lab.prefix}-somebodys"})
    store.ensure_container(lab.cloud, somebodys.lab.container_name, {})
    put(lab, somebodys.lab.container_name, "precious")
    with pytest.raises(CloudRefused, match="isn't known to be this lab's"):
        lifecycle.provide_container(somebodys)
    assert "not known" in " ".join(teardown.possessions(somebodys).stays)
    teardown.destroy(somebodys)
    assert list(store.object_names(lab.cloud, somebodys.lab.container_name)) == ["precious"]
    other = context(lab, "another", tmp_path, object_store={"container": f"{lab.prefix}-data"})
    with pytest.raises(CloudRefused, match="isn't known to be this lab's"):
        lifecycle.provide_container(other)


def put(lab: Lab, container: str, name: str) -> None:
    response = lab.cloud.objects.object_store.put(f"/{container}/{name}", data=b"1234567890")
    assert response.status_code == http.client.CREATED


def test_destroy_ends_a_half_built_lab_and_keeps_what_it_is_told_to(lab: Lab, tmp_path: Path, node: Server) -> None:
    name = f"{lab.prefix}-half"
    ctx = context(lab, name, tmp_path)
    assert not teardown.possessions(ctx)
    teardown.destroy(ctx)  # nothing there is no error
    made = volume.create(lab.cloud, ctx.lab.volume_name, 1, metadata={META_LAB: name}, tell=lab.told)
    for container in (ctx.lab.container_name, f"{ctx.lab.container_name}_segments"):
        store.ensure_container(lab.cloud, container, {META_LAB: name} if container[-1] != "s" else {})
        put(lab, container, "x")
    groups = network.ensure_groups(lab.cloud, [ctx.security_group])
    lost = lab.cloud.compute.network.create_ip(
        floating_network_id=servers.network_of(lab.cloud, lab.cloud.site.external_network), description=f"labctl:{name}"
    )
    lines = " ".join(teardown.possessions(ctx).lines)
    for part in (made.id, "1 GiB", "1 objects", "_segments", str(lost.floating_ip_address), ctx.security_group.name):
        assert part in lines, lines
    kept = teardown.possessions(ctx, ["volume", "container"])
    assert made.id not in " ".join(kept.lines) and made.id in " ".join(kept.stays)
    teardown.destroy(ctx, keep=["volume", "container"])
    assert volume.get(lab.cloud, made.id) is not None
    assert list(store.object_names(lab.cloud, ctx.lab.container_name)) == ["x"]
    assert groups[0] not in [g.id for g in network.groups_made(lab.cloud, [ctx.security_group.name])]

    volume.attach(lab.cloud, node, made, lab.told)
    with pytest.raises(CloudRefused, match="in use by another server"):
        teardown.possessions(ctx)
    volume.detach(lab.cloud, node.id, made, lab.told)
    teardown.destroy(ctx)
    assert volume.get(lab.cloud, made.id) is None
    assert store.with_segments(lab.cloud, ctx.lab.container_name) == []
    assert not teardown.possessions(ctx)


def test_a_server_that_is_still_being_built_goes_with_its_volume(lab: Lab, tmp_path: Path) -> None:
    name = f"{lab.prefix}-build"
    ctx = context(lab, name, tmp_path)
    made = volume.create(lab.cloud, ctx.lab.volume_name, 1, metadata={META_LAB: name}, tell=lab.told)
    servers.create(
        lab.cloud,
        ctx.lab.server_name,
        image=IMAGE,
        flavor=FLAVOR,
        network=lab.cloud.site.network,
        key_name=keypair.ensure(lab.cloud, lab.key, lab.prefix),
        groups=[],
        metadata={META_LAB: name},
    )
    teardown.destroy(ctx)
    assert servers.find(lab.cloud, ctx.lab.server_name, lab.told) is None
    assert volume.get(lab.cloud, made.id) is None


@pytest.mark.slow
def test_ten_thousand_objects_and_their_segments_are_deleted(lab: Lab) -> None:
    """Made by few requests: Swift unpacks an archive that is put with ?extract-archive."""
    name, told = f"{lab.prefix}-many", Told()
    for container, count in ((name, 10_050), (f"{name}_segments", 300)):
        store.ensure_container(lab.cloud, container, {})
        for start in range(0, count, 1000):
            body = archive([f"training/class_{n % 11:02d}/{n}.jpg" for n in range(start, min(start + 1000, count))])
            answer = lab.cloud.objects.object_store.put(
                f"/{container}?extract-archive=tar", data=body, headers={"Accept": "application/json"}, timeout=900
            )
            assert answer.json()["Response Status"].startswith("201"), answer.text
    assert sum(1 for _ in store.object_names(lab.cloud, name)) == 10_050
    assert store.delete_container(lab.cloud, name, told) == 10_350
    assert store.with_segments(lab.cloud, name) == []


def archive(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 10
            tar.addfile(info, io.BytesIO(b"1234567890"))
    return buffer.getvalue()
