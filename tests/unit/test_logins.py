"""Which login a site is reached with: one that is another site's, or half of one, fails late and says little."""

from __future__ import annotations

from pathlib import Path

import pytest
from keystoneauth1.access import AccessInfoV3
from labctl import lab as labs
from labctl.cloud import logins, session
from labctl.errors import CloudRefused, ConfigError
from labctl.models import Site
from labctl.sites import site_of


@pytest.fixture(autouse=True)
def _no_login_of_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for key in [key for key in os.environ if key.startswith("OS_")]:
        monkeypatch.delenv(key)


def chameleon(folder: Path, **cloud: str) -> Site:
    path = folder / "lab.yaml"
    lines = "".join(f"  {key}: {value}\n" for key, value in cloud.items())
    path.write_text("lab: ada\nsite: chameleon\n" + (f"cloud:\n{lines}" if lines else ""))
    return site_of(labs.load(path))


def openrc(folder: Path, name: str, **values: str) -> Path:
    path = folder / name
    path.write_text("".join(f'export {key}="{value}"\n' for key, value in values.items()))
    path.chmod(0o600)
    return path


def test_jupyters_token_is_taken_to_each_sites_own_keystone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OS_AUTH_TYPE", "v3oidcaccesstoken")
    monkeypatch.setenv("OS_AUTH_URL", "https://chi.uc.chameleoncloud.org:5000/v3")
    monkeypatch.setenv("OS_ACCESS_TOKEN", "t")
    site = chameleon(tmp_path)
    compute, objects = logins.for_compute(site), logins.for_objects(site)
    assert compute.values == {"auth_url": "https://kvm.tacc.chameleoncloud.org:5000/v3"}
    assert objects.values == {"auth_url": "https://chi.tacc.chameleoncloud.org:5000/v3"}
    assert compute.from_environment
    assert (compute.region, objects.region) == ("KVM@TACC", "CHI@TACC")


def test_each_site_has_a_file_of_its_own(tmp_path: Path) -> None:
    for name, host in (("kvm", "kvm.tacc"), ("chi", "chi.tacc")):
        openrc(
            tmp_path,
            f"{name}.sh",
            OS_AUTH_TYPE="v3applicationcredential",
            OS_AUTH_URL=f"https://{host}.chameleoncloud.org:5000/v3",
            OS_APPLICATION_CREDENTIAL_ID=name,
            OS_APPLICATION_CREDENTIAL_SECRET="secret",
        )
    site = chameleon(tmp_path, credentials=f"{tmp_path}/kvm.sh", object_credentials=f"{tmp_path}/chi.sh")
    compute, objects = logins.for_compute(site), logins.for_objects(site)
    assert (compute.values["application_credential_id"], objects.values["application_credential_id"]) == ("kvm", "chi")
    assert "secret" not in repr(compute)
    assert "https://chi.tacc.chameleoncloud.org/identity/application_credentials/" in objects.mend
    assert "object_credentials" in objects.mend


def test_horizons_clouds_yaml_needs_no_entrys_name(tmp_path: Path) -> None:
    path = tmp_path / "clouds.yaml"
    path.write_text(
        "clouds:\n  openstack:\n    auth:\n      auth_url: https://kvm.tacc.chameleoncloud.org:5000/v3\n"
        "      application_credential_id: a\n      application_credential_secret: s\n"
        "    auth_type: v3applicationcredential\n    region_name: KVM@TACC\n"
    )
    path.chmod(0o600)
    login = logins.for_compute(chameleon(tmp_path, credentials=str(path)))
    assert (login.auth_type, login.values["application_credential_id"]) == ("v3applicationcredential", "a")


def test_an_openrc_that_asks_for_a_password_is_told_apart(tmp_path: Path) -> None:
    path = openrc(
        tmp_path,
        "rc.sh",
        OS_AUTH_URL="https://kvm.tacc.chameleoncloud.org:5000/v3",
        OS_USERNAME="ada",
        OS_PROJECT_NAME="CHI-1",
        OS_PASSWORD="$OS_PASSWORD_INPUT",
    )
    with pytest.raises(ConfigError) as caught:
        logins.for_compute(chameleon(tmp_path, credentials=str(path)))
    assert "password" in caught.value.what
    assert "asks for the password" in caught.value.found
    assert "source the openrc" in caught.value.next_step


def test_nothing_at_all_names_the_page_and_the_click(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        logins.for_compute(chameleon(tmp_path))
    assert "https://kvm.tacc.chameleoncloud.org/identity/application_credentials/" in caught.value.next_step
    assert "Unrestricted" in caught.value.next_step


def test_a_file_that_others_can_read_is_no_place_for_a_secret(tmp_path: Path) -> None:
    path = openrc(tmp_path, "rc.sh", OS_AUTH_URL="https://h:5000/v3")
    path.chmod(0o640)
    with pytest.raises(ConfigError) as caught:
        logins.for_compute(chameleon(tmp_path, credentials=str(path)))
    assert caught.value.next_step == f"chmod 600 {path}"


def test_a_login_of_a_site_without_a_store_is_told_where_the_stores_own_is_made(tmp_path: Path) -> None:
    """Chameleon's KVM site knows nothing of the object store at CHI@TACC."""
    endpoint = {"region": "KVM@TACC", "interface": "public", "url": "https://kvm.tacc.chameleoncloud.org:8774"}
    body = {"token": {"catalog": [{"type": "compute", "endpoints": [endpoint]}], "methods": [], "user": {"id": "u"}}}
    openrc(
        tmp_path,
        "kvm.sh",
        OS_AUTH_URL="https://kvm.tacc.chameleoncloud.org:5000/v3",
        OS_APPLICATION_CREDENTIAL_ID="i",
        OS_APPLICATION_CREDENTIAL_SECRET="s",
    )
    login = logins.for_objects(chameleon(tmp_path, credentials=f"{tmp_path}/kvm.sh"))
    with pytest.raises(CloudRefused) as caught:
        session._region(AccessInfoV3(body), "object-store", login, "object_region")
    assert "https://chi.tacc.chameleoncloud.org/identity/application_credentials/" in caught.value.next_step
    assert "cloud: {object_credentials: FILE}" in caught.value.next_step
