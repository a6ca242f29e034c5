"""What a daemon.json should hold, given what is on the host: pure decisions."""

from __future__ import annotations

import json
from typing import Any


class BadConfig(Exception):
    """The daemon.json on the host can't be merged with."""


def parse(text: str, path: str) -> dict[str, Any]:
    """The settings in daemon.json; BadConfig unless it is a JSON object (or empty)."""
    if not text.strip():
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise BadConfig(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadConfig(f"{path} holds a JSON {type(found).__name__}, not an object")
    return found


def merge(found: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """What daemon.json should hold: `settings` over `found`; keys that `settings` doesn't name stay."""
    merged = dict(found)
    for key, value in settings.items():
        before = found.get(key)
        if isinstance(value, list) and isinstance(before, list):
            merged[key] = value + [item for item in before if item not in value]
        elif key == "log-opts" and isinstance(before, dict) and found.get("log-driver") == settings.get("log-driver"):
            merged[key] = {**before, **value}
        else:
            merged[key] = value
    return merged


def render(found: dict[str, Any], text: str, settings: dict[str, Any]) -> str:
    """The text of daemon.json; the very text on the host if that says the same already."""
    wanted = merge(found, settings)
    return text if wanted == found and text else json.dumps(wanted, indent=2) + "\n"
