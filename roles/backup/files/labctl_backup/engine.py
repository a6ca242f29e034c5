"""The servers of a restore: PostgreSQL and S3 in containers of their own, without published ports."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from labctl_backup.source import Database
from labctl_job.errors import Failure

POSTGRES, S3 = "labctl-restore-postgres", "labctl-restore-s3"
#: Whom the stack's new directories belong to: the official PostgreSQL image's user, and mlflow_stack's for S3.
POSTGRES_UID, S3_UID = 999, 10001
LAB_SERVICES = ("jupyter", "mlflow", "s3", "postgres")
READY_SECONDS = 180
#: PostgreSQL may have a long checkpoint to write.
STOP_SECONDS = "180"


def docker(*arguments: str, check: bool = True, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run docker. Failure with its last words if it fails and `check` is set."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False, **more)
    if check and done.returncode:
        raise Failure(
            f"docker {arguments[0]} failed.", found=done.stderr.strip()[-600:], next_step="run the same command again"
        )
    return done


def majors(images: dict[str, str]) -> tuple[dict[str, str], str]:
    """({PostgreSQL major: image}, the major that new volumes get). Images that aren't on the host are pulled."""
    found: dict[str, str] = {}
    default = ""
    for name, image in sorted(images.items()):
        if name.partition("-")[0] != "postgres":
            continue
        if (
            docker("image", "inspect", image, check=False).returncode
            and docker("pull", "--quiet", image, check=False).returncode
        ):
            continue  # an image that can't be had can't be chosen
        environment = json.loads(docker("image", "inspect", "-f", "{{json .Config.Env}}", image).stdout) or []
        major = next((line.partition("=")[2] for line in environment if line.startswith("PG_MAJOR=")), "")
        if major.isdigit():
            found[major] = image
            default = major if name == "postgres" else default
    return found, default


def mlflow_version(images: dict[str, str]) -> str:
    """What the MLflow image says of itself, "" where it doesn't."""
    label = '{{index .Config.Labels "org.opencontainers.image.version"}}'
    return docker("image", "inspect", "-f", label, images.get("mlflow", ""), check=False).stdout.strip()


def remove(*names: str) -> None:
    """Stop these containers cleanly and remove them; one that isn't there is no error."""
    for name in names:
        docker("stop", "-t", STOP_SECONDS, name, check=False)
        docker("rm", "-f", "-v", name, check=False)


def stop_lab() -> None:
    """The lab's own services, writers first: what they serve is about to change."""
    for name in LAB_SERVICES:
        docker("stop", "-t", STOP_SECONDS, name, check=False)


def bind(source: str, target: str, *, read_only: bool = False) -> list[str]:
    """A bind mount; Docker refuses one whose source is missing."""
    return ["--mount", f"type=bind,source={source},target={target}{',readonly' if read_only else ''}"]


def secret_file(folder: str, name: str, content: str, uid: int) -> str:
    """A file that only the container's user reads."""
    path = os.path.join(folder, name)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "w", encoding="utf-8") as handle:
        os.fchown(handle.fileno(), uid, uid)
        handle.write(content)
    return path


def start_postgres(image: str, directory: str, folder: str, secrets: dict[str, str]) -> Database:
    """A new cluster in an empty directory, with the lab's user and database."""
    remove(POSTGRES)
    password = secret_file(folder, "postgres_password", secrets["postgres_password"], POSTGRES_UID)
    docker(
        "run", "-d", "--name", POSTGRES, "--network", "none", "--user", f"{POSTGRES_UID}:{POSTGRES_UID}",
        "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true", "--shm-size", "256m",
        "--stop-signal", "SIGINT",
        "-e", f"POSTGRES_USER={secrets['postgres_user']}", "-e", f"POSTGRES_DB={secrets['postgres_database']}",
        "-e", "POSTGRES_PASSWORD_FILE=/run/secrets/postgres_password", "-e", "PGDATA=/var/lib/postgresql/data",
        *bind(directory, "/var/lib/postgresql/data"),
        *bind(password, "/run/secrets/postgres_password", read_only=True), image,
    )  # fmt: skip
    # over TCP it answers only once the cluster is complete
    _until_ready(POSTGRES, ["docker", "exec", POSTGRES, "pg_isready", "-q", "-h", "127.0.0.1"])
    return Database(POSTGRES, secrets["postgres_user"], secrets["postgres_database"])


def start_s3(image: str, flavour: str, directory: str, folder: str, secrets: dict[str, str]) -> str:
    """An S3 server on a directory, with the lab's keys. Returns its URL, which only this host reaches."""
    remove(S3)
    user = secret_file(folder, "s3_user", secrets["s3_user"], S3_UID)
    password = secret_file(folder, "s3_password", secrets["s3_password"], S3_UID)
    options = ["-e", "MINIO_ROOT_USER_FILE=/run/secrets/s3_user", "-e", "MINIO_BROWSER=off", "-e", "MINIO_UPDATE=off",
               "-e", "MINIO_ROOT_PASSWORD_FILE=/run/secrets/s3_password"]  # fmt: skip
    command = ["server", "/data"]
    if flavour == "rclone":
        # as the stack's compose file starts it: the keys come from files, into rclone's own process only
        options = ["--entrypoint", "sh"]
        command = ["-c", 'RCLONE_AUTH_KEY="\\"$(cat /run/secrets/s3_user),$(cat /run/secrets/s3_password)\\"" '
                   "exec rclone serve s3 /data --addr :9000 --vfs-cache-mode writes --cache-dir /tmp/rclone"
                   " --config /tmp/rclone.conf"]  # fmt: skip
    docker(
        "run", "-d", "--name", S3, "--user", f"{S3_UID}:{S3_UID}", "--cap-drop", "ALL",
        "--security-opt", "no-new-privileges:true", *options, *bind(directory, "/data"),
        *bind(user, "/run/secrets/s3_user", read_only=True),
        *bind(password, "/run/secrets/s3_password", read_only=True), image, *command,
    )  # fmt: skip
    address = docker("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", S3).stdout.strip()
    url = f"http://{address}:9000"
    _until_ready(S3, ["curl", "-s", "-o", "/dev/null", "-m", "5", url])
    return url


def _until_ready(container: str, probe: Sequence[str]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while subprocess.run(probe, capture_output=True, check=False).returncode:
        running = docker("inspect", "-f", "{{.State.Running}}", container, check=False).stdout.strip() == "true"
        if not running or time.monotonic() > deadline:
            log = docker("logs", "--tail", "12", container, check=False)
            raise Failure(
                f"The server of the restore ({container}) doesn't come up.",
                found=(log.stdout + log.stderr).strip()[-800:],
                next_step="run the same command again: it continues",
            )
        time.sleep(0.3)


def pg_restore(database: Database, dump: str) -> None:
    """The dump into the empty database, as one transaction: all of it, or nothing."""
    with open(dump, "rb") as source:
        done = subprocess.run(
            ["docker", "exec", "-i", database.container, "pg_restore", "--no-owner", "--no-privileges",
             "--exit-on-error", "--single-transaction", "-U", database.user, "-d", database.database],
            stdin=source, capture_output=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise Failure("pg_restore failed.", found=done.stderr.decode(errors="replace").strip()[-600:])
