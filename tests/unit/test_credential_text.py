"""A mount that ends with its credential, unsaid, is a training run that stops at night."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from labctl.cloud import credential as credentials
from labctl.models import Credential, Server
from labctl.status import CREDENTIAL_WARNING, CredentialStatus, credential_text
from labctl.store_access import status_of, tags

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("left", "said"), [(timedelta(days=8), ""), (timedelta(days=3), "in 72 h"), (timedelta(hours=-1), "over")]
)
def test_the_end_of_the_servers_credential_is_told_a_week_before(left: timedelta, said: str) -> None:
    text = credential_text(CredentialStatus("swift", (NOW + left).strftime("%Y-%m-%dT%H:%M:%SZ")), NOW)
    assert said in text
    assert bool(text) == (left < timedelta(days=7))


def test_what_has_no_end_is_not_warned_of() -> None:
    assert credential_text(None, NOW) == credential_text(CredentialStatus("s3"), NOW) == ""


def test_a_warning_comes_only_when_up_would_renew_it() -> None:
    assert CREDENTIAL_WARNING == credentials.MARGIN


def test_the_servers_tags_tell_its_credential() -> None:
    made = Credential("c", "n", "2026-12-22T21:17:48.000000", "s")
    server = Server("i", "n", "ACTIVE", None, None, None, tags(made))
    assert status_of(server) == CredentialStatus("swift", "2026-12-22T21:17:48Z")
    assert "s" not in tags(made).values()
    key = Server("i", "n", "ACTIVE", None, None, None, tags(Credential("k", "n", None, "s", "s3")))
    assert status_of(key) == CredentialStatus("s3", None)
    assert status_of(Server("i", "n", "ACTIVE", None, None, None, {})) is status_of(None) is None
