"""The commands. Each prints JSON, or is a job whose progress `wait` tells."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from dataclasses import replace
from typing import Any

FOLDER = os.path.dirname(os.path.abspath(__file__))
if FOLDER in sys.path:
    sys.path.remove(FOLDER)  # its modules are the package's, not everybody's
sys.path.insert(0, os.path.dirname(FOLDER))

from labctl_etl import job, load
from labctl_etl.model import LAYOUTS
from labctl_job import commands
from labctl_job.errors import Failure
from labctl_job.job import execute, path_of, read_json


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
    commands.add_to(verbs)
    return top


def work(args: argparse.Namespace, running: job.Job) -> dict[str, Any]:
    """The load."""
    here = load.settings(args.settings)
    if args.layout:
        here = replace(here, layout=args.layout)
    try:
        return load.load(here, running, restart=args.restart, first=args.first, commit=not args.share)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Failure(
            "The server's disk is full.", found=str(error),
            next_step="make room on the server (df -h), then labctl etl again: it sends only what is missing",
        ) from None  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """The load as a job, and its result."""
    running = job.Job(args.job, args.verb)
    code = execute(running, lambda: work(args, running))
    print(json.dumps((read_json(path_of(job.PROGRAM.folder, args.job)) or {}).get("result")))
    return code


def main() -> int:
    """Entry point."""
    return commands.main(job.PROGRAM, parser(), run)


if __name__ == "__main__":
    sys.exit(main())
