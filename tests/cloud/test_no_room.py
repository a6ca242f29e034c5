"""A volume that the cloud's scheduler finds no room for ends in state error, and so may one with data: the first is
made anew, the second never touched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from admin import Operator, project_of_its_own
from conftest import FLAVOR, IMAGE, Lab
from labctl import lifecycle, teardown
from labctl.cloud import META_LAB, volume
from labctl.context import Context
from labctl.errors import CloudRefused
from labctl.lab import Lab as LabFile
from labctl.lab import ServerSection, VolumeSection
from labctl.models import Volume
from labctl.progress import Progress
from rich.console import Console

#: GiB that no back end of a test cloud has.
TOO_MANY = 400_000


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Operator, Lab]]:
    with project_of_its_own(tmp_path_factory.mktemp("own")) as made:
        yield made


@pytest.fixture
def own(both: tuple[Operator, Lab]) -> Iterator[Lab]:
    admin, own = both
    with admin.quota("block_storage", gigabytes=10 * TOO_MANY):
        yield own


def context(own: Lab, folder: Path) -> Context:
    section = ServerSection(flavor=FLAVOR, image=IMAGE, ssh_key=str(folder / "key"))
    lab = LabFile(lab=own.prefix, server=section, volume=VolumeSection(name=f"{own.prefix}-disk", size_gib=1))
    ctx = Context(lab, Progress(Console(quiet=True)), lambda _: False)
    ctx.site = own.cloud.site
    ctx.__dict__["cloud"] = own.cloud
    return ctx


def left_by_an_interrupted_run(own: Lab, name: str) -> Volume:
    """A volume in state error that the scheduler found no room for, tagged as the lab's."""
    api = own.cloud.compute.block_storage
    made = api.create_volume(name=name, size=TOO_MANY, metadata={META_LAB: own.prefix})
    api.wait_for_status(made, "error", failures=["available"], wait=60)
    found = volume.get(own.cloud, made.id)
    assert found is not None
    return found


def test_no_room_is_said_in_the_clouds_words_and_leaves_nothing(own: Lab) -> None:
    with pytest.raises(CloudRefused) as caught:
        volume.create(own.cloud, f"{own.prefix}-huge", TOO_MANY, metadata={}, tell=own.told)
    assert "no room" in caught.value.what and "backend" in caught.value.found
    assert caught.value.next_step
    assert volume.find(own.cloud, f"{own.prefix}-huge") is None


def test_what_an_interrupted_run_left_without_room_is_made_anew(own: Lab, tmp_path: Path) -> None:
    ctx = context(own, tmp_path)
    left = left_by_an_interrupted_run(own, ctx.lab.volume_name)
    assert lifecycle.without_failure(ctx, left) is None
    assert volume.get(own.cloud, left.id) is None
    again = lifecycle.provide_volume(ctx, None)
    assert again.status == "available"
    volume.delete(own.cloud, again, own.told)


def test_a_volume_that_was_somewhere_is_never_taken_for_one_that_was_not(
    own: Lab, both: tuple[Operator, Lab], tmp_path: Path
) -> None:
    ctx = context(own, tmp_path)
    whole = volume.create(own.cloud, ctx.lab.volume_name, 1, metadata={META_LAB: own.prefix}, tell=own.told)
    with both[0].volume_status(whole.id, "error"):
        broken = volume.get(own.cloud, whole.id)
        assert broken is not None and broken.status == "error"
        assert volume.never_placed(own.cloud, broken) == ""
        assert lifecycle.without_failure(ctx, broken) == broken
    assert volume.get(own.cloud, whole.id) is not None
    volume.delete(own.cloud, whole, own.told)


def test_another_labs_volume_without_room_is_left_alone(own: Lab, tmp_path: Path) -> None:
    left = left_by_an_interrupted_run(own, f"{own.prefix}-disk")
    ctx = context(own, tmp_path)
    ctx.lab = ctx.lab.model_copy(update={"lab": "somebody-else"})
    assert lifecycle.without_failure(ctx, left) == left
    assert volume.get(own.cloud, left.id) is not None
    volume.delete(own.cloud, left, own.told)


def test_destroy_takes_a_volume_in_error_too(own: Lab, both: tuple[Operator, Lab], tmp_path: Path) -> None:
    """Its name was typed; a cloud deletes what is in error, and nobody else would."""
    ctx = context(own, tmp_path)
    whole = volume.create(own.cloud, ctx.lab.volume_name, 1, metadata={META_LAB: own.prefix}, tell=own.told)
    both[0].reset(whole.id, "error")
    teardown.destroy(ctx)
    assert volume.get(own.cloud, whole.id) is None
