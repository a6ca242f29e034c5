"""MLflow's database schema: what it is, and the upgrade that can be cut off anywhere.

The database that is served is never changed. Its dump is restored into a copy, the copy is compared with it row by
row (which proves the dump) and upgraded, and then the two change names in one transaction. Until then there is nothing
to undo but the copy, and afterwards the old database stays until MLflow has been seen to work on the new one; the dump
stays for good. A journal on the volume says that the copy and the old database are this program's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from dataclasses import dataclass, field
from typing import Any

from ansible.module_utils import stack_docker as docker
from ansible.module_utils import stack_marker as marker
from ansible.module_utils.stack_plan import Known, Schema, Stop

JOURNAL = ".labctl/upgrade.json"
DUMPS = ".labctl/dumps"
COPY, BEFORE = "labctl_upgrade", "labctl_before_upgrade"
CONTAINER = "labctl-mlflow-upgrade"
STOP_SECONDS = "60"
#: Seconds for a statement that touches no rows, and attempts at a rename while a health check is connected.
SQL_SECONDS, RENAMES = 120, 30
#: A dump, a copy and what the upgrade rewrites, each as big as the database at worst, and room to start in.
SPACE_FACTOR, SPACE_EXTRA = 3, 64 << 20
#: One line per table: its name, its rows, and a sum over their hashes that doesn't depend on their order.
CONTENT = """\
SELECT format('SELECT %L, count(*), coalesce(sum(hashtextextended(t::text, 0)::numeric), 0) FROM %I.%I t',
  c.oid::regclass::text, n.nspname, c.relname)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND n.nspname NOT IN ('pg_catalog', 'information_schema') ORDER BY 1
\\gexec
"""


class UpgradeFailed(Exception):
    """The upgrade didn't come to its end; the served database is as it was."""


@dataclass
class Database:
    """The cluster's served database, asked by psql in the PostgreSQL container as its own user."""

    user: str
    name: str

    def ask(self, script: str, database: str = "", seconds: float = SQL_SECONDS) -> list[list[str]]:
        """The rows of a script's queries, as text. DockerFailed with PostgreSQL's words."""
        done = docker.docker(
            *("exec", "-i", "postgres", "psql", "-X", "-q", "-A", "-t", "-F", "\t", "-v", "ON_ERROR_STOP=1"),
            *("-U", self.user, "-d", database or self.name, "-f", "-"),
            data=script,
            seconds=seconds,
        )
        return [line.split("\t") for line in done.stdout.splitlines() if line]

    def names(self) -> set[str]:
        """All databases of the cluster."""
        return {row[0] for row in self.ask("SELECT datname FROM pg_database;", "postgres")}

    def schema(self, database: str = "") -> Schema:
        """MLflow's revision and whether there are runs."""
        tables = {row[0] for row in self.ask("SELECT tablename FROM pg_tables WHERE schemaname = 'public';", database)}
        revisions, runs = [], False
        if "alembic_version" in tables:
            revisions = [row[0] for row in self.ask("SELECT version_num FROM alembic_version ORDER BY 1;", database)]
        if "runs" in tables:
            runs = self.ask("SELECT EXISTS (SELECT FROM runs);", database) == [["t"]]
        return Schema(tuple(revisions), runs)

    def content(self, database: str, seconds: float) -> dict[str, str]:
        """Each table's rows and hash: equal exactly if the tables hold the same rows."""
        return {row[0]: f"{row[1]} {row[2]}" for row in self.ask(CONTENT, database, seconds)}


def known(image: str, identity: str, script: str, cache: str) -> Known:
    """What an MLflow image knows; asked of it once and kept by the image's id. DockerFailed if it doesn't say."""
    try:
        with open(cache, encoding="utf-8") as handle:
            kept: dict[str, Any] = json.load(handle)
    except (FileNotFoundError, ValueError):
        kept = {}
    if identity not in kept:
        done = docker.docker(
            "run", "--rm", "-i", "--network", "none", "--entrypoint", "python3", image, "-", data=script
        )
        kept[identity] = json.loads(done.stdout)
        docker.write_atomically(cache, json.dumps(kept, indent=1) + "\n")
    said = kept[identity]
    if len(said["heads"]) != 1:
        raise docker.DockerFailed(
            f"The image {image} has no single newest revision of MLflow's schema: {said['heads']}"
        )
    return Known(said["version"], said["heads"][0], frozenset(said["revisions"]))


