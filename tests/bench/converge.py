"""`make bench`: what a converge costs, against the floor (one ping) and against the tutorial's own commands over SSH.

All of it on the same machine, the same cloud and the same images, in one run. Prints a table, writes build/bench.json.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tutorial

sys.path.insert(0, str(Path(__file__).parents[1]))
from story import REPOSITORY, Commands, delete_server_behind_labctl

PINGS = 5
NOOPS = 3


def seconds(work: Callable[[], Any]) -> float:
    """How long something takes."""
    started = time.monotonic()
    work()
    return time.monotonic() - started


def ping(lab: Commands) -> float:
    """`ansible -m ping` with the lab's inventory as a file and a warm connection: the floor of any play."""
    from labctl.ansible import as_static

    inventory = lab.directory / "inventory.json"
    inventory.write_text(json.dumps(as_static(lab.json("inventory"))))
    command = [str(Path(sys.executable).with_name("ansible")), "-i", str(inventory), "labctl", "-m", "ping"]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(REPOSITORY / "playbooks" / "ansible.cfg")}

    def once() -> None:
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)

    once()
    return statistics.median(seconds(once) for _ in range(PINGS))


def measure_labctl(lab: Commands) -> dict[str, float]:
    """Cold and no-op converge, and a rebuild."""
    cold = lab.json("up")["seconds"]
    floor = ping(lab)
    noops = [lab.json("converge") for _ in range(NOOPS)]
    assert all(one["changed"] == 0 for one in noops), noops
    return {
        "ping_s": floor,
        "converge_cold_s": cold,
        "converge_noop_s": statistics.median(one["seconds"] for one in noops),
        "noop_remote_tasks": noops[-1]["remote_tasks"],
        "rebuild_s": seconds(lambda: lab.run("rebuild")),
    }


def measure_tutorial(lab: Commands) -> dict[str, float]:
    """The same end states by the tutorial's commands. The server, address and volume come from the same cloud code."""
    from labctl.lab import load
    from labctl.lifecycle import provide
    from labctl.store_access import renewed

    context = tutorial.context(load(lab.directory / "lab.yaml"), lab.environment["LABCTL_STATE"])

    def over_ssh(server: Any, commands: list[str]) -> None:
        login = context.login(server)
        for command in commands:
            done = subprocess.run(
                [*login.argv(), "bash", "-e", "-c", shlex.quote(command)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"tutorial: {command}\n{done.stdout}\n{done.stderr}")

    server, volume = provide(context)
    credential = renewed(context, server)
    assert credential is not None
    cold = seconds(
        lambda: over_ssh(
            server,
            [
                *tutorial.host_setup(context, credential),
                *tutorial.format_volume(volume.id),
                *tutorial.mount_volume(volume.id),
                *tutorial.start_stack(context),
            ],
        )
    )

    def rebuild() -> None:
        over_ssh(server, tutorial.stop_stack())
        delete_server_behind_labctl(server.name)
        again, same_volume = provide(context)
        credential = renewed(context, again)
        assert credential is not None
        setup = tutorial.host_setup(context, credential)
        over_ssh(again, [*setup, *tutorial.mount_volume(same_volume.id), *tutorial.start_stack(context)])

    return {"tutorial_cold_s": cold, "tutorial_rebuild_s": seconds(rebuild)}


def main() -> int:
    """Run everything once, clean up, report."""
    directory = REPOSITORY / "build" / "bench"
    directory.mkdir(parents=True, exist_ok=True)
    results: dict[str, float] = {}
    for name, measure in (("bench", measure_labctl), ("bench-tutorial", measure_tutorial)):
        (directory / "lab.yaml").unlink(missing_ok=True)
        lab = Commands(directory, environment={"LABCTL_STATE": str(directory / "state")})
        lab.run("init", name)
        lab.run("--yes", "destroy", "--force")
        try:
            results |= measure(lab)
        finally:
            lab.run("--yes", "destroy", "--force")
    document = {key: round(value, 2) for key, value in results.items()}
    (REPOSITORY / "build" / "bench.json").write_text(json.dumps(document, indent=2) + "\n")
    for key, value in document.items():
        print(f"{key:<20} {value:8.2f}")
    print(f"no-op converge / ping        {document['converge_noop_s'] / document['ping_s']:8.2f}")
    print(f"tutorial / labctl, cold      {document['tutorial_cold_s'] / document['converge_cold_s']:8.2f}")
    print(f"tutorial / labctl, rebuild   {document['tutorial_rebuild_s'] / document['rebuild_s']:8.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
