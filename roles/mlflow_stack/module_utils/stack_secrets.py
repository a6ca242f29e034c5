"""The stack's secrets: made once, kept on the volume, handed to containers as files and to nobody else."""

from __future__ import annotations

import json
import os
import re
import secrets as random
import tempfile

FILE = "secrets.json"
#: What the tutorial's compose file says, for all the world to read: tried on a volume that has no secrets of labctl's.
TUTORIAL = {
    "postgres_user": "user",
    "postgres_database": "mlflowdb",
    "postgres_password": "password",
    "s3_user": "your-access-key",
    "s3_password": "your-secret-key",
}
#: What a name of a user or database may be: it stands in addresses and in compose's own files.
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,62}")


def generate() -> dict[str, str]:
    """New names and secrets. The names are fixed at this moment for the volume's life, as PostgreSQL's are."""
    return {
        "postgres_user": "mlflow",
        "postgres_database": "mlflowdb",
        "postgres_password": random.token_urlsafe(32),
        "s3_user": "labctl",
        "s3_password": random.token_urlsafe(32),
        "jupyter_token": random.token_hex(24),
    }


def adopted(given: dict[str, str]) -> dict[str, str]:
    """The credentials of a volume that was made without labctl: what its owner says, or the tutorial's.

    Raises ValueError for what can't be used; the text holds no secret.
    """
    values = {**TUTORIAL, **{key: str(value) for key, value in given.items() if value}}
    if given and set(TUTORIAL) - set(given):
        raise ValueError(f"{', '.join(sorted(set(TUTORIAL) - set(given)))} missing")
    for key in ("postgres_user", "postgres_database"):
        if not NAME.fullmatch(values[key]):
            raise ValueError(f"{key} isn't a plain name of letters, digits, '_', '.' and '-'")
    if any(not values[key].isprintable() or '"' in values[key] or "\\" in values[key] for key in TUTORIAL):
        raise ValueError("a value holds a quote, a backslash or a character that can't be printed")
    return {**values, "jupyter_token": random.token_hex(24)}


def load(directory: str) -> dict[str, str] | None:
    """The volume's secrets, or None where none were made yet; ValueError if the file lacks one."""
    try:
        with open(os.path.join(directory, FILE), encoding="utf-8") as handle:
            values = json.load(handle)
    except FileNotFoundError:
        return None
    if not isinstance(values, dict) or not all(isinstance(values.get(key), str) for key in generate()):
        raise ValueError(f"{directory}/{FILE} lacks one of {', '.join(generate())}")
    return values


def keep(directory: str, values: dict[str, str]) -> bool:
    """Write the file that all others are derived from; True if it differed."""
    return write(directory, FILE, json.dumps(values, indent=1) + "\n", 0, 0o600)


def files(values: dict[str, str], postgres_uid: int, s3_uid: int, mlflow_uid: int) -> dict[str, tuple[str, int]]:
    """Each container's file (name → content, uid that may read it), all derived from the one that is kept."""
    user, password = values["s3_user"], values["s3_password"]
    aws = f"[default]\naws_access_key_id = {user}\naws_secret_access_key = {password}\n"
    return {
        "postgres_password": (values["postgres_password"], postgres_uid),
        "pgpass": (f"*:*:*:{values['postgres_user']}:{values['postgres_password']}\n", mlflow_uid),
        "s3_user": (user, s3_uid),
        "s3_password": (password, s3_uid),
        "s3_curl": (f'user = "{user}:{password}"\n', s3_uid),
        "aws_credentials": (aws, mlflow_uid),
        "jupyter_token": (values["jupyter_token"], 1000),
        # Runs of the tutorial's time name their artifacts s3://…: a notebook reads them from the S3 server itself.
        "jupyter_aws_credentials": (aws, 1000),
    }


def write(directory: str, name: str, content: str, uid: int, mode: int = 0o400) -> bool:
    """Bring one secret file to its content, owner and mode; True if it differed. Durable before it is visible."""
    path = os.path.join(directory, name)
    try:
        found = os.lstat(path)
        with open(path, encoding="utf-8") as handle:
            if handle.read() == content and (found.st_uid, found.st_mode & 0o7777) == (uid, mode):
                return False
    except FileNotFoundError:
        pass
    descriptor, temporary = tempfile.mkstemp(prefix=".new-", dir=directory)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            os.fchown(handle.fileno(), uid, uid)
            os.fchmod(handle.fileno(), mode)
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return True


def scrub(text: str, values: dict[str, str] | None) -> str:
    """Text without any of the secrets, for messages."""
    for key, value in (values or {}).items():
        if key.endswith(("password", "token")) and value and value != TUTORIAL.get(key):
            text = text.replace(value, "***")
    return text
