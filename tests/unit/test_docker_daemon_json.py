"""What of a host's own daemon.json would be lost."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "roles" / "docker" / "module_utils"))

from daemon_json import BadConfig, merge, parse, render

OURS: dict[str, Any] = {
    "log-driver": "local",
    "log-opts": {"max-size": "10m"},
    "insecure-registries": ["198.51.100.3:5000"],
}


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ({}, OURS),
        ({"data-root": "/big"}, {"data-root": "/big", **OURS}),
        ({"insecure-registries": ["a:1"]}, {**OURS, "insecure-registries": ["198.51.100.3:5000", "a:1"]}),
        ({"log-driver": "local", "log-opts": {"compress": "no", "max-size": "1m"}},
         {**OURS, "log-opts": {"compress": "no", "max-size": "10m"}}),
        # An option of another driver would keep dockerd from starting.
        ({"log-driver": "syslog", "log-opts": {"syslog-address": "udp://h"}}, OURS),
    ],
)  # fmt: skip
def test_keys_of_the_owner_stay(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    merged = merge(found, OURS)
    assert merged == wanted
    assert merge(merged, OURS) == merged


def test_a_file_that_says_it_already_is_not_rewritten_in_our_style() -> None:
    text = json.dumps(OURS)
    assert render(parse(text, "f"), text, OURS) == text


@pytest.mark.parametrize("text", ["{", "[]", "null", '"x"'])
def test_a_file_that_cannot_be_merged_with_stops(text: str) -> None:
    with pytest.raises(BadConfig, match="daemon"):
        parse(text, "daemon.json")


def test_an_empty_file_is_no_settings() -> None:
    assert parse(" \n", "f") == {}