@dataclass
class Upgrade:
    """The upgrade of one volume's database. The caller holds the compose lock, and PostgreSQL runs."""

    data_dir: str
    database: Database
    seconds: float
    changes: list[str] = field(default_factory=list)

    @property
    def journal_file(self) -> str:
        """Present from before the first change until after the last."""
        return os.path.join(self.data_dir, JOURNAL)

    @property
    def pending(self) -> bool:
        """Whether an upgrade was begun and not finished."""
        return os.path.exists(self.journal_file)

    def recover(self) -> None:
        """Bring what a run that was cut off left to one of two states: nothing done, or done and not yet finished."""
        remove_container()
        there = self.database.names() & {COPY, BEFORE}
        if there and not self.pending:
            raise Stop(
                "The cluster holds a database that labctl would make for an upgrade, and no upgrade is under way.",
                expected=f"no database {COPY} or {BEFORE}, or {self.journal_file}",
                found=", ".join(sorted(there)),
                next_step=f"if nobody needs it: docker exec postgres dropdb -U {self.database.user} NAME",
            )
        if not self.pending:
            return
        if COPY in there:
            self._drop(COPY)
        part = f"{self._read_journal().get('dump', '')}.part"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.data_dir, DUMPS, os.path.basename(part)))
        if BEFORE not in there:
            self._forget()
            self.changes.append("an upgrade of MLflow's schema that was cut off taken back")

    def run(self, image: str, uid: int, pgpass: str, old: str, new: Known) -> None:
        """Dump, copy, prove, upgrade the copy, swap. Whatever is raised, the served database is as it was."""
        self._check_space()
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        journal = {"from": old, "to": new.head, "mlflow_version": new.version, "dump": f"mlflow-{old}-{stamp}.dump"}
        try:
            self._note(journal)
            self._dump(journal["dump"])
            self._restore(journal["dump"])
            self._migrate(image, uid, pgpass, new.head)
            upgraded = self.database.content(COPY, self.seconds)
            self._note({**journal, "content": _digest(upgraded)})
            self._swap(self.database.name, BEFORE, COPY, self.database.name)
        except BaseException:
            with contextlib.suppress(docker.DockerFailed, OSError):
                self.recover()
            raise
        self.changes.append(
            f"MLflow's schema upgraded from {old} to {new.head}; the dump of before: {DUMPS}/{journal['dump']}"
        )

    def finish(self) -> None:
        """MLflow works on the upgraded database: the old one, which the dump was proved to hold, goes."""
        if BEFORE in self.database.names():
            self._drop(BEFORE)
        self._forget()

    def revert(self) -> bool:
        """Back to the old database if nothing was written to the new one since; False where it was."""
        journal = self._read_journal()
        if BEFORE not in self.database.names():
            return False
        if _digest(self.database.content(self.database.name, self.seconds)) != journal.get("content"):
            return False
        self._swap(self.database.name, COPY, BEFORE, self.database.name)
        self.recover()
        return True

    # -- steps -----------------------------------------------------------------------------------------------------

    def _check_space(self) -> None:
        size = int(self.database.ask(f"SELECT pg_database_size('{self.database.name}');")[0][0])
        needed = size * SPACE_FACTOR + SPACE_EXTRA
        space = os.statvfs(self.data_dir)
        free = space.f_bavail * space.f_frsize
        if free < needed:
            raise UpgradeFailed(
                f"The volume has {free >> 20} MiB free, and the dump and the copy of a database of {size >> 20} MiB"
                f" may need {needed >> 20} MiB. Nothing was changed."
            )

    def _dump(self, name: str) -> None:
        """`pg_dump -Fc` into a file that has its name once it is complete and on the disk."""
        folder = os.path.join(self.data_dir, DUMPS)
        if not os.path.isdir(folder):
            os.mkdir(folder, 0o700)
            marker.sync_directory(os.path.dirname(folder))
        path = os.path.join(folder, name)
        descriptor = os.open(f"{path}.part", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file, open(os.devnull, "rb") as nothing:
            command = ["exec", "postgres", "pg_dump", "-Fc", "-U", self.database.user, "-d", self.database.name]
            docker.stream(command, nothing.fileno(), file.fileno(), self.seconds)
            os.fsync(file.fileno())
        os.rename(f"{path}.part", path)
        marker.sync_directory(folder)

    def _restore(self, name: str) -> None:
        """The dump into the copy, and the proof that both databases hold the same rows."""
        self.database.ask(self._create(), "postgres")
        command = ["exec", "-i", "postgres", "pg_restore", "--exit-on-error", "-U", self.database.user, "-d", COPY]
        with open(os.path.join(self.data_dir, DUMPS, name), "rb") as source, open(os.devnull, "wb") as nothing:
            docker.stream(command, source.fileno(), nothing.fileno(), self.seconds)
        here = self.database.content(self.database.name, self.seconds)
        there = self.database.content(COPY, self.seconds)
        if here != there:
            tables = sorted(table for table in {*here, *there} if here.get(table) != there.get(table))
            raise UpgradeFailed(f"The dump doesn't hold what the database holds, in the tables {', '.join(tables)}.")

    def _create(self) -> str:
        """CREATE DATABASE for the copy, with the encoding and locale of the served one."""
        encoding, provider, collate, ctype, locale = self.database.ask(
            "SELECT pg_encoding_to_char(encoding), datlocprovider, datcollate, datctype,"
            " coalesce(to_jsonb(d)->>'datlocale', to_jsonb(d)->>'daticulocale', '-')"
            f" FROM pg_database d WHERE datname = '{self.database.name}';"
        )[0]
        kind = {
            "c": "LOCALE_PROVIDER libc",
            "i": f"LOCALE_PROVIDER icu ICU_LOCALE '{locale}'",
            "b": f"LOCALE_PROVIDER builtin BUILTIN_LOCALE '{locale}'",
        }[provider]
        return (
            f"CREATE DATABASE {COPY} TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE '{collate}'"
            f" LC_CTYPE '{ctype}' {kind};"
        )

    def _migrate(self, image: str, uid: int, pgpass: str, head: str) -> None:
        """`mlflow db upgrade` on the copy, with the password in the file that the server reads it from."""
        address = f"postgresql+psycopg2://{self.database.user}@postgres:5432/{COPY}"
        try:
            docker.docker(
                *("run", "--rm", "--name", CONTAINER, "--label", "labctl.oneshot=1", "--network", docker.NETWORK),
                *("--user", f"{uid}:{uid}", "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true"),
                *("--env", "HOME=/tmp", "--env", "PGPASSFILE=/run/secrets/pgpass", "--workdir", "/tmp"),
                *("--mount", f"type=bind,source={pgpass},target=/run/secrets/pgpass,readonly"),
                *("--entrypoint", "mlflow", image, "db", "upgrade", address),
                seconds=self.seconds,
            )
        except docker.DockerFailed as failure:
            raise UpgradeFailed(f"`mlflow db upgrade` failed: {failure}") from None
        found = self.database.schema(COPY)
        if found.revisions != (head,):
            raise UpgradeFailed(
                f"`mlflow db upgrade` ended at {', '.join(found.revisions) or 'nothing'}, not at {head}."
            )

    def _swap(self, first: str, first_new: str, second: str, second_new: str) -> None:
        """Two renames in one transaction, once nobody is connected to either."""
        script = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            f" WHERE datname IN ('{first}', '{second}') AND pid <> pg_backend_pid();\n"
            "BEGIN;\n"
            f'ALTER DATABASE "{first}" RENAME TO "{first_new}";\n'
            f'ALTER DATABASE "{second}" RENAME TO "{second_new}";\n'
            "COMMIT;\n"
        )
        for left in reversed(range(RENAMES)):
            try:
                self.database.ask(script, "postgres")
                return
            except docker.DockerFailed as failure:
                # a health check connects every few seconds
                if "being accessed by other users" not in str(failure) or not left:
                    raise
                time.sleep(0.5)

    def _drop(self, name: str) -> None:
        self.database.ask(f'DROP DATABASE "{name}" WITH (FORCE);', "postgres")

    # -- the journal -----------------------------------------------------------------------------------------------

    def _note(self, content: dict[str, str]) -> None:
        docker.write_atomically(self.journal_file, json.dumps(content, indent=1) + "\n", 0o600)
        marker.sync_directory(os.path.dirname(self.journal_file))

    def _read_journal(self) -> dict[str, str]:
        try:
            with open(self.journal_file, encoding="utf-8") as handle:
                content: dict[str, str] = json.load(handle)
        except FileNotFoundError:
            return {}
        return content

    def _forget(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.journal_file)
        marker.sync_directory(os.path.dirname(self.journal_file))


def _digest(content: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def remove_container() -> None:
    """The one-shot container of a run that was cut off: it must not go on beside this one."""
    found = docker.inspect("container", [CONTAINER]).get(CONTAINER)
    if found and (found["Config"].get("Labels") or {}).get("labctl.oneshot") == "1":
        docker.docker("rm", "--force", CONTAINER)


def stop_writers(project_dir: str) -> list[str]:
    """Stop what writes to the database; the names of the containers that ran."""
    found = docker.inspect("container", list(docker.WRITERS))
    running = [n for n, c in found.items() if c["State"].get("Running") and docker.is_ours(c, project_dir)]
    if running:
        docker.docker("stop", "--time", STOP_SECONDS, *running, seconds=3 * float(STOP_SECONDS))
    return running


def dumps_size(data_dir: str) -> dict[str, int]:
    """How many dumps the volume keeps, and their bytes. None is ever deleted by labctl."""
    try:
        with os.scandir(os.path.join(data_dir, DUMPS)) as entries:
            sizes = [entry.stat().st_size for entry in entries if entry.name.endswith(".dump")]
    except FileNotFoundError:
        sizes = []
    return {"count": len(sizes), "bytes": sum(sizes)}
