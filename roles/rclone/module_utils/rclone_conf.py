"""One remote's section in an rclone.conf: read it, replace it, leave everything else as it is, letter by letter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

HEADER = re.compile(r"^\s*\[(?P<name>[^\]]+)\]\s*$")
COMMENT = ("#", ";")
# Any other option may be a secret: of another kind of remote too, one that is about to be replaced.
PUBLIC = {
    "access_key_id",
    "application_credential_id",
    "auth",
    "endpoint",
    "fetch_until_empty_page",
    "max_upload_parts",
    "no_check_bucket",
    "provider",
    "region",
    "type",
    "user_id",
}
ENCRYPTED = "RCLONE_ENCRYPT_V0:"


class BadConfig(Exception):
    """A configuration that can't be read."""


def refuse_unreadable(text: str) -> None:
    """BadConfig for a configuration that rclone has encrypted."""
    if any(line.strip() == ENCRYPTED for line in text.splitlines()):
        raise BadConfig("the configuration is encrypted")


def _sections(text: str) -> tuple[list[str], list[tuple[str, int, int]]]:
    """(name, first line, line after the last) of each section, in order; a comment belongs to what it stands above."""
    lines = text.splitlines(keepends=True)
    starts = [(number, match["name"]) for number, line in enumerate(lines) if (match := HEADER.match(line))]
    sections = []
    for number, (start, name) in enumerate(starts):
        end = starts[number + 1][0] if number + 1 < len(starts) else len(lines)
        while not lines[end - 1].strip() or lines[end - 1].lstrip().startswith(COMMENT):
            end -= 1
        sections.append((name, start, end))
    return lines, sections


def _options(lines: Iterable[str]) -> dict[str, str]:
    """key → value of the lines of a section."""
    pairs = (line.split("=", 1) for line in lines if "=" in line and not line.lstrip().startswith(COMMENT))
    return {key.strip(): value.strip() for key, value in pairs}


def section(text: str, remote: str) -> dict[str, str]:
    """The options of a remote; empty if there is no such remote."""
    lines, sections = _sections(text)
    return next((_options(lines[start + 1 : end]) for name, start, end in sections if name == remote), {})


def shown(options: Mapping[str, str]) -> str:
    """The options as lines that may be shown to anybody."""
    return "".join(f"{key} = {value if key in PUBLIC else '(hidden)'}\n" for key, value in options.items())


def secret_of(text: str, identity_option: str, identity: str, secret_option: str) -> str:
    """The secret of the first remote, whatever its name, with this identity; else empty."""
    lines, sections = _sections(text)
    for _name, start, end in sections:
        options = _options(lines[start + 1 : end])
        if options.get(identity_option) == identity and options.get(secret_option):
            return options[secret_option]
    return ""


def with_section(text: str, remote: str, options: Mapping[str, str]) -> str:
    """`text` with the remote's section saying `options`; the very same text if it says so already."""
    if section(text, remote) == options:
        return text
    wanted = [f"[{remote}]\n", *(f"{key} = {value}\n" for key, value in options.items())]
    lines, sections = _sections(text)
    for name, start, end in sections:
        if name == remote:
            return "".join([*lines[:start], *wanted, *lines[end:]])
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    return "".join([*lines, *(["\n"] if lines else []), *wanted])
