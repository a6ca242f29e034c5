"""`labctl volume …` against a real cloud: nothing is pulled from under a host, taken from another, or lost unasked."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest
from conftest import Lab
from labctl import lab as labs
from labctl import storage
from labctl.cloud import volume
from labctl.context import Context
from labctl.errors import CloudRefused, ConfigError, HostUnreachable
from labctl.models import Server, Volume
from labctl.progress import Progress
from rich.console import Console


def context(lab: Lab, folder: Path, volume_name: str) -> Context:
    """A lab whose server is the tests' node, and whose volume has that name; nobody answers its questions."""
    file = folder / "lab.yaml"
    file.write_text(f"lab: {lab.name}\nserver: {{name: {lab.prefix}-node}}\nvolume: {{name: {volume_name}}}\n")
    ctx = Context(labs.load(file), Progress(Console(stderr=True, quiet=True)), lambda _question: False)
    ctx.__dict__["cloud"] = lab.cloud
    return ctx


def test_the_list_says_whose_a_volume_is(lab: Lab, tmp_path: Path, free_volume: Volume, node: Server) -> None:
    volume.attach(lab.cloud, node, free_volume, lab.told)
    listed = storage.overview(context(lab, tmp_path, free_volume.name))
    own = listed[0]
    assert (own.id, own.lab, own.attached_to, own.made_for) == (free_volume.id, True, node.name, lab.name)
    assert not any(row.lab for row in listed[1:])


def test_creating_again_takes_only_what_is_the_same(lab: Lab, tmp_path: Path) -> None:
    name = f"{lab.prefix}-c{secrets.token_hex(2)}"
    ctx = context(lab, tmp_path, "another")
    made = storage.create(ctx, name, 1)
    assert storage.create(ctx, name, 1).id == made.id
    with pytest.raises(ConfigError, match="already"):
        storage.create(ctx, name, 2)
    lab.cloud.compute.block_storage.set_volume_metadata(made.id, labctl_lab="somebody")
    with pytest.raises(ConfigError) as caught:
        storage.create(ctx, name, 1)
    assert "somebody" in caught.value.found
    storage.delete(ctx, storage.doomed(ctx, name))
    with pytest.raises(CloudRefused, match="no volume"):
        storage.doomed(ctx, name)


def test_a_volume_of_a_host_that_cant_be_asked_stays_attached(
    lab: Lab, tmp_path: Path, free_volume: Volume, node: Server
) -> None:
    """It could be mounted: the node has no address to ask it by."""
    for name in (free_volume.name, "another"):
        ctx = context(lab, tmp_path, name)
        storage.attach(ctx, free_volume.name)
        with pytest.raises(HostUnreachable):
            storage.detach(ctx, free_volume.id)
        now = volume.get(lab.cloud, free_volume.id)
        assert now is not None and now.attached_to == node.id
        with pytest.raises(CloudRefused, match="attached and was not deleted"):
            storage.doomed(ctx, free_volume.name)


def test_another_servers_volume_is_neither_taken_nor_released(
    lab: Lab, tmp_path: Path, free_volume: Volume, node: Server, other_node: Server
) -> None:
    volume.attach(lab.cloud, other_node, free_volume, lab.told)
    ctx = context(lab, tmp_path, free_volume.name)
    for refused in (storage.attach, storage.detach):
        with pytest.raises(CloudRefused) as caught:
            refused(ctx, free_volume.name)
        assert other_node.id in caught.value.found
    now = volume.get(lab.cloud, free_volume.id)
    assert now is not None and now.attached_to == other_node.id


def test_extending_tells_both_sizes_and_leaves_the_host_of_another_volume_alone(
    lab: Lab, tmp_path: Path, free_volume: Volume
) -> None:
    ctx = context(lab, tmp_path, "another")
    extended, outcome = storage.extend(ctx, free_volume.name, 2)
    assert (extended.size_gib, outcome) == (2, None)
    with pytest.raises(ConfigError) as caught:
        storage.extend(ctx, free_volume.name, 1)
    assert "2 GiB" in caught.value.expected and "1 GiB" in caught.value.found
    assert storage.detach(ctx, free_volume.name).status == "available"
