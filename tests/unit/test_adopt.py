"""Whose something is, and which one is meant: a wrong guess would use or delete what somebody else needs."""

from __future__ import annotations

import pytest
from labctl import adopt
from labctl.cloud import META_LAB, ownership
from labctl.cloud.network import extra_rules, missing_rules
from labctl.errors import CloudRefused
from labctl.models import Rule, Volume

ME, MATE = "u-me", "u-mate"


def volume(number: int, user: str = ME, lab: str = "") -> Volume:
    metadata = {META_LAB: lab} if lab else {}
    return Volume(
        f"id-{number}", "block-persist-ada", 2, "available", None, None, metadata, user_id=user, created="2026-11-01"
    )


@pytest.mark.parametrize(
    ("tag", "maker", "ours"),
    [("ada", MATE, True), (None, ME, True), (None, "", True), (None, MATE, False), ("bob", ME, False)],
)
def test_what_a_mate_made_or_another_lab_has_is_not_ours(tag: str | None, maker: str, ours: bool) -> None:
    assert (ownership.verdict(tag, maker, ME, "ada") == "") is ours


@pytest.mark.parametrize(
    ("wanted", "found", "meant"),
    [
        ("block-persist-ada", [], None),
        ("block-persist-ada", [volume(1)], "id-1"),
        ("id-1", [volume(1, MATE)], "id-1"),  # somebody else's: by its id only
        ("block-persist-ada", [volume(1, MATE, "ada")], "id-1"),  # a mate's lab that is shared: tagged as this one
        ("block-persist-ada", [volume(1), volume(2, ME, "ada")], "id-2"),  # adopted before
        ("block-persist-ada", [volume(1), volume(2, MATE, "bob"), volume(3, MATE, "ada")], "id-3"),
    ],
)
def test_what_is_clear_is_taken(wanted: str, found: list[Volume], meant: str | None) -> None:
    one = adopt.pick("volume", wanted, found, "ada", ME, asked=False)
    assert (one.id if one else None) == meant


@pytest.mark.parametrize(
    ("wanted", "found", "says"),
    [
        ("block-persist-ada", [volume(1), volume(2)], "there are 2"),
        ("block-persist-ada", [volume(1), volume(2, MATE)], "there are 2"),  # not even if only one is ours
        ("block-persist-ada", [volume(1, ME, "ada"), volume(2, ME, "ada")], "there are 2"),
        ("block-persist-ada", [volume(1, MATE)], "isn't yours"),
        ("id-1", [volume(1, ME, "bob")], "isn't yours"),  # another lab's: not by its id either
    ],
)
def test_what_is_not_clear_is_asked_for_by_id(wanted: str, found: list[Volume], says: str) -> None:
    with pytest.raises(CloudRefused, match=says) as caught:
        adopt.pick("volume", wanted, found, "ada", ME, asked=False)
    assert all(one.id in caught.value.found for one in found)


def test_what_was_named_must_be_there() -> None:
    with pytest.raises(CloudRefused, match="There is no volume"):
        adopt.pick("volume", "gone", [], "ada", ME, asked=True)


def test_the_labs_name_is_what_follows_the_tutorials_prefixes() -> None:
    assert adopt.only_suffix(["node-persist-ada", "block-persist-ada", "another"]) == "ada"
    for names in (["another"], ["node-persist-ada", "block-persist-bob"], []):
        with pytest.raises(CloudRefused):
            adopt.only_suffix(names)


def rule(low: int | None, high: int | None, prefix: str | None = None, **more: object) -> dict[str, object]:
    known = {"direction": "ingress", "protocol": "tcp", "ethertype": "IPv4", "remote_ip_prefix": prefix}
    return {**known, "port_range_min": low, "port_range_max": high, **more}


@pytest.mark.parametrize(
    ("existing", "missing", "extra"),
    [
        ([rule(22, 22)], 0, 0),  # no source is everywhere
        ([rule(22, 22, "0.0.0.0/0", protocol="6")], 0, 0),
        ([rule(22, 22, "10.0.0.0/8")], 1, 1),
        ([rule(22, 22), rule(1, 65535)], 0, 1),  # wider than wanted
        ([rule(22, 22, remote_group_id="g")], 1, 1),
        ([rule(22, 22, ethertype="IPv6")], 1, 1),
        ([rule(22, 22), rule(None, None, protocol=None)], 0, 1),
        ([rule(22, 22), rule(None, None, protocol=None, direction="egress")], 0, 0),  # what goes out stays
        ([], 1, 0),
    ],
)
def test_a_group_lets_in_what_lab_yaml_says_and_nothing_else(
    existing: list[dict[str, object]], missing: int, extra: int
) -> None:
    wanted = [Rule(22), Rule(22)]
    assert (len(missing_rules(wanted, existing)), len(extra_rules(wanted, existing))) == (missing, extra)
