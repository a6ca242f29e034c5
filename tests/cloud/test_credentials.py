"""Credentials of every kind, against a real Keystone and store: what is wrong is said before anything is made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CLOUDS_FILE, Lab, object_entry, site
from labctl import lab as labs
from labctl import leases, store_access
from labctl.cloud import credential, ec2, lease, session, store
from labctl.context import Context
from labctl.errors import CloudRefused, ConfigError
from labctl.models import Server
from labctl.progress import Progress
from rich.console import Console


class Clicks:
    """Application credentials as a person makes them, in Horizon or by the openstack command; all go at the end."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.ids = lab, []

    def make(self, name: str, *, unrestricted: bool = False, ends: datetime | None = None) -> Any:
        made = self.lab.cloud.objects.identity.create_application_credential(
            self.lab.cloud.store.user_id,
            f"{self.lab.prefix}-{name}",
            unrestricted=unrestricted,
            expires_at=ends.strftime("%Y-%m-%dT%H:%M:%S") if ends else None,
        )
        self.ids.append(made.id)
        return made

    def openrc(self, folder: Path, made: Any, **more: str) -> Path:
        """As Horizon hands it out."""
        lines = {
            "OS_AUTH_TYPE": "v3applicationcredential",
            "OS_AUTH_URL": self.lab.cloud.object_auth_url,
            "OS_IDENTITY_API_VERSION": "3",
            "OS_INTERFACE": "public",
            "OS_APPLICATION_CREDENTIAL_ID": made.id,
            "OS_APPLICATION_CREDENTIAL_SECRET": made.secret,
            **more,
        }
        path = folder / f"{made.name}-openrc.sh"
        text = "".join(f"export {key}={value}\n" for key, value in lines.items() if value)
        path.write_text(f"#!/usr/bin/env bash\n\n{text}")
        path.chmod(0o600)
        return path

    def revoke(self) -> None:
        for each in self.ids:
            credential.delete(self.lab.cloud, each)


@pytest.fixture
def clicks(lab: Lab) -> Iterator[Clicks]:
    made = Clicks(lab)
    yield made
    made.revoke()


@pytest.fixture
def context(lab: Lab, tmp_path: Path) -> Callable[..., Context]:
    """A lab of this run as a command sees it, logged in as the site's changes say."""

    def make(login: dict[str, Any] | None = None, **object_store: str) -> Context:
        path = tmp_path / "lab.yaml"
        text = {"lab": lab.name, "object_store": {"container": f"{lab.prefix}-access", **object_store}}
        path.write_text(yaml.safe_dump(text))
        ctx = Context(labs.load(path), Progress(Console(quiet=True)), lambda _: False)
        ctx.site = site(**(login or {}))
        return ctx

    return make


def as_file(path: Path) -> dict[str, Any]:
    """The site's changes for a login by a downloaded file, at both sites."""
    return {
        "credentials_file": path,
        "object_credentials_file": path,
        "region": session.connect(site()).region,
        "object_region": yaml.safe_load(CLOUDS_FILE.read_text())["clouds"][object_entry()]["region_name"],
    }


def server(number: int, **metadata: str) -> Server:
    """A server's record: only its id and what it is tagged with count here."""
    return Server(f"{number:08x}-0000", "node", "ACTIVE", None, None, None, metadata)


