"""Which lease a server may be launched in: a wrong choice launches nothing, or costs the server hours later."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from labctl.cli.lease import duration
from labctl.cloud.lease import record
from labctl.errors import ConfigError
from labctl.lab import LeaseSection
from labctl.leases import Wish, choose, iso, launch_flavor, reservation_for, tags
from labctl.models import Lease, Reservation
from labctl.status import lease_text
from pydantic import ValidationError

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
WISH = Wish("labctl-ada", "m1.large", "user", "project")
RESERVED = Reservation("r1", "active", "flavor:instance", "m1.large", "f1", 1)


def lease(**changes: Any) -> Lease:
    fields: dict[str, Any] = {
        "id": "l1",
        "name": "labctl-ada",
        "status": "ACTIVE",
        "starts": NOW - timedelta(hours=1),
        "ends": NOW + timedelta(days=2),
        "user_id": "user",
        "project_id": "project",
        "reservations": (RESERVED,),
    }
    return Lease(**{**fields, **changes})


@pytest.mark.parametrize("status", ["ACTIVE", "PENDING", "STARTING", "CREATING", "UPDATING"])
def test_a_lease_that_runs_or_is_about_to_is_used(status: str) -> None:
    assert choose([lease(status=status)], WISH, NOW) == ([lease(status=status)], [])


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "labctl-bob"},
        {"user_id": "somebody"},
        {"project_id": "another"},
        {"status": "TERMINATED"},
        {"status": "TERMINATING"},
        {"status": "DELETING"},
    ],
)
def test_what_isnt_ours_or_has_ended_is_passed_over_without_a_word(changes: dict[str, Any]) -> None:
    assert choose([lease(**changes)], WISH, NOW) == ([], [])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"status": "ERROR"}, "ERROR"),
        ({"starts": NOW + timedelta(days=1)}, "starts on 2026-11-23 12:00 UTC"),
        ({"ends": NOW + timedelta(minutes=59)}, "ends on 2026-11-22 12:59 UTC"),
        ({"reservations": ()}, "reserves nothing"),
        ({"reservations": (replace(RESERVED, flavor="m1.small"),)}, "1 of m1.small (active), not m1.large"),
        ({"reservations": (replace(RESERVED, status="error"),)}, "m1.large (error)"),
        ({"reservations": (replace(RESERVED, kind="physical:host", flavor=""),)}, "physical:host"),
        ({"reservations": (replace(RESERVED, amount=0),)}, "0 of m1.large"),
    ],
)
def test_one_of_ours_that_wont_do_is_named_with_the_reason(changes: dict[str, Any], said: str) -> None:
    would_do, notes = choose([lease(**changes)], WISH, NOW)
    assert would_do == []
    assert said in notes[0]
    assert "l1" in notes[0]


def test_an_active_one_comes_first_and_of_those_the_one_that_lasts_longest() -> None:
    short, long = lease(id="short"), lease(id="long", ends=NOW + timedelta(days=5))
    pending = lease(id="pending", status="PENDING", ends=NOW + timedelta(days=9))
    old = lease(id="old", status="TERMINATED")
    assert [one.id for one in choose([old, pending, short, long], WISH, NOW)[0]] == ["long", "short", "pending"]


def test_a_flavor_may_be_given_by_its_id() -> None:
    assert reservation_for(lease(), "f1") == RESERVED


def test_the_server_is_launched_with_the_reservations_own_flavor_and_tagged() -> None:
    assert launch_flavor(lease(), "m1.large") == "reservation:r1"
    assert launch_flavor(None, "m1.large") == "m1.large"
    assert tags(None) == {}
    assert tags(lease()) == {"labctl_lease_id": "l1", "labctl_lease_ends": "2026-11-24T12:00:00Z"}


def test_blazars_dates_are_utc_whatever_the_machine_thinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/Chicago")
    found = record(
        {
            "id": "l1",
            "name": "n",
            "status": "ACTIVE",
            "start_date": "2026-11-22T13:08:00.000000",
            "end_date": "2026-11-22 13:08:12",
            "reservations": [{"id": "r1", "resource_properties": '{"id": "f1", "name": "m1.large"}', "amount": 1}],
        }
    )
    assert iso(found.starts) == "2026-11-22T13:08:00Z"
    assert iso(found.ends) == "2026-11-22T13:08:12Z"
    assert found.reservations[0].flavor == "m1.large"


@pytest.mark.parametrize("properties", [None, "", "[]", "not json", '["=", "$x", "y"]'])
def test_a_reservation_of_another_kind_has_no_flavor(properties: Any) -> None:
    found = {
        "id": "l",
        "name": "n",
        "status": "ACTIVE",
        "start_date": "2026-11-22T13:08",
        "end_date": "2026-11-23T13:08",
    }
    one = {"id": "r1", "resource_type": "physical:host", "resource_properties": properties}
    assert record({**found, "reservations": [one]}).reservations[0].flavor == ""


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (timedelta(days=10), "in 10 days"),
        (timedelta(hours=48), "in 48 h"),
        (timedelta(minutes=90), "in 90 min"),
        (timedelta(seconds=-1), "over"),
    ],
)
def test_the_table_says_when_the_lease_ends(left: timedelta, said: str) -> None:
    text = lease_text(iso(NOW + left), NOW)
    assert said in text
    assert ("WARNING" in text) == (left < timedelta(hours=48))


def test_how_long_a_lease_lasts() -> None:
    assert LeaseSection().duration == timedelta(days=7)
    assert LeaseSection(hours=6).duration == timedelta(hours=6)
    assert LeaseSection(days=1, hours=6).duration == timedelta(hours=30)
    with pytest.raises(ValidationError):
        LeaseSection(days=0)


def test_a_duration_of_the_command_line() -> None:
    assert [duration(text, "x") for text in ("48h", "2d", "90m")] == [
        timedelta(hours=48),
        timedelta(days=2),
        timedelta(minutes=90),
    ]
    for wrong in ("", "48", "h", "-1h", "1.5h", "2w"):
        with pytest.raises(ConfigError):
            duration(wrong, "x")
