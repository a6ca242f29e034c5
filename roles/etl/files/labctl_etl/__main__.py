"""The commands. Each prints JSON, or is a job whose progress `wait` tells."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from typing import Any

PROGRAM = os.path.dirname(os.path.abspath(__file__))
if PROGRAM in sys.path:
    sys.path.remove(PROGRAM)  # its modules are the package's, not everybody's
sys.path.insert(0, os.path.dirname(PROGRAM))

from labctl_etl import job, load
from labctl_etl.errors import EXIT_CODES, Failure
from labctl_etl.model import LAYOUTS


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="labctl-etl", description=(__doc__ or "").splitlines()[0])
    verbs = top.add_subparsers(dest="verb", required=True)
    loading = verbs.add_parser("load", help="load the set that the settings describe")
    loading.add_argument("--job", default="by-hand", help="name of the progress file")
    loading.add_argument("--settings", default=load.SETTINGS)
    loading.add_argument("--layout", choices=LAYOUTS, default="", help="instead of the settings'")
    loading.add_argument("--restart", action="store_true", help="forget what a run that was cut off has sent")
    loading.add_argument("--first", type=float, default=0, help="of a list: where to begin, as a share of it (0 to 1)")
    loading.add_argument("--share", action="store_true", help="of a list: only what no other host has; don't show it")
    start = verbs.add_parser("start", help="run a command as a unit of its own")
    start.add_argument("arguments", nargs=argparse.REMAINDER)
    wait = verbs.add_parser("wait", help="tell a job's progress")
    wait.add_argument("--job", required=True)
    wait.add_argument("--seen", type=int, default=-1)
    wait.add_argument("--seconds", type=float, default=5)
    return top


def work(args: argparse.Namespace, running: job.Job) -> dict[str, Any]:
    """The load."""
    here = load.settings(args.settings)
    if args.layout:
        here = replace(here, layout=args.layout)
    return load.load(here, running, restart=args.restart, first=args.first, commit=not args.share)


def main() -> int:
    """Entry point."""
    os.umask(0o077)
    args = parser().parse_args()
    try:
        if args.verb == "start":
            answer: Any = job.start(PROGRAM, args.arguments)
        elif args.verb == "wait":
            answer = job.wait(args.job, args.seen, args.seconds)
        else:
            code = job.execute(args.job, args.verb, lambda running: work(args, running))
            print(json.dumps((job.read_json(job.path_of(args.job)) or {}).get("result")))
            return code
    except Failure as failure:
        print(json.dumps({"error": failure.as_dict()}))
        return EXIT_CODES[failure.kind]
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
