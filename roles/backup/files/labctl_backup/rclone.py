"""Running rclone: a configuration that only root can read, time limits, and errors in words that name their fix."""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

from labctl_backup.job import RUN
from labctl_job.errors import Failure

S3, VAULT = "labctl-s3", "labctl-vault"
#: rclone's exit codes for a directory or a file that isn't there.
NOT_FOUND = (3, 4)
#: Retries of a whole command would send everything again: the single requests are tried again instead.
PATIENCE = ("--contimeout", "15s", "--timeout", "2m", "--retries", "1", "--low-level-retries", "5")
_SECRET_FOLDER = "secret-"

#: What the store's words mean to a person: (part of the words, sentence, next step).
_REASONS = (
    (("quota", "413", "507", "insufficient storage"), "The object store has no room left for the backup.",
     "remove older backups (labctl backup --keep N, labctl backup delete ID) or ask for a larger quota"),
    (("401", "403", "unauthorized", "forbidden", "authorization failed"), "The object store refuses the login.",
     "labctl converge renews the server's credential, then run the command again"),
    (("connection refused", "timeout", "no such host", "no route", "network is unreachable", "reset by peer", "eof",
      "503", "502", "500"), "The object store doesn't answer.",
     "run the command again once it does: what was sent already isn't sent again"),
)  # fmt: skip


class Rclone:
    """rclone with one configuration file."""

    def __init__(self, config: str) -> None:
        self.config = config

    def run(
        self,
        *arguments: str,
        data: bytes | None = None,
        source: IO[bytes] | None = None,
        target: IO[bytes] | None = None,
        accept: Sequence[int] = (0,),
    ) -> subprocess.CompletedProcess[bytes]:
        """Run it. Failure with the store's own words unless it ends with a code of `accept`."""
        standard: dict[str, Any] = {"input": data} if source is None else {"stdin": source}
        done = subprocess.run(
            ["rclone", "--config", self.config, *PATIENCE, *arguments],
            stdout=target or subprocess.PIPE,
            stderr=subprocess.PIPE,
            check=False,
            env={"PATH": os.environ.get("PATH", os.defpath), "HOME": "/root"},
            **standard,
        )
        if done.returncode not in accept:
            raise explain(arguments, done.stderr.decode(errors="replace"))
        return done

    def listing(self, path: str, *options: str) -> list[dict[str, Any]]:
        """`lsjson` of a path; what isn't there is empty."""
        done = self.run("lsjson", "--no-mimetype", *options, path, accept=(0, *NOT_FOUND))
        if done.returncode:
            return []
        rows: list[dict[str, Any]] = json.loads(done.stdout)
        return rows


def explain(arguments: Sequence[str], words: str) -> Failure:
    """The failure of a command, as a person needs to hear it."""
    last = "\n".join(words.strip().splitlines()[-3:])[-700:]
    said = words.lower()
    if any(f"{S3}:" in part for part in arguments) and "127.0.0.1" in said:
        return Failure("The S3 server doesn't answer.", found=last, next_step="labctl status, then labctl converge")
    for parts, sentence, next_step in _REASONS:
        if any(part in said for part in parts):
            return Failure(sentence, kind="refused", found=last, next_step=next_step)
    return Failure(f"rclone {arguments[0]} failed.", kind="refused", found=last, next_step="run the command again")


@contextlib.contextmanager
def private_folder() -> Iterator[str]:
    """A folder of mode 0700 in memory, for what is secret; those of killed processes go first."""
    os.makedirs(RUN, mode=0o700, exist_ok=True)
    for name in os.listdir(RUN):
        pid = name.removeprefix(_SECRET_FOLDER).partition("-")[0]
        if name.startswith(_SECRET_FOLDER) and not os.path.exists(f"/proc/{pid}"):
            shutil.rmtree(os.path.join(RUN, name))
    with tempfile.TemporaryDirectory(prefix=f"{_SECRET_FOLDER}{os.getpid()}-", dir=RUN) as folder:
        yield folder


def remote_section(config: str, remote: str) -> dict[str, str]:
    """The options of the object store's remote in the host's rclone.conf."""
    parser = configparser.RawConfigParser(strict=False, delimiters=("=",))
    try:
        with open(config, encoding="utf-8") as handle:
            parser.read_file(handle)
        return dict(parser[remote])
    except (OSError, KeyError, configparser.Error) as error:
        raise Failure(
            f"{config} has no remote {remote}.", found=str(error), next_step="labctl converge --only rclone"
        ) from None


def write_config(folder: str, sections: dict[str, dict[str, str]]) -> Rclone:
    """rclone with these remotes, and no others, in a file that only root can read."""
    path = os.path.join(folder, "rclone.conf")
    lines = [
        line
        for name, options in sections.items()
        for line in (f"[{name}]", *(f"{key} = {value}" for key, value in options.items()), "")
    ]
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as handle:
        handle.write("\n".join(lines))
    return Rclone(path)


def s3_section(endpoint: str, user: str, password: str) -> dict[str, str]:
    """The lab's S3 server as a remote."""
    return {
        "type": "s3", "provider": "Minio", "endpoint": endpoint, "region": "us-east-1", "access_key_id": user,
        "secret_access_key": password, "no_check_bucket": "true",
    }  # fmt: skip


def vault_section(folder: str, key: str) -> dict[str, str]:
    """A folder that rclone encrypts (NaCl secretbox) with a key; names stay as they are."""
    done = subprocess.run(["rclone", "obscure", "-"], input=key.encode(), capture_output=True, check=True)
    return {
        "type": "crypt", "remote": folder, "filename_encryption": "off", "directory_name_encryption": "false",
        "password": done.stdout.decode().strip(),
    }  # fmt: skip


@contextlib.contextmanager
def names_file(names: Iterable[str]) -> Iterator[str]:
    """A file with one name a line, for --files-from-raw."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", errors="surrogateescape", prefix="labctl-") as handle:
        handle.writelines(f"{name}\n" for name in names)
        handle.flush()
        yield handle.name
