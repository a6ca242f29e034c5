"""The host as the program finds it: its settings, the volume, the secrets."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import stack_marker

from labctl_backup import decide
from labctl_backup.job import RUN
from labctl_backup.model import key_id
from labctl_backup.rclone import (
    S3,
    VAULT,
    Rclone,
    private_folder,
    remote_section,
    s3_section,
    vault_section,
    write_config,
)
from labctl_backup.source import read_json_file
from labctl_backup.store import Store
from labctl_job.errors import Failure
from labctl_job.job import read_json

SETTINGS = "/etc/labctl/backup.json"
SECRETS_DIR = ".labctl/secrets"
SECRETS_FILE, KEY_FILE = f"{SECRETS_DIR}/secrets.json", f"{SECRETS_DIR}/backup_key"
WORKSPACE = "workspace"
#: Keys that the user's machine brought (a JSON list), for one restore.
KEYS = os.path.join(RUN, "keys.json")
#: Where the stack keeps data unless the marker points elsewhere.
DATA_PLACES = ("postgres_data", "minio_data", "rclone_s3_data")
STAGING = "/var/lib/labctl/backup"


@dataclass(frozen=True)
class Settings:
    """What the role wrote for the program. `s3_endpoint` is the lab's S3 server as this host reaches it."""

    lab: str
    data_dir: str
    remote: str
    container: str
    rclone_config: str
    s3_endpoint: str
    s3_flavour: str
    labctl_version: str
    images: dict[str, str] = field(default_factory=dict)
    keep: int = 0

    def at(self, *parts: str) -> str:
        """A path on the volume."""
        return os.path.join(self.data_dir, *parts)


def settings(container: str = "") -> Settings:
    """The settings; `container` names another lab's."""
    document = read_json_file(SETTINGS)
    return Settings(**{**document, **({"container": container} if container else {})})


def mounted(path: str) -> bool:
    """Whether something is mounted at path."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        return any(line.split()[4] == path for line in table)


def marker(here: Settings) -> dict[str, Any]:
    """The volume's marker. A safety stop where the volume isn't mounted, or isn't a lab's."""
    if not mounted(here.data_dir):
        raise decide.stop(
            f"No volume is mounted at {here.data_dir}.", "the lab's volume", "no mount", "labctl converge"
        )
    found = read_json(here.at(stack_marker.MARKER))
    if not isinstance(found, dict) or not found.get("volume_id"):
        raise decide.stop(
            f"What is mounted at {here.data_dir} has no marker.", "a labctl volume", "no readable volume.json",
            "labctl converge",
        )  # fmt: skip
    return found


def stack_of(here: Settings) -> dict[str, Any]:
    """Which data the stack serves. A safety stop where the marker doesn't say it clearly."""
    try:
        return dict(stack_marker.read(here.data_dir))
    except stack_marker.MarkerError as error:
        raise decide.stop(
            "The volume's marker can't be used.", "a readable marker", str(error), "labctl status"
        ) from None


def secrets_of(here: Settings) -> dict[str, str]:
    """The lab's secrets."""
    return {key: str(value) for key, value in read_json_file(here.at(SECRETS_FILE)).items()}


def hostname() -> str:
    """What this host calls itself."""
    return socket.gethostname()


def free_bytes(path: str) -> int:
    """What root may still write there."""
    return shutil.disk_usage(path).free


# -- keys ----------------------------------------------------------------------------------------------------------


def own_key(here: Settings, *, make: bool = False) -> str:
    """The volume's backup key, "" where there is none; with `make`, one is made."""
    path = here.at(KEY_FILE)
    try:
        with open(path, encoding="ascii") as handle:
            return handle.read().strip()
    except FileNotFoundError:
        if not make:
            return ""
    import secrets

    keep_key(here, secrets.token_urlsafe(32))
    return own_key(here)


def keep_key(here: Settings, key: str) -> None:
    """Put a key on the volume, durable before it is visible; never over another."""
    path = here.at(KEY_FILE)
    temporary = f"{path}.new"
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as handle:
        handle.write(key + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        os.unlink(temporary)
    stack_marker.sync_directory(os.path.dirname(path))


def keys_at_hand(here: Settings) -> dict[str, str]:
    """{id: key} of the volume's own and of those that the user's machine brought."""
    brought = read_json(KEYS)
    found = [str(key) for key in brought] if isinstance(brought, list) else []
    if mounted(here.data_dir) and (own := own_key(here)):
        found.append(own)
    return {key_id(key): key for key in found}


# -- remotes -------------------------------------------------------------------------------------------------------


@contextmanager
def remotes(here: Settings, *, s3: dict[str, str] | None = None, key: str = "") -> Iterator[tuple[Rclone, Store, str]]:
    """(rclone, the store, a private folder). `s3`: secrets of the lab's S3 server; `key` makes the folder's vault."""
    with private_folder() as folder:
        section = remote_section(here.rclone_config, here.remote)
        sections = {here.remote: section}
        if s3 is not None:
            sections[S3] = s3_section(here.s3_endpoint, s3["s3_user"], s3["s3_password"])
        if key:
            os.mkdir(vault := os.path.join(folder, "vault"), 0o700)
            sections[VAULT] = vault_section(vault, key)
        rclone = write_config(folder, sections)
        yield rclone, Store(rclone, here.remote, here.container, section.get("type") == "swift"), folder


def encrypt(rclone: Rclone, folder: str, data: bytes) -> str:
    """The path of `data` encrypted; it never is on a disk in the clear."""
    rclone.run("rcat", f"{VAULT}:secrets.json", data=data)
    return os.path.join(folder, "vault", "secrets.json.bin")


def decrypt(rclone: Rclone, folder: str, encrypted: bytes) -> bytes:
    """What `encrypt` was given. Failure where the key is another, or a byte differs."""
    with open(os.path.join(folder, "vault", "secrets.json.bin"), "wb") as handle:
        handle.write(encrypted)
    try:
        return rclone.run("cat", f"{VAULT}:secrets.json").stdout
    except Failure as failure:
        raise Failure(
            "The backup's secrets can't be decrypted.",
            expected="the key that they were encrypted with",
            found=failure.found,
            next_step="--key-file with the right key, or --new-secrets",
        ) from None
