"""Reads a volume for stack_plan, and makes what its plan says. Nothing is recursive, nothing existing is changed."""

from __future__ import annotations

import json
import os
from typing import Any

from ansible.module_utils.stack_plan import POSTGRES_PLACES, Folder, VolumeState

SECRETS = ".labctl/secrets"
#: The workspace is the notebooks': uid 1000 is the user of the Jupyter image and the first user of the host.
WORKSPACE, WORKSPACE_UID = "workspace", 1000


#: Which mount the services were started on; the guard keeps it over its own restarts and moves them when it differs.
MOUNT_RECORD = "/run/labctl-stack.mount"


def mount_at(path: str) -> str | None:
    """Which mount is at path, as "id major:minor"; None without one. Sees bind mounts, as os.path.ismount doesn't."""
    found = None
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            fields = line.split()
            if fields[4] == path:
                found = f"{fields[0]} {fields[2]}"
    return found


def folder(path: str) -> Folder:
    """What is at path; OSError if it can't be read, which the caller must not take for emptiness."""
    try:
        entries = tuple(sorted(os.listdir(path)))
    except FileNotFoundError:
        return Folder()
    found = os.stat(path)
    return Folder(entries, (found.st_uid, found.st_gid))


def read_volume(data_dir: str) -> VolumeState:
    """Everything that the decision needs; OSError if the volume can't be read."""
    if mount_at(data_dir) is None:
        return VolumeState()
    versions = {}
    for place in POSTGRES_PLACES:
        path = os.path.join(data_dir, "postgres_data", place)
        try:
            with open(os.path.join(path, "PG_VERSION"), encoding="ascii", errors="replace") as handle:
                text = handle.read(16).strip()
        except (FileNotFoundError, NotADirectoryError):
            continue
        found = os.stat(path)
        versions[place] = (text, (found.st_uid, found.st_gid))
    return VolumeState(
        mounted=True,
        marked=os.path.isdir(os.path.join(data_dir, ".labctl")),
        postgres=folder(os.path.join(data_dir, "postgres_data")),
        postgres_versions=versions,
        minio=folder(os.path.join(data_dir, "minio_data")),
        minio_format=minio_format(os.path.join(data_dir, "minio_data")),
        rclone=folder(os.path.join(data_dir, "rclone_s3_data")),
        secrets=os.path.exists(os.path.join(data_dir, SECRETS, "secrets.json")),
    )


def minio_format(path: str) -> str | None:
    """`format` of MinIO's format.json; None without the file, "" if it isn't what such a file is."""
    try:
        with open(os.path.join(path, ".minio.sys", "format.json"), encoding="utf-8", errors="replace") as handle:
            content: Any = json.load(handle)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return ""
    return str(content.get("format") or "") if isinstance(content, dict) else ""


def make_folder(path: str, uid: int, mode: int) -> bool:
    """Make one directory with its owner; True if it was made. One that exists is replaced only while it is empty."""
    try:
        found = os.stat(path)
        if found.st_uid == uid or os.listdir(path):
            return False
    except FileNotFoundError:
        pass
    building = f"{path}.labctl-new"
    if not os.path.isdir(building):
        os.mkdir(building, 0o700)
    # Owner and mode first, the name last: whoever finds the directory finds it right, also after a crash in between.
    # A rename replaces an empty directory and fails on any other.
    os.chown(building, uid, uid)
    os.chmod(building, mode)
    os.rename(building, path)
    return True
