"""Run on the node by the tests, as `python3 - STEP < kill_at.py`: SIGKILL to labctl's module when it is at a step.

The containers stand still while they are looked at: no step is too short to be seen, nor over before the kill, however
fast the machine is. Ends with 0 after the kill, with a word about what went wrong else.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

BLOCK = Path("/mnt/block")
CLUSTER = BLOCK / "postgres_data"
#: Seconds that a step may be in coming, and that the containers run between two looks.
PATIENCE, STRIDE = 200, 0.02
Table = dict[int, tuple[str, int]]


def seen(*parts: str, without: str = "\0") -> Callable[[list[str]], bool]:
    """A process whose command line begins with the first part, has the others, and hasn't `without`."""

    def look(commands: list[str]) -> bool:
        return any(
            words.startswith(parts[0]) and all(part in words for part in parts) and without not in words
            for words in commands
        )

    return look


def journal() -> str:
    try:
        return (BLOCK / ".labctl/upgrade.json").read_text()
    except OSError:
        return ""


#: A session of the one-shot container in the copy of the database: the migration is under way.
MIGRATION = seen("postgres: ada labctl_upgrade ", without="[local]")
SIGNS: dict[str, Callable[[list[str]], bool]] = {
    # the first start
    "files": lambda commands: seen("initdb")(commands) and not (CLUSTER / "PG_VERSION").exists(),
    "cluster": lambda commands: (CLUSTER / "PG_VERSION").exists() and seen("", "--boot")(commands),
    "database": lambda commands: (CLUSTER / "global/pg_control").exists() and seen("", "pg_ctl")(commands),
    # an upgrade
    "dump": seen("docker exec", " pg_dump "),
    "restore": seen("docker exec", " pg_restore "),
    "one-shot": MIGRATION,
    "upgrade": MIGRATION,
    # the journal says that all is ready, and the next statement changes the names: before, in or after it
    "swap": lambda _: '"content"' in journal(),
    "start": lambda commands: '"content"' in journal() and seen("docker compose", " up ")(commands),
}


def processes() -> Table:
    """The command line and the parent of each process."""
    found: Table = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text().replace("\0", " ")
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        found[int(process.name)] = (words, parent)
    return found


def stand_still(still: bool) -> None:
    """Every container, or none, is frozen."""
    for scope in Path("/sys/fs/cgroup/system.slice").glob("docker-*.scope"):
        try:
            (scope / "cgroup.freeze").write_text("1" if still else "0")
        except OSError:
            continue


def module_of(table: Table) -> int:
    """The module: what has a docker command as its child, if there is one; else 0."""
    for words, parent in table.values():
        if words.startswith("docker ") and "python3" in table.get(parent, ("", 0))[0]:
            return parent
    return 0


def strike(step: str, module: int, table: Table) -> None:
    """The kill. In an upgrade the one-shot container outlives the module: it stays frozen until the node dies."""
    if step == "one-shot":
        subprocess.run(["docker", "kill", "labctl-mlflow-upgrade"], check=True)
        return
    os.kill(module, signal.SIGKILL)
    if step in ("files", "cluster", "database"):
        for pid, (words, _) in table.items():
            if words.startswith("docker compose"):
                os.kill(pid, signal.SIGKILL)
        subprocess.run(["docker", "kill", "postgres", "s3"], check=False)


def main(step: str) -> str:
    """Returns "" after the kill, else what went wrong."""
    end, module, held = time.monotonic() + PATIENCE, 0, False
    try:
        while time.monotonic() < end:
            stand_still(True)
            table = processes()
            module = module_of(table) or module
            if module in table and SIGNS[step]([words for words, _ in table.values()]):
                strike(step, module, table)
                held = step == "upgrade"
                return ""
            stand_still(False)
            time.sleep(STRIDE)
    finally:
        if not held:
            stand_still(False)
    return f"the step {step} never came"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]) or 0)
