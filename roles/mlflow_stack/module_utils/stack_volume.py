"""Reads a volume for stack_plan, and makes what its plan says. Nothing is recursive, nothing existing is changed."""

from __future__ import annotations

import json
import os
import stat
from typing import Any

from ansible.module_utils import stack_marker as marker
from ansible.module_utils.stack_first import NOTE as FIRST_START
from ansible.module_utils.stack_plan import (
    PLAIN_FILES,
    POSTGRES_FOLDER,
    POSTGRES_MAJOR_PLACE,
    POSTGRES_PLACES,
    Cluster,
    Folder,
    VolumeState,
)

SECRETS = ".labctl/secrets"
#: The workspace is the notebooks': uid 1000 is the user of the Jupyter image and the first user of the host.
WORKSPACE, WORKSPACE_UID = "workspace", 1000
#: Which mount the services were started on; the guard keeps it over its own restarts and moves them when it differs.
MOUNT_RECORD = "/run/labctl-stack.mount"
#: Files of a cluster that PostgreSQL can't start without; a chown of only some of them shows here.
CLUSTER_FILES = ("PG_VERSION", "base", "global", "global/pg_control", "pg_wal", "postgresql.conf")


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
    stack, problem = read_marker(data_dir)
    objects = str(stack.get("s3_dir") or "")
    plain = stack.get("s3_format") == PLAIN_FILES
    minio = os.path.join(data_dir, objects if objects and not plain else "minio_data")
    space = os.statvfs(data_dir)
    return VolumeState(
        mounted=True,
        marked=os.path.isdir(os.path.join(data_dir, ".labctl")),
        marker_problem=problem,
        stack=stack,
        read_only=bool(space.f_flag & os.ST_RDONLY),
        free=space.f_bavail * space.f_frsize,
        size=space.f_blocks * space.f_frsize,
        postgres=folder(os.path.join(data_dir, POSTGRES_FOLDER)),
        clusters=clusters(data_dir, str(stack.get("postgres_dir") or "")),
        minio=folder(minio),
        minio_format=minio_format(minio),
        rclone=folder(os.path.join(data_dir, objects if objects and plain else "rclone_s3_data")),
        secrets=os.path.exists(os.path.join(data_dir, SECRETS, "secrets.json")),
        first_start=not stack.get("postgres_dir") and os.path.exists(os.path.join(data_dir, FIRST_START)),
    )


def free_words(data_dir: str) -> str:
    """How much room the volume has, for a message."""
    space = os.statvfs(data_dir)
    return f"{space.f_bavail * space.f_frsize >> 20} MiB free on the volume"


def read_marker(data_dir: str) -> tuple[dict[str, Any], str]:
    """The marker's key `stack`, and what is wrong with the marker."""
    try:
        return marker.read(data_dir), ""
    except marker.MarkerError as error:
        return {}, str(error)


def clusters(data_dir: str, pointer: str) -> dict[str, Cluster]:
    """The clusters by directory: the one that the marker points to, or whatever lies in the places of the images."""
    if pointer:
        places = [pointer]
    else:
        top = folder(os.path.join(data_dir, POSTGRES_FOLDER))
        majors = [f"{name}/docker" for name in top.entries or () if POSTGRES_MAJOR_PLACE.fullmatch(f"{name}/docker")]
        places = [f"{POSTGRES_FOLDER}/{place}".rstrip("/") for place in (*POSTGRES_PLACES, *majors)]
    found = {place: cluster(os.path.join(data_dir, place)) for place in places}
    return {place: one for place, one in found.items() if one is not None}


def cluster(path: str) -> Cluster | None:
    """The PostgreSQL cluster in a directory, None if there is no PG_VERSION in it."""
    try:
        with open(os.path.join(path, "PG_VERSION"), encoding="ascii", errors="replace") as handle:
            version = handle.read(16).strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    found = os.stat(path)
    uids = set()
    for name in CLUSTER_FILES:
        try:
            uids.add(os.lstat(os.path.join(path, name)).st_uid)
        except FileNotFoundError:
            continue
    return Cluster(version, (found.st_uid, found.st_gid), frozenset(uids), stat.S_IMODE(found.st_mode))


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