def test_an_openrc_with_an_application_credential_logs_in_at_both_sites(
    lab: Lab, clicks: Clicks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = clicks.openrc(tmp_path, clicks.make("login"))
    monkeypatch.setenv("OS_PROJECT_NAME", "left over from an older openrc, which Keystone answers with 401")
    cloud = session.connect(site(**as_file(path)))
    assert (cloud.project_id, cloud.store.project_id) == (lab.cloud.project_id, lab.cloud.store.project_id)
    assert cloud.by_application_credential


def test_an_application_credential_in_the_environment_is_not_spoilt_by_an_older_openrcs_project(
    lab: Lab, clicks: Clicks, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = clicks.make("sourced")
    for key, value in {
        "OS_AUTH_TYPE": "v3applicationcredential",
        "OS_AUTH_URL": lab.cloud.object_auth_url,
        "OS_APPLICATION_CREDENTIAL_ID": made.id,
        "OS_APPLICATION_CREDENTIAL_SECRET": made.secret,
        "OS_PROJECT_ID": lab.cloud.project_id,
        "OS_PROJECT_DOMAIN_NAME": "default",
        "OS_REGION_NAME": lab.cloud.region,
    }.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("OS_CLOUD", raising=False)
    cloud = session.connect(site(cloud=None, object_cloud=None, clouds_file=None))
    assert cloud.project_id == lab.cloud.project_id


def test_a_token_in_the_environment_logs_in_as_chameleons_jupyter_has_it(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {
        "OS_AUTH_TYPE": "v3token",
        "OS_AUTH_URL": lab.cloud.auth_url,
        "OS_TOKEN": lab.cloud.compute.session.get_token(),
        "OS_PROJECT_ID": lab.cloud.project_id,
        "OS_REGION_NAME": lab.cloud.region,
    }.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("OS_CLOUD", raising=False)
    login = site(cloud=None, object_cloud=None, clouds_file=None, object_region=lab.cloud.object_region)
    cloud = session.connect(login)
    assert cloud.store.project_id == lab.cloud.store.project_id
    monkeypatch.setenv("OS_TOKEN", "gAAAAA-not-a-token")
    with pytest.raises(CloudRefused) as caught:
        session.connect(login)
    assert "token" in caught.value.expected
    assert "gAAAAA-not-a-token" not in str(caught.value.as_dict())


def test_a_login_that_lacks_its_secret_is_told_without_a_request(clicks: Clicks, tmp_path: Path) -> None:
    made = clicks.make("half")
    path = clicks.openrc(tmp_path, made, OS_APPLICATION_CREDENTIAL_SECRET="")
    with pytest.raises(ConfigError) as caught:
        session.connect(site(**as_file(path)))
    assert "application_credential_secret" in caught.value.what
    assert str(path) in caught.value.source


def test_a_credential_that_ended_is_refused_with_how_to_make_another(clicks: Clicks, tmp_path: Path) -> None:
    made = clicks.make("ended", ends=datetime.now(UTC) + timedelta(seconds=2))
    path = clicks.openrc(tmp_path, made)
    ended = datetime.fromisoformat(made.expires_at).replace(tzinfo=UTC)
    while datetime.now(UTC) <= ended + timedelta(seconds=1):
        time.sleep(0.2)
    refused = _refused(path)
    assert "neither ended nor" in refused.expected
    assert "application credential create --unrestricted" in refused.next_step or "Horizon" in refused.next_step
    assert str(made.secret) not in str(refused.as_dict())


def _refused(path: Path) -> CloudRefused:
    with pytest.raises(CloudRefused) as caught:
        session.connect(site(**as_file(path)))
    return caught.value


def test_a_revoked_credential_is_refused(lab: Lab, clicks: Clicks, tmp_path: Path) -> None:
    made = clicks.make("revoked")
    path = clicks.openrc(tmp_path, made)
    credential.delete(lab.cloud, made.id)
    assert "revoked" in _refused(path).expected


@pytest.mark.parametrize("dialect", ["auto", "swift", "s3"])
def test_a_restricted_login_is_told_so_with_the_command_before_anything_is_made(
    clicks: Clicks, context: Callable[..., Context], tmp_path: Path, dialect: str
) -> None:
    path = clicks.openrc(tmp_path, clicks.make("restricted"))
    ctx = context(as_file(path), dialect=dialect)
    with pytest.raises(CloudRefused) as caught:
        store_access.check(ctx, None)
    assert "password or token" in caught.value.expected
    assert "credentials_file" in caught.value.next_step
    command = (
        "openstack ec2 credentials create" if dialect == "s3" else "openstack application credential create --role"
    )
    assert command in caught.value.next_step
    assert {method for method, _, _ in ctx.cloud.traffic.log} <= {"GET", "POST", "HEAD"}
    assert [url for method, url, _ in ctx.cloud.traffic.log if method == "POST" and "auth/tokens" not in url] == []


def test_a_restricted_login_is_told_that_it_can_make_no_lease_before_anything_is_made(
    clicks: Clicks, context: Callable[..., Context], tmp_path: Path
) -> None:
    path = clicks.openrc(tmp_path, clicks.make("restricted"))
    ctx = context({**as_file(path), "needs_lease": True})
    if not lease.offered(ctx.cloud):
        pytest.skip("the cloud has no leases")
    with pytest.raises(CloudRefused) as caught:
        leases.refuse_if_unmakeable(ctx, None)
    assert "restricted" in caught.value.found
    assert "lease.name" in caught.value.next_step
    assert str(path) in caught.value.source
    leases.refuse_if_unmakeable(ctx, server(8))  # it has a server: no lease is needed for one


def test_a_credential_given_at_the_prompt_is_proved_and_used(
    clicks: Clicks, context: Callable[..., Context], tmp_path: Path
) -> None:
    path = clicks.openrc(tmp_path, clicks.make("restricted"))
    ends = datetime.now(UTC) + timedelta(days=2)
    by_hand = clicks.make("by-hand", ends=ends)
    asked: list[tuple[str, bool]] = []

    def prompt(question: str, hidden: bool) -> str:
        asked.append((question, hidden))
        return str(by_hand.secret if hidden else by_hand.id)

    ctx = context(as_file(path))
    ctx.prompt = prompt
    made = store_access.renewed(ctx, server(1))
    assert made is not None
    assert (made.id, made.name, made.secret) == (by_hand.id, by_hand.name, by_hand.secret)
    assert str(made.expires_at).startswith(ends.strftime("%Y-%m-%dT%H:%M"))
    assert [hidden for _, hidden in asked] == [False, True]
    again = context(as_file(path))
    assert store_access.serves(again, server(1, **store_access.tags(made)))


def test_what_a_person_made_is_named_when_the_server_goes_and_not_revoked(
    lab: Lab, clicks: Clicks, context: Callable[..., Context]
) -> None:
    ctx = context()
    told: list[str] = []
    ctx.progress.note = told.append  # type: ignore[method-assign]
    by_hand = clicks.make("theirs")
    store_access.revoke(ctx, server(7, labctl_credential_id=by_hand.id))
    assert [by_hand.id in text for text in told] == [True]
    assert by_hand.id in [one.id for one in credential.list_all(ctx.cloud)]
    store_access.revoke(ctx, server(7, labctl_credential_id="0" * 32))
    assert len(told) == 1


def test_a_wrong_secret_from_the_prompt_is_refused_and_not_shown(
    clicks: Clicks, context: Callable[..., Context], tmp_path: Path
) -> None:
    by_hand = clicks.make("by-hand")
    ctx = context(as_file(clicks.openrc(tmp_path, clicks.make("restricted"))))
    ctx.prompt = lambda _, hidden: "not-the-secret-5512" if hidden else by_hand.id
    with pytest.raises(CloudRefused) as caught:
        store_access.check(ctx, None)
    assert "not-the-secret-5512" not in str(caught.value.as_dict())


def test_a_credential_is_taken_from_a_private_file_only(
    lab: Lab, clicks: Clicks, context: Callable[..., Context], tmp_path: Path
) -> None:
    by_hand = clicks.make("in-a-file")
    path = clicks.openrc(tmp_path, by_hand)
    made = store_access.renewed(context(credentials_file=str(path)), server(2))
    assert made is not None
    assert made.id == by_hand.id
    assert store_access.serves(context(credentials_file=str(path)), server(2, **store_access.tags(made)))
    assert not store_access.serves(context(credentials_file=str(path)), server(2, labctl_credential_id="another"))
    with pytest.raises(ConfigError, match="for the dialect swift"):
        store_access.check(context(credentials_file=str(path), dialect="s3"), None)
    path.chmod(0o644)
    with pytest.raises(ConfigError) as caught:
        store_access.check(context(credentials_file=str(path)), None)
    assert caught.value.next_step == f"chmod 600 {path}"


def test_a_key_from_a_private_file_is_proved_over_s3(lab: Lab, context: Callable[..., Context], tmp_path: Path) -> None:
    key = ec2.create(lab.cloud)
    path = tmp_path / "ec2rc.sh"
    try:
        path.write_text(f"export EC2_ACCESS_KEY={key.id}\nexport EC2_SECRET_KEY={key.secret}\n")
        path.chmod(0o600)
        plan = store_access.check(context(credentials_file=str(path)), None)
        assert (plan.dialect, plan.given and plan.given.id) == ("s3", key.id)
        path.write_text(f"export EC2_ACCESS_KEY={key.id}\nexport EC2_SECRET_KEY=wrong\n")
        with pytest.raises(CloudRefused, match="doesn't open the object store"):
            store_access.check(context(credentials_file=str(path)), None)
    finally:
        ec2.delete(lab.cloud, key.id)


def test_the_servers_credential_is_renewed_before_it_ends_and_the_old_one_works_until_then(
    lab: Lab, context: Callable[..., Context]
) -> None:
    ctx = context()
    store.ensure_container(ctx.cloud, ctx.lab.container_name, {})
    old = credential.create(ctx.cloud, ctx.lab.lab, server(3).id, datetime.now(UTC) + timedelta(days=2))
    before = server(3, **store_access.tags(old))
    made = store_access.renewed(ctx, before)
    assert made is not None
    assert {old.id, made.id} <= {one.id for one in credential.list_ours(ctx.cloud, ctx.lab.lab)}
    store_access.revoke(ctx, before, keep=made.id)
    assert [one.id for one in credential.list_ours(ctx.cloud, ctx.lab.lab)] == [made.id]
    assert store_access.renewed(context(), server(3, **store_access.tags(made))) is None
    store_access.revoke(ctx, server(3, **store_access.tags(made)))
    assert credential.list_ours(ctx.cloud, ctx.lab.lab) == []


def test_a_login_that_cant_renew_goes_on_with_what_still_works_and_says_until_when(
    lab: Lab, clicks: Clicks, context: Callable[..., Context], tmp_path: Path
) -> None:
    made = credential.create(lab.cloud, lab.name, server(9).id, datetime.now(UTC) + timedelta(days=2))
    ctx = context(as_file(clicks.openrc(tmp_path, clicks.make("restricted"))))
    told: list[str] = []
    ctx.progress.note = told.append  # type: ignore[method-assign]
    assert store_access.renewed(ctx, server(9, **store_access.tags(made))) is None
    assert [str(made.expires_at) in text for text in told] == [True]
    credential.delete(lab.cloud, made.id)


def test_a_key_is_remembered_where_it_outlives_the_server_and_is_revoked_without_it(
    lab: Lab, context: Callable[..., Context]
) -> None:
    own = {"dialect": "s3", "container": f"{lab.prefix}-keys"}
    ctx = context(**own)
    store.ensure_container(ctx.cloud, ctx.lab.container_name, {"labctl_lab": lab.name})
    made = store_access.renewed(ctx, server(4))
    assert made is not None
    assert made.dialect == "s3"
    assert store_access.renewed(context(**own), server(4, **store_access.tags(made))) is None
    # the server went with its lease: the next one gets a key of its own, and the one before goes
    after = store_access.renewed(context(**own), server(5))
    assert after is not None
    assert store_access.s3_keys(ctx) == [made.id, after.id]
    store_access.revoke(ctx, server(5), keep=after.id)
    assert (ec2.exists(ctx.cloud, made.id), ec2.exists(ctx.cloud, after.id)) == (False, True)
    store_access.revoke(ctx, server(5, **store_access.tags(after)))
    assert not ec2.exists(ctx.cloud, after.id)
    found = store.stat(ctx.cloud, ctx.lab.container_name)
    assert found is not None
    assert found.metadata == {"labctl_lab": lab.name}


def test_another_dialect_in_lab_yaml_is_another_credential(lab: Lab, context: Callable[..., Context]) -> None:
    ctx = context(dialect="swift")
    made = credential.create(ctx.cloud, ctx.lab.lab, server(6).id)
    has_swift = server(6, **store_access.tags(made))
    assert store_access.check(ctx, has_swift).dialect == ""
    assert store_access.check(context(), has_swift).dialect == ""
    assert store_access.check(context(dialect="s3"), has_swift).dialect == "s3"
    assert store_access.check(context(), None).dialect == "swift"
    store_access.revoke(ctx, has_swift)
