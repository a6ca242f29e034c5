"""The commands that every program has, `start` and `wait`, and how a program ends. Each command prints JSON."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from labctl_job.errors import EXIT_CODES, Failure
from labctl_job.job import Job, path_of, read_json, write_json

LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Program:
    """Where a program is, how its jobs run as systemd's units, and what it calls them."""

    path: str
    #: Of the progress files, below /run.
    folder: str
    #: A command's unit; what runs as different units can run at the same time.
    unit_of: Callable[[str], str]
    noun: str
    if_not_started: str
    if_killed: str
    #: For `systemd-run --property`.
    properties: tuple[str, ...] = ()

    def start(self, arguments: list[str]) -> dict[str, Any]:
        """Start a job as a unit of its own, so that it goes on whatever becomes of the connection. Returns its id.

        A job that is running is told instead of a second one being started.
        """
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        unit = self.unit_of(arguments[0])
        record = os.path.join(self.folder, f"current-{unit}.json")
        if _active(unit):
            return {**(read_json(record) or {}), "running": True}
        job_id = uuid.uuid4().hex[:12]
        Job(self.folder, job_id, arguments[0]).step("starting")
        write_json(record, {"job": job_id, "arguments": arguments})
        properties = [f"--property={one}" for one in self.properties]
        done = subprocess.run(
            ["systemd-run", f"--unit={unit}", "--collect", "--quiet", *properties,
             "/usr/bin/python3", self.path, *arguments, "--job", job_id],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            if _active(unit):
                return {**(read_json(record) or {}), "running": True}
            what = f"The {self.noun} can't be started."
            raise Failure(what, found=done.stderr.strip(), next_step=self.if_not_started)
        return {"job": job_id, "arguments": arguments, "running": False}

    def wait(self, job_id: str, seen: int, seconds: float) -> dict[str, Any]:
        """The job's progress as soon as it is another than `seen`, or after `seconds`.

        A job whose unit is gone without a last word was killed: its state is `failed` then.
        """
        path, deadline = path_of(self.folder, job_id), time.monotonic() + seconds
        while True:
            # the unit before the progress: what ends between the two has its last word there
            alive = _active(self.unit_of((read_json(path) or {}).get("command", "")))
            found: dict[str, Any] = read_json(path) or {"state": "lost", "seq": 0, "step": ""}
            if found["state"] in ("running", "lost") and not alive:
                words = {"kind": "failed", "msg": f"The {self.noun} was killed.",
                         "found": f"its last step: {found['step']}", "next_step": self.if_killed}  # fmt: skip
                return {**found, "state": "failed", "error": words}
            if found["state"] != "running" or found["seq"] != seen or time.monotonic() > deadline:
                return found
            time.sleep(LOOK_SECONDS)


def _active(unit: str) -> bool:
    return subprocess.run(["systemctl", "is-active", "--quiet", unit], check=False).returncode == 0


def add_to(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Put `start` and `wait` beside a program's own commands."""
    start = verbs.add_parser("start", help="run one of the other commands as a unit of its own")
    start.add_argument("arguments", nargs=argparse.REMAINDER)
    wait = verbs.add_parser("wait", help="tell a job's progress")
    wait.add_argument("--job", required=True)
    wait.add_argument("--seen", type=int, default=-1)
    wait.add_argument("--seconds", type=float, default=5)


def main(program: Program, parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> int:
    """Do what the command line says, and return the exit code. `run` does the program's own commands."""
    os.umask(0o077)
    args = parser.parse_args()
    try:
        if args.verb == "start":
            answer = program.start(args.arguments)
        elif args.verb == "wait":
            answer = program.wait(args.job, args.seen, args.seconds)
        else:
            return run(args)
    except Failure as failure:
        print(json.dumps({"error": failure.as_dict()}))
        return EXIT_CODES[failure.kind]
    print(json.dumps(answer))
    return 0
