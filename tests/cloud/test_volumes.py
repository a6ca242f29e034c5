"""Extending a volume, attached or not: what a client sees of it, and what is refused."""

from __future__ import annotations

import re
import secrets

import pytest
from conftest import Lab
from labctl.cloud import volume
from labctl.errors import CloudRefused
from labctl.models import Server, Volume


def test_a_free_volume_is_extended_once_and_never_made_smaller(lab: Lab, free_volume: Volume) -> None:
    extended = volume.extend(lab.cloud, free_volume, 2, lab.told)
    assert (extended.id, extended.size_gib, extended.status) == (free_volume.id, 2, "available")
    before = lab.cloud.requests
    assert volume.extend(lab.cloud, extended, 2, lab.told) == extended
    assert lab.cloud.requests - before == 1
    with pytest.raises(CloudRefused, match="never shrink"):
        volume.extend(lab.cloud, extended, 1, lab.told)
    now = volume.get(lab.cloud, free_volume.id)
    assert now is not None and now.size_gib == 2


def test_an_attached_volume_is_extended_where_it_is(lab: Lab, free_volume: Volume, node: Server) -> None:
    volume.attach(lab.cloud, node, free_volume, lab.told)
    extended = volume.extend(lab.cloud, free_volume, 2, lab.told)
    assert (extended.size_gib, extended.status, extended.attached_to) == (2, "in-use", node.id)


def test_extending_over_the_quota_is_refused_in_cinders_words_and_the_volume_stays(
    lab: Lab, free_volume: Volume
) -> None:
    limit = int(lab.cloud.compute.block_storage.get_limits().absolute.max_total_volume_gigabytes)
    if limit < 0:
        pytest.skip("the project has no quota on gigabytes")
    with pytest.raises(CloudRefused) as caught:
        volume.extend(lab.cloud, free_volume, limit + 1, lab.told)
    assert "quota" in caught.value.what
    assert re.search(r"quota|exceed", caught.value.detail, re.IGNORECASE)
    now = volume.get(lab.cloud, free_volume.id)
    assert now is not None and (now.size_gib, now.status) == (1, "available")


def test_an_extension_that_was_begun_is_waited_for(lab: Lab, free_volume: Volume) -> None:
    """The command that asked for it was killed; the next one must neither fail nor ask again."""
    body = {"os-extend": {"new_size": 2}}
    assert lab.cloud.compute.block_storage.post(f"/volumes/{free_volume.id}/action", json=body).status_code == 202
    assert volume.extend(lab.cloud, free_volume, 2, lab.told).size_gib == 2


def test_a_volume_that_is_gone_is_told(lab: Lab) -> None:
    gone = Volume("00000000-0000-0000-0000-000000000000", f"lct-{secrets.token_hex(2)}", 1, "available", None, None)
    with pytest.raises(CloudRefused, match="gone"):
        volume.extend(lab.cloud, gone, 2, lab.told)
