"""Backups of a lab's volume in the object store, their schedule, and the way back.

The work is done by a program on the lab's server (role `backup`), as a unit of its own: a connection that breaks or a
Ctrl-C here doesn't end it, and the same command finds it again. Here are the order of steps, the keys, and the words.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labctl import __version__, jobs, lifecycle, resources
from labctl.cloud import META_BACKUP_KEEP, META_BACKUP_SCHEDULE, META_LAB
from labctl.cloud import store as stores
from labctl.cloud import volume as volumes
from labctl.context import Context
from labctl.errors import ConfigError, ConvergeFailed
from labctl.lifecycle import Verification
from labctl.models import Server

#: Where the role puts the program.
PROGRAM = "/usr/local/lib/labctl/labctl_backup"
#: Where the program looks for keys that this machine brings.
KEYS_ON_HOST = "/run/labctl-backup/keys.json"
#: The role's task that asks systemd about a schedule.
CHECK_TASK = "systemd understands the schedule"
#: What a restore needs of the host; the services come up on what was restored.
HOST_ROLES = ("block_volume", "docker", "rclone")


@dataclass(frozen=True)
class Wish:
    """A restore as it was asked for; `key_file` holds a backup key, `from_lab` is another lab's name."""

    set: str = "latest"
    beside: bool = False
    into_new_major: bool = False
    new_secrets: bool = False
    again: bool = False
    from_lab: str = ""
    key_file: Path | None = None

    @property
    def arguments(self) -> list[str]:
        """For the program."""
        flags = {
            "--beside": self.beside,
            "--into-new-major": self.into_new_major,
            "--new-secrets": self.new_secrets,
            "--again": self.again,
        }
        return [self.set, *(flag for flag, on in flags.items() if on)]


def container_of(lab: str) -> str:
    """The container that holds a lab's backups."""
    return f"backup-persist-{lab}"


# -- commands ------------------------------------------------------------------------------------------------------


def backup(ctx: Context, *, keep: int | None = None, force: bool = False) -> dict[str, Any]:
    """Back the lab up now. With `keep`, older complete sets beyond that many go once the new one is complete."""
    server = lifecycle.existing_server(ctx)
    stores.ensure_container(ctx.cloud, container_of(ctx.lab.lab), {META_LAB: ctx.lab.lab})
    kept = [] if keep is None else ["--keep", str(keep)]
    result = run(ctx, server, ["backup", *kept, *(["--force"] if force else [])])
    result["key_file"] = str(keep_key(ctx, server))
    return result


def schedule(ctx: Context, expression: str, keep: int | None) -> None:
    """Back up by a timer on the server. The volume's metadata remembers it, for the next server."""
    server, volume = lifecycle.existing_server(ctx), lifecycle.existing_volume(ctx)
    off = expression == "off"
    if not off:
        stores.ensure_container(ctx.cloud, container_of(ctx.lab.lab), {META_LAB: ctx.lab.lab})
    # the host first: it knows whether systemd understands the expression
    variables = {"backup_entry": "main", "backup_schedule": expression, "backup_keep": keep or 0}
    try:
        lifecycle.play(ctx, server, "backup.yml", {**variables, "backup_check_schedule": True}, volume=volume)
    except ConvergeFailed as failed:
        if CHECK_TASK not in failed.what:
            raise
        raise ConfigError(
            f"systemd doesn't understand the schedule {expression!r}.",
            expected="daily, hourly, weekly, 'Mon 03:00' or another expression of OnCalendar= (man systemd.time)",
            found=failed.detail,
            source="--schedule",
            next_step="labctl backup --schedule daily",
        ) from None
    remembered = {META_BACKUP_SCHEDULE: "" if off else expression, META_BACKUP_KEEP: "" if off else str(keep or 0)}
    volumes.set_metadata(ctx.cloud, volume.id, **remembered)


def listed(ctx: Context, from_lab: str = "") -> dict[str, Any]:
    """Every set in the container, newest first."""
    return run(ctx, lifecycle.existing_server(ctx), ["list", *_container(from_lab)])


def verify(ctx: Context, wanted: str, from_lab: str = "") -> dict[str, Any]:
    """Read back every byte of a set. SafetyStop if anything isn't what it was."""
    return run(ctx, lifecycle.existing_server(ctx), ["verify", wanted, *_container(from_lab)])


def delete(ctx: Context, set_id: str) -> dict[str, Any]:
    """Delete one set, and the objects that only it named."""
    return run(ctx, lifecycle.existing_server(ctx), ["delete", set_id])


def delete_all(ctx: Context) -> int:
    """Delete the lab's backup container with everything in it; needs no server. Returns how many objects went."""
    name = container_of(ctx.lab.lab)
    with ctx.progress.step(f"delete container {name}") as step:
        return stores.delete_container(ctx.cloud, name, step.tell)


