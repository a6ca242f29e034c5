"""The commands. Each prints JSON, or starts a job whose progress `wait` tells."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

PROGRAM = os.path.dirname(os.path.abspath(__file__))
if PROGRAM in sys.path:
    sys.path.remove(PROGRAM)  # its modules are the package's, not everybody's
sys.path.insert(0, os.path.dirname(PROGRAM))

from labctl_backup import host, job, prune, restore, take
from labctl_backup.errors import EXIT_CODES, Failure
from labctl_backup.model import key_id


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
    start = verbs.add_parser("start", help="run one of the commands above as a unit of its own")
    start.add_argument("arguments", nargs=argparse.REMAINDER)
    wait = verbs.add_parser("wait", help="tell a job's progress")
    wait.add_argument("--job", required=True)
    wait.add_argument("--seen", type=int, default=-1)
    wait.add_argument("--seconds", type=float, default=5)
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


def main() -> int:
    """Entry point."""
    os.umask(0o077)
    args = parser().parse_args()
    try:
        if args.verb == "key":
            answer: Any = key_document()
        elif args.verb == "start":
            answer = job.start(PROGRAM, args.arguments)
        elif args.verb == "wait":
            answer = job.wait(args.job, args.seen, args.seconds)
        else:
            return job.execute(args.job, args.verb, lambda running: work(args, running))
    except Failure as failure:
        print(json.dumps({"error": failure.as_dict()}))
        return EXIT_CODES[failure.kind]
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
