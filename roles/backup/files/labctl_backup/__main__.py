"""The commands. Each prints JSON, or starts a job whose progress `wait` tells."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

FOLDER = os.path.dirname(os.path.abspath(__file__))
if FOLDER in sys.path:
    sys.path.remove(FOLDER)  # its modules are the package's, not everybody's
sys.path.insert(0, os.path.dirname(FOLDER))

from labctl_backup import host, job, prune, restore, take
from labctl_backup.model import key_id
from labctl_job import commands
from labctl_job.errors import Failure
from labctl_job.job import execute


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="labctl-backup", description=(__doc__ or "").splitlines()[0])
    verbs = top.add_subparsers(dest="verb", required=True)
    new = {name: verbs.add_parser(name) for name in ("backup", "list", "verify", "delete", "restore", "undo")}
    for one in new.values():
        one.add_argument("--job", default="by-hand", help="name of the progress file")
        one.add_argument("--container", default="", help="another lab's container")
    for name in ("verify", "delete", "restore"):
        new[name].add_argument("set", help="a set's id, or latest")
    new["backup"].add_argument("--keep", type=int, default=-1, help="complete sets to keep; 0: all")
    new["backup"].add_argument("--force", action="store_true", help="whatever another host's lease says")
    for flag in ("--beside", "--into-new-major", "--new-secrets", "--again"):
        new["restore"].add_argument(flag, action="store_true")
    verbs.add_parser("key", help="print the volume's backup key")
    commands.add_to(verbs)
    return top


def work(args: argparse.Namespace, running: job.Job) -> dict[str, Any]:
    """One of the commands that are jobs."""
    here = host.settings(args.container)
    if args.verb == "backup":
        return take.take(here, running, keep=here.keep if args.keep < 0 else args.keep, force=args.force)
    if args.verb == "restore":
        asked = restore.Asked(args.set, args.beside, args.into_new_major, args.new_secrets, args.again)
        return restore.restore(here, running, asked)
    if args.verb == "undo":
        return restore.undo(here, running)
    running.step("looking into the container")
    with host.remotes(here) as (_, store, _folder):
        if args.verb == "list":
            return prune.list_sets(store)
        if args.verb == "verify":
            return prune.verify(store, running, args.set)
        return _delete(here, running, store, args.set)


def _delete(here: host.Settings, running: job.Job, store: Any, wanted: str) -> dict[str, Any]:
    """Delete a set by its id, complete or not."""
    with job.locked(here.data_dir):
        sets = store.sets()
        if wanted not in [one.id for one in sets]:
            raise Failure(f"There is no backup {wanted}.", kind="usage", next_step="labctl backup list")
        store.take_lease(str(host.marker(here)["volume_id"]), host.hostname())
        result = prune.remove(store, running, sets, [wanted])
        store.drop_lease()
        return result


def key_document() -> dict[str, str]:
    """The volume's key and its id, both "" where none was made yet."""
    here = host.settings()
    host.marker(here)
    key = host.own_key(here)
    return {"key_id": key_id(key) if key else "", "key": key}


def run(args: argparse.Namespace) -> int:
    """The key, or one of the commands that are jobs."""
    if args.verb == "key":
        print(json.dumps(key_document()))
        return 0
    running = job.Job(args.job, args.verb)
    return execute(running, lambda: work(args, running))


def main() -> int:
    """Entry point."""
    return commands.main(job.PROGRAM, parser(), run)


if __name__ == "__main__":
    sys.exit(main())