def restore(ctx: Context, wish: Wish) -> tuple[dict[str, Any], Verification]:
    """Bring a lab back from a backup: host and volume as `up` does, the data, then the services, read back.

    An empty volume gets the data; one with data keeps it untouched, and is served beside it if that was asked for.
    """
    keys = known_keys(ctx, wish.from_lab)
    if wish.key_file:
        keys.append(_read_key(wish.key_file))
    server, volume = lifecycle.provide(ctx)
    lifecycle.converge_host(ctx, server, volume, only=HOST_ROLES)
    send_keys(ctx, server, keys)
    result = run(ctx, server, ["restore", *wish.arguments, *_container(wish.from_lab)])
    return result, _serve(ctx)


def undo(ctx: Context) -> tuple[dict[str, Any], Verification]:
    """Serve again what was served before the last restore. Nothing is deleted."""
    server = lifecycle.existing_server(ctx)
    result = run(ctx, server, ["undo"])
    return result, _serve(ctx)


def _serve(ctx: Context) -> Verification:
    """The services on what the marker points to now, and everything read back."""
    # the server as it is now: its record names the credential that the first converge made
    server, volume = lifecycle.existing_server(ctx), lifecycle.existing_volume(ctx)
    lifecycle.converge_host(ctx, server, volume, never_format=True)
    return lifecycle.verify(ctx)


def what_stays(ctx: Context) -> str:
    """What `destroy` leaves, in words; "" where there is nothing."""
    found = stores.stat(ctx.cloud, container_of(ctx.lab.lab))
    if found is None or not found.objects:
        return ""
    size = f"{found.objects} objects, {found.bytes / 1e6:.1f} MB"
    return f"The backups stay: container {found.name} ({size}). labctl backup delete --all removes them."


def _container(from_lab: str) -> list[str]:
    return ["--container", container_of(from_lab)] if from_lab else []


# -- jobs on the server --------------------------------------------------------------------------------------------


def run(ctx: Context, server: Server, arguments: Sequence[str]) -> dict[str, Any]:
    """Run one of the program's commands on the server and tell its progress. Its error becomes labctl's."""
    variables = {"backup_job": list(arguments), "backup_job_wait": False, "labctl_version": __version__}
    started = lifecycle.play(ctx, server, "backup.yml", variables).data.get("backup_job", {})
    if started.get("running") and started.get("arguments") != list(arguments):
        running = " ".join(started.get("arguments") or ["another job"])
        raise ConvergeFailed(
            f"The server is busy with: {running}.", next_step="wait for it, then run the command again"
        )
    with ctx.progress.step(f"{arguments[0]} on {server.name}") as step:
        ended = jobs.follow(ctx, server, PROGRAM, str(started["job"]), lambda found: step.tell(jobs.words(found)))
    for note in ended.get("notes", []):
        ctx.progress.note(note)
    return dict(ended["result"])


# -- keys ----------------------------------------------------------------------------------------------------------


def key_folder(ctx: Context, lab: str = "") -> Path:
    """Where this machine keeps a lab's backup keys."""
    return resources.state_directory() / ctx.site.name / (lab or ctx.lab.lab) / "backup-keys"


def key_id(key: str) -> str:
    """A key's name, as the program on the server computes it."""
    return hashlib.sha256(b"labctl backup key\0" + key.encode()).hexdigest()[:12]


def keep_key(ctx: Context, server: Server) -> Path:
    """The volume's backup key into a file (0600) of this machine; returns its path."""
    found = jobs.on_host(ctx, server, ["sudo", "-n", "python3", PROGRAM, "key"])
    path = key_folder(ctx) / f"{found['key_id']}.key"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
            handle.write(found["key"] + "\n")
        ctx.progress.note(
            f"The key to this lab's backed-up passwords is in {path}. Keep a copy of it elsewhere: without it a restore"
            " brings back all data, and makes new passwords."
        )
    return path


def known_keys(ctx: Context, from_lab: str = "") -> list[str]:
    """The keys that this machine has for the lab, and for the one whose backup is asked for."""
    folders = [key_folder(ctx), *([key_folder(ctx, from_lab)] if from_lab else [])]
    return [path.read_text().strip() for folder in folders for path in sorted(folder.glob("*.key"))]


def send_keys(ctx: Context, server: Server, keys: list[str]) -> None:
    """Keys to the server, through standard input into memory that only root reads; they go when the restore ends."""
    if keys:
        script = f"umask 077; mkdir -p {Path(KEYS_ON_HOST).parent}; cat > {KEYS_ON_HOST}"
        jobs.on_host(ctx, server, ["sudo", "-n", "sh", "-c", f"'{script}'"], json.dumps(keys))


def _read_key(path: Path) -> str:
    try:
        return path.expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The key file {path} can't be read.", found=str(error), source="--key-file", next_step="name another"
        ) from None
