"""Volumes and containers: no state is guessed, nothing attached is deleted, nothing is taken from another server."""

from __future__ import annotations

import http.client
import re
from urllib.parse import quote

import pytest
from conftest import Lab
from labctl.cloud import store, volume
from labctl.errors import CloudRefused
from labctl.models import Server, Volume


def test_a_volume_is_found_again_and_its_size_is_never_changed(lab: Lab, free_volume: Volume) -> None:
    found = volume.find(lab.cloud, free_volume.name)
    assert found == free_volume
    assert found is not None
    assert (found.size_gib, found.status, found.attached_to) == (1, "available", None)
    assert found.metadata == {"labctl_lab": lab.name}
    assert volume.find(lab.cloud, free_volume.name[:-1]) is None
    assert volume.size_note(found, 1) == ""
    assert "never shrink" in volume.size_note(Volume("i", "n", 3, "available", None, None), 2)
    assert "volume extend" in volume.size_note(found, 2)


def test_two_volumes_of_one_name_are_listed_and_neither_is_taken(lab: Lab, free_volume: Volume) -> None:
    twin = volume.create(lab.cloud, free_volume.name, 1, metadata={}, tell=lab.told)
    try:
        with pytest.raises(CloudRefused) as caught:
            volume.find(lab.cloud, free_volume.name)
        assert free_volume.id in caught.value.found
        assert twin.id in caught.value.found
    finally:
        volume.delete(lab.cloud, twin, lab.told)


def test_a_volume_over_the_quota_is_refused_with_the_quotas_words(lab: Lab) -> None:
    limit = int(lab.cloud.compute.block_storage.get_limits().absolute.max_total_volume_gigabytes)
    if limit < 0:
        pytest.skip("the project has no quota on gigabytes")
    with pytest.raises(CloudRefused) as caught:
        volume.create(lab.cloud, f"{lab.prefix}-huge", limit + 1, metadata={}, tell=lab.told)
    assert "quota" in caught.value.what
    assert re.search(r"quota|exceed", caught.value.detail, re.IGNORECASE)
    assert volume.find(lab.cloud, f"{lab.prefix}-huge") is None


def test_the_life_of_an_attachment(lab: Lab, free_volume: Volume, node: Server, other_node: Server) -> None:
    lab.told.words.clear()
    attached = volume.attach(lab.cloud, node, free_volume, lab.told)
    assert (attached.status, attached.attached_to) == ("in-use", node.id)
    assert lab.told.words
    before = lab.cloud.requests
    assert volume.attach(lab.cloud, node, attached, lab.told).attached_to == node.id
    assert lab.cloud.requests - before == 1

    with pytest.raises(CloudRefused) as caught:
        volume.attach(lab.cloud, other_node, attached, lab.told)
    assert node.name in caught.value.found
    assert node.id in caught.value.found
    assert caught.value.next_step

    with pytest.raises(CloudRefused, match="attached and was not deleted"):
        volume.delete(lab.cloud, attached, lab.told)
    with pytest.raises(CloudRefused, match="another server"):
        volume.detach(lab.cloud, other_node.id, attached, lab.told)
    now = volume.get(lab.cloud, free_volume.id)
    assert now is not None
    assert (now.status, now.attached_to) == ("in-use", node.id)

    assert volume.detach(lab.cloud, node.id, attached, lab.told).status == "available"
    assert volume.detach(lab.cloud, node.id, attached, lab.told).status == "available"
    # Nova still tidies up for a moment after Cinder says available: it must not come out as an error
    assert volume.attach(lab.cloud, node, free_volume, lab.told).attached_to == node.id
    volume.detach(lab.cloud, node.id, free_volume, lab.told)
    assert volume.attach(lab.cloud, other_node, free_volume, lab.told).attached_to == other_node.id


def test_a_passing_state_that_doesnt_pass_is_refused_with_a_next_step(
    lab: Lab, free_volume: Volume, node: Server
) -> None:
    block_storage = lab.cloud.compute.block_storage
    block_storage.post(f"/volumes/{free_volume.id}/action", json={"os-reserve": {}})
    try:
        with pytest.raises(CloudRefused) as caught:
            volume.attach(lab.cloud, node, free_volume, lab.told, timeout=3)
        assert "attaching" in caught.value.what or "reserved" in caught.value.what
        assert caught.value.next_step
    finally:
        block_storage.post(f"/volumes/{free_volume.id}/action", json={"os-unreserve": {}})
        volume.wait_status(lab.cloud, free_volume.id, "available", lab.told)


def test_a_volume_that_is_gone_is_no_error_to_delete_and_one_to_attach(lab: Lab, node: Server) -> None:
    gone = Volume("00000000-0000-0000-0000-000000000000", "lct-gone", 1, "available", None, None)
    assert volume.delete(lab.cloud, gone, lab.told) is False
    with pytest.raises(CloudRefused, match="gone"):
        volume.attach(lab.cloud, node, gone, lab.told)


def put(lab: Lab, container: str, name: str, body: bytes = b"1234567890") -> None:
    response = lab.cloud.objects.object_store.put(f"/{quote(container)}/{quote(name)}", data=body)
    assert response.status_code == http.client.CREATED


def test_a_container_is_made_once_and_an_existing_ones_metadata_is_left_alone(lab: Lab) -> None:
    name = f"{lab.prefix}-once"
    assert store.stat(lab.cloud, name) is None
    made, new = store.ensure_container(lab.cloud, name, {"labctl_lab": lab.name})
    assert (new, made.objects, made.metadata["labctl_lab"]) == (True, 0, lab.name)
    before = lab.cloud.requests
    again, new = store.ensure_container(lab.cloud, name, {"labctl_lab": "another"})
    assert (new, again.metadata["labctl_lab"]) == (False, lab.name)
    assert lab.cloud.requests - before == 1
    assert name in [container.name for container in store.list_containers(lab.cloud)]


def test_a_container_of_several_pages_goes_with_its_segments_and_no_other(lab: Lab) -> None:
    name = f"{lab.prefix}-pages"
    for container in (name, f"{name}_segments", f"{name}_segments2", f"{name}2"):
        store.ensure_container(lab.cloud, container, {})
        put(lab, container, "kept or not")
    names = [f"training/class_{i:02d}/{i}_ä %?#&+;.jpg" for i in range(23)]
    for each in names:
        put(lab, name, each)
    assert sorted(store.object_names(lab.cloud, name, page=5)) == sorted([*names, "kept or not"])
    lab.told.words.clear()
    assert store.delete_container(lab.cloud, name, lab.told, page=5) == 25
    assert len(lab.told.words) >= 5
    assert store.stat(lab.cloud, name) is None
    assert store.stat(lab.cloud, f"{name}_segments") is None
    assert list(store.object_names(lab.cloud, f"{name}2")) == ["kept or not"]
    assert list(store.object_names(lab.cloud, f"{name}_segments2")) == ["kept or not"]
    assert store.delete_container(lab.cloud, name, lab.told) == 0


def test_a_store_without_bulk_delete_is_emptied_all_the_same(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{lab.prefix}-nobulk"
    store.ensure_container(lab.cloud, name, {})
    put(lab, name, "a b/c?d")
    monkeypatch.setattr(store, "_bulk_result", lambda _response: None)
    monkeypatch.setattr(store, "BULK_QUERY", "?no-such-verb")
    assert store.delete_container(lab.cloud, name, lab.told) == 1
    assert store.stat(lab.cloud, name) is None
