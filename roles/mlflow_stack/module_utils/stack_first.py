"""The first start on a new volume, which may be cut off.

What PostgreSQL and the S3 server had begun to make is told from data by a note on the volume. It is written before
they start and goes once both answer, which is before MLflow starts: while it is there, nobody can have logged a run. It
counts only as long as the marker names no database.
"""

from __future__ import annotations

import json
import os
import time

from ansible.module_utils import stack_docker as docker
from ansible.module_utils.stack_plan import POSTGRES_FOLDER, S3_FOLDERS, VolumeState

NOTE = ".labctl/first-start.json"
#: Seconds for a database that was cut off while it was made to answer after all; a complete one takes two.
GRACE = 60


def begin(data_dir: str) -> None:
    """Note that the stores are about to be made."""
    docker.write_atomically(os.path.join(data_dir, NOTE), json.dumps({"begun": stamp()}) + "\n", 0o600)


def end(data_dir: str) -> None:
    """Note that they are complete."""
    os.unlink(os.path.join(data_dir, NOTE))


def put_aside(data_dir: str, folders: list[str]) -> list[str]:
    """Give the half-made folders another name, as nothing on a volume is deleted; what was done, in words."""
    done = []
    for name in folders:
        other = f"{name}.unfinished-{stamp()}"
        os.rename(os.path.join(data_dir, name), os.path.join(data_dir, other))
        done.append(f"{name}, which an interrupted first start left incomplete, renamed to {other}")
    return done


def without_content(state: VolumeState, s3_flavour: str) -> list[str]:
    """The folders that can't be recognised as a cluster or a drive, by the note the remains of a first start."""
    if not state.first_start:
        return []
    found = [POSTGRES_FOLDER] if state.postgres.holds_data and not state.clusters else []
    half_drive = s3_flavour != "rclone" and state.minio.entries == (".minio.sys",) and state.minio_format is None
    return [*found, S3_FOLDERS[s3_flavour]] if half_drive else found


def stamp() -> str:
    """The time in a name: UTC, to the second."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
