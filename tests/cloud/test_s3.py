"""The store's other dialect: EC2 keys that open the container over S3, and open nothing once they are revoked."""

from __future__ import annotations

import logging

import pytest
from conftest import Lab
from labctl.cloud import ec2, store
from labctl.models import Credential


@pytest.fixture
def bucket(lab: Lab) -> str:
    """A container with an object; goes with the prefix."""
    name = f"{lab.prefix}-s3"
    store.ensure_container(lab.cloud, name, {})
    return name


def test_the_probe_tells_a_store_that_speaks_s3_from_a_host_that_doesnt(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ec2.offered(lab.cloud)
    keystone = lab.cloud.object_auth_url.removesuffix("/v3")
    monkeypatch.setattr(type(lab.cloud.store), "s3_endpoint", keystone)
    assert not ec2.offered(lab.cloud)


def test_a_key_opens_the_container_until_it_is_revoked(lab: Lab, bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        key = ec2.create(lab.cloud)
        try:
            assert (key.dialect, key.expires_at) == ("s3", None)
            assert ec2.exists(lab.cloud, key.id)
            assert ec2.refusal(lab.cloud, key, bucket) == ""
            wrong = Credential(key.id, key.name, None, "0" * 32, "s3")
            assert "SignatureDoesNotMatch" in ec2.refusal(lab.cloud, wrong, bucket)
        finally:
            assert ec2.delete(lab.cloud, key.id) is True
        assert not ec2.exists(lab.cloud, key.id)
        assert ec2.delete(lab.cloud, key.id) is False
        assert "HTTP 403" in ec2.refusal(lab.cloud, key, bucket)
    assert caplog.records
    assert str(key.secret) not in caplog.text + repr(key)


def test_what_s3_clients_leave_beside_a_container_goes_with_it(lab: Lab) -> None:
    name = f"{lab.prefix}-multi"
    for container in (name, f"{name}+segments", f"{name}_segments"):
        store.ensure_container(lab.cloud, container, {})
        lab.cloud.objects.object_store.put(f"/{container}/part", data=b"1")
    assert store.delete_container(lab.cloud, name, lab.told) == 3
    assert not [one.name for one in store.list_containers(lab.cloud) if one.name.startswith(name)]
