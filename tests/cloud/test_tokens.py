"""Tokens and credentials that end while a command runs: renewed where that can be, else said as what it is."""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CLOUD, CLOUDS_FILE, Lab, site
from labctl.cloud import credential, network, server, session, store, volume
from labctl.cloud.session import Cloud
from labctl.errors import CloudRefused

#: Seconds that a credential lives which is to end under a command: enough to log in with on a busy machine.
LIFE = 12


def application_credential(lab: Lab, **more: str) -> dict[str, Any]:
    """One of the user's, by the API itself."""
    request = {"application_credential": {"name": f"{lab.prefix}-{secrets.token_hex(3)}", **more}}
    response = lab.cloud.compute.identity.post(f"/users/{lab.cloud.user_id}/application_credentials", json=request)
    assert response.status_code == 201, response.text
    return dict(response.json()["application_credential"])


def revoke(lab: Lab, made: dict[str, Any]) -> None:
    lab.cloud.compute.identity.delete(f"/users/{lab.cloud.user_id}/application_credentials/{made['id']}")


def login_by(made: dict[str, Any], folder: Path) -> Cloud:
    entry = yaml.safe_load(CLOUDS_FILE.read_text())["clouds"][CLOUD]
    entry["auth_type"] = "v3applicationcredential"
    entry["auth"] = {
        "auth_url": entry["auth"]["auth_url"],
        "application_credential_id": made["id"],
        "application_credential_secret": made["secret"],
    }
    path = folder / "clouds.yaml"
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump({"clouds": {"t": entry}}))
    return session.connect(site(cloud="t", object_cloud="t", clouds_file=path))


def tokens(cloud: Cloud) -> int:
    return len([one for one in cloud.traffic.log if one[0] == "POST" and one[1].endswith("/auth/tokens")])


def end_token(lab: Lab, cloud: Cloud) -> None:
    """Keystone revokes it: to every service it is as one that has expired."""
    token = cloud.compute.session.get_token()
    response = lab.cloud.compute.identity.delete("/auth/tokens", headers={"X-Subject-Token": token})
    assert response.status_code == 204, response.text


@pytest.mark.parametrize("service", ["compute", "volumes", "network", "objects", "identity"])
def test_a_token_that_ends_under_a_command_is_renewed_without_a_word(lab: Lab, service: str) -> None:
    look = {
        "compute": lambda cloud: server.find(cloud, "lct-none"),
        "volumes": lambda cloud: volume.find(cloud, "lct-none"),
        "network": lambda cloud: network.ensure_groups(cloud, []),
        "objects": lambda cloud: store.stat(cloud, "lct-none"),
        "identity": lambda cloud: credential.list_ours(cloud, "lct-none"),
    }[service]
    cloud = session.connect(site())
    end_token(lab, cloud)
    assert not look(cloud)
    assert tokens(cloud) == 2, cloud.traffic.log


def test_what_is_being_made_when_the_token_ends_is_made_once(lab: Lab) -> None:
    cloud = session.connect(site())
    name = f"{lab.prefix}-token"
    end_token(lab, cloud)
    made = volume.create(cloud, name, 1, metadata={}, tell=lab.told)
    assert volume.find(cloud, name) == made
    volume.delete(cloud, made, lab.told)


def test_a_credential_that_is_revoked_under_a_command_and_one_that_was_before(lab: Lab, tmp_path: Path) -> None:
    made = application_credential(lab)
    cloud = login_by(made, tmp_path)
    revoke(lab, made)
    acts = (lambda: volume.find(cloud, "lct-none"), lambda: login_by(made, tmp_path))
    for act in acts:
        with pytest.raises(CloudRefused) as caught:
            act()
        error = caught.value
        assert "credentials" in error.what + error.expected, error.as_dict()
        assert error.found and error.source and error.next_step
        assert made["secret"] not in str(error.as_dict())


def test_a_credential_that_expires_under_a_command_and_one_that_did_before(lab: Lab, tmp_path: Path) -> None:
    ends = datetime.now(UTC) + timedelta(seconds=LIFE)
    made = application_credential(lab, expires_at=ends.strftime("%Y-%m-%dT%H:%M:%S"))
    try:
        cloud = login_by(made, tmp_path)
        time.sleep(max(0.0, (ends - datetime.now(UTC)).total_seconds()) + 1)
        acts = (lambda: server.find(cloud, "lct-none"), lambda: login_by(made, tmp_path))
        for act in acts:
            with pytest.raises(CloudRefused) as caught:
                act()
            error = caught.value
            assert "credential" in error.what + error.expected, error.as_dict()
            said = error.expected + error.next_step
            assert "expired" in said or "ended" in said, error.as_dict()
            assert error.found and error.source
    finally:
        revoke(lab, made)
