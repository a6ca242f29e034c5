"""Files with secrets, and the one that lab.yaml names for a volume that neither labctl nor the tutorial made.

That one is needed once, when the volume is adopted, and travels as a secret: a 0600 file, gone once Ansible read it.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

from labctl.errors import ConfigError

#: The variables of a compose file's .env, and what the role calls them.
KEYS = {
    "POSTGRES_USER": "postgres_user",
    "POSTGRES_PASSWORD": "postgres_password",
    "POSTGRES_DB": "postgres_database",
    "MINIO_ROOT_USER": "s3_user",
    "MINIO_ROOT_PASSWORD": "s3_password",
}


def read(path: Path, source: str) -> dict[str, str]:
    """The five values by the role's names, from KEY=VALUE lines as a compose .env has them; other keys are left out.

    Raises ConfigError for a file that is missing, readable by others, or lacks one; the text holds no value.
    """
    expected = f"lines KEY=VALUE with {', '.join(KEYS)}, and the mode 0600"
    text = private_text(
        path,
        "passwords",
        source,
        lambda why: ConfigError(
            f"The volume's credentials file {path} can't be read.",
            expected,
            why,
            source,
            "write it, or leave credentials_file out of lab.yaml once the volume is adopted",
        ),
    )
    found = dict(pairs(text))
    if missing := [key for key in KEYS if not found.get(key)]:
        raise ConfigError(
            f"{path} lacks {', '.join(missing)}.",
            expected,
            f"{', '.join(key for key in KEYS if found.get(key)) or 'none of them'}",
            source,
            f"add the missing lines to {path}",
        )
    return {name: found[key] for key, name in KEYS.items()}


def private_text(path: Path, holds: str, source: str, unreadable: Callable[[str], ConfigError]) -> str:
    """The text of a file with secrets.

    Raises what `unreadable` makes of the reason if it can't be read, and ConfigError if others may read it.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(str(error.strerror if isinstance(error, OSError) else "isn't text")) from None
    if mode & 0o077:
        raise ConfigError(
            f"Others may read {path}, which holds {holds}.", "the mode 0600", f"{mode:04o}", source, f"chmod 600 {path}"
        )
    return text


def pairs(text: str) -> list[tuple[str, str]]:
    """The assignments of a compose .env or an openrc: one pair of quotes taken off."""
    pairs = []
    for line in text.splitlines():
        key, equals, value = line.strip().removeprefix("export ").partition("=")
        if not equals or key.startswith("#"):
            continue
        value = value.strip()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        pairs.append((key.strip(), value))
    return pairs
