"""What is backed up, read where it is: the database through its container, objects through the S3 server, files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from labctl_backup.model import S3Object, Stored, WorkspaceEntry
from labctl_backup.rclone import S3, Rclone
from labctl_job.errors import Failure

CHUNK = 1 << 20
#: What a listing has to say so that an object that was written again shows: the server's time, which nobody sets.
VERSION = ("--use-server-modtime", "--hash", "--hash-type", "md5")
POSTGRES, SENTINEL = "postgres", "labctl-end-of-answer"
#: Every table that isn't PostgreSQL's own. Row counts are what a restore is proven by.
TABLES = """SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname NOT LIKE 'pg_toast%'
ORDER BY 1;"""
OTHERS = "SELECT datname FROM pg_database WHERE NOT datistemplate AND datname NOT IN ('postgres', current_database());"


def digest(path: str, flags: int = 0) -> tuple[str, Stored]:
    """(SHA-256, size and MD5) of a file."""
    sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
    with os.fdopen(os.open(path, os.O_RDONLY | flags), "rb") as handle:
        while block := handle.read(CHUNK):
            sha256.update(block)
            md5.update(block)
            size += len(block)
    return sha256.hexdigest(), Stored(size, md5.hexdigest())


# -- the database --------------------------------------------------------------------------------------------------


class Database:
    """A session of psql in a container. The user's name is all it needs: inside, PostgreSQL trusts its own machine."""

    def __init__(self, container: str, user: str, database: str) -> None:
        self.container, self.user, self.database = container, user, database
        self._psql: subprocess.Popen[str] | None = None

    def __enter__(self) -> Database:
        self._psql = subprocess.Popen(
            ["docker", "exec", "-i", self.container, "psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1",
             "-U", self.user, "-d", self.database],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        assert self._psql and self._psql.stdin
        with contextlib.suppress(OSError):
            self._psql.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._psql.wait(timeout=10)
        self._psql.kill()

    def ask(self, sql: str) -> list[str]:
        """The rows of a query, columns joined by |. Failure with PostgreSQL's words."""
        assert self._psql and self._psql.stdin and self._psql.stdout
        with contextlib.suppress(OSError):  # its words are read below
            self._psql.stdin.write(f"{sql}\n\\echo {SENTINEL}\n")
            self._psql.stdin.flush()
        rows: list[str] = []
        for line in self._psql.stdout:
            if line.rstrip("\n") == SENTINEL:
                return rows
            rows.append(line.rstrip("\n"))
        raise Failure(
            "PostgreSQL doesn't answer.",
            found="\n".join(rows[-3:])[-500:],
            next_step="labctl status, then labctl converge",
        )

    def row_counts(self) -> dict[str, int]:
        """Rows by table."""
        tables = self.ask(TABLES)
        if not tables:
            return {}
        quoted = [name.replace("'", "''") for name in tables]
        union = " UNION ALL ".join(
            f"SELECT '{name}', count(*) FROM {table}" for name, table in zip(quoted, tables, strict=True)
        )
        return {name: int(count) for name, _, count in (row.rpartition("|") for row in self.ask(union + ";"))}

    def schema_revision(self) -> str:
        """MLflow's schema revision, "" where there is none."""
        there = self.ask("SELECT to_regclass('public.alembic_version') IS NOT NULL;")
        return self.ask("SELECT version_num FROM alembic_version;")[0] if there == ["t"] else ""


@dataclass(frozen=True)
class Dump:
    """What pg_dump wrote, and what the very snapshot that it read holds."""

    rows: dict[str, int]
    schema: str
    version: str
    bytes: int
    others: tuple[str, ...]

    @property
    def major(self) -> str:
        """PostgreSQL's major version."""
        return self.version.split(".")[0]


def dump(user: str, database: str, path: str, free: int) -> Dump:
    """pg_dump to a file, and the row counts of the same snapshot; the file is proven readable by pg_restore."""
    with Database(POSTGRES, user, database) as session:
        size = int(session.ask("SELECT pg_database_size(current_database());")[0])
        if size > free:
            raise Failure(
                "The server's disk has too little room for the database's dump.",
                expected=f"{size / 1e6:,.0f} MB free below {os.path.dirname(path)}",
                found=f"{free / 1e6:,.0f} MB",
                next_step="make room on the server's own disk (`docker system df` shows unused images)",
            )
        version = session.ask("SHOW server_version;")[0].split()[0]
        others = tuple(session.ask(OTHERS))
        session.ask("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;")
        snapshot = session.ask("SELECT pg_export_snapshot();")[0]
        with open(path, "wb") as target:
            _exec(["pg_dump", "-U", user, "-d", database, "-Fc", f"--snapshot={snapshot}"], target)
        made = Dump(session.row_counts(), session.schema_revision(), version, size, others)
    with open(path, "rb") as source:
        done = subprocess.run(
            ["docker", "exec", "-i", POSTGRES, "pg_restore", "--list"], stdin=source, capture_output=True, check=False
        )
    if done.returncode:
        raise Failure("The database's dump can't be read back.", found=done.stderr.decode(errors="replace")[-500:])
    return made


def _exec(command: list[str], target: Any) -> None:
    done = subprocess.run(["docker", "exec", POSTGRES, *command], stdout=target, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        raise Failure(
            f"{command[0]} failed.", found=done.stderr.decode(errors="replace")[-500:], next_step="labctl status"
        )


# -- objects -------------------------------------------------------------------------------------------------------


def s3_objects(rclone: Rclone) -> tuple[list[str], list[S3Object]]:
    """The S3 server's buckets, and every object with what its listing says."""
    buckets = [str(row["Path"]) for row in rclone.listing(f"{S3}:") if row["IsDir"]]
    found = []
    for bucket in buckets:
        for row in rclone.listing(f"{S3}:{bucket}", "-R", "--files-only", "--fast-list", *VERSION):
            etag = row.get("Hashes", {}).get("md5", "")
            found.append(S3Object(bucket, row["Path"], row["Size"], row["ModTime"], etag))
    return buckets, found


# -- files ---------------------------------------------------------------------------------------------------------


def workspace_entries(root: str) -> tuple[list[WorkspaceEntry], list[str]]:
    """What is below a folder, without hashes; links aren't followed. Then what is left out: sockets, pipes, devices."""
    if not os.path.isdir(root) or os.path.islink(root):
        return [], []
    found, left_out = [], []
    for entry in _walk(root):
        status = entry.stat(follow_symlinks=False)
        kind = _kind(status.st_mode)
        path = os.path.relpath(entry.path, root)
        if not kind:
            left_out.append(path)
            continue
        found.append(
            WorkspaceEntry(
                path, kind, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns,
                status.st_ctime_ns, status.st_size if kind == "file" else 0,
                target=os.readlink(entry.path) if kind == "link" else "",
            )
        )  # fmt: skip
    return found, left_out


def _walk(folder: str) -> Iterator[os.DirEntry[str]]:
    """Every entry, a folder before what is in it. What vanishes meanwhile is left out."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    for entry in entries:
        yield entry
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path)


def _kind(mode: int) -> str:
    tests = {"file": stat.S_ISREG, "folder": stat.S_ISDIR, "link": stat.S_ISLNK}
    return next((name for name, test in tests.items() if test(mode)), "")


def read_json_file(path: str) -> dict[str, Any]:
    """A JSON object; Failure where it isn't one."""
    try:
        with open(path, encoding="utf-8") as handle:
            document = json.load(handle)
    except (OSError, ValueError) as error:
        raise Failure(f"{path} can't be read.", found=str(error), next_step="labctl converge") from None
    if not isinstance(document, dict):
        raise Failure(f"{path} isn't what labctl writes.", next_step="labctl converge")
    return document
