"""SIGKILL at every step of a command, then the same command again: the same end, and nothing lost.

The steps aren't listed here. `--verbose` names each as it begins; a run is killed at the first one that no earlier run
was killed at, until one comes through. So a step that is added to labctl is swept, too.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable

import pytest
from story import LABCTL, Commands, Evidence, kill_node, power_on

SERVER = "node-persist-e2e"
#: More than any command has; a sweep that doesn't end by then would never.
LIMIT = 120


def step_of(line: str) -> str:
    """A line of progress without what differs from run to run: seconds, ids, addresses."""
    # a reminder of the step that takes long ends in "(# s)"; what is said once a second ends in "# s"
    return re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}|[0-9.]+", "#", line).strip()


def begin(lab: Commands, *command: str) -> subprocess.Popen[str]:
    """Start a command in a process group of its own."""
    return subprocess.Popen(
        [str(LABCTL), "--verbose", *command],
        cwd=lab.directory,
        env={**os.environ, **lab.environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def sweep(lab: Commands, command: tuple[str, ...], kill: Callable[[subprocess.Popen[str]], None]) -> list[str]:
    """Kill at each step in turn until the command comes through; the steps."""
    swept: list[str] = []
    for _ in range(LIMIT):
        process = begin(lab, *command)
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if (step := step_of(line)) not in swept and step.endswith("…") | line.startswith("  ") and "(#" not in step:
                swept.append(step)
                kill(process)
                break
        else:
            assert process.wait() == 0, "".join(said)
            return swept
        process.wait()
    raise AssertionError(f"still new steps after {LIMIT} kills: {swept}")


def kill_runner(process: subprocess.Popen[str]) -> None:
    """The laptop is closed: labctl alone dies, and what it had begun elsewhere goes on for as long as it does."""
    process.send_signal(signal.SIGKILL)


def kill_host(process: subprocess.Popen[str]) -> None:
    """The server's power fails and comes back; labctl ends by itself, whichever way."""
    kill_node(SERVER)
    power_on(SERVER)
    process.communicate(timeout=900)


def test_the_runner_killed_at_each_step_of_a_rebuild(lab: Commands) -> None:
    lab.run("up")
    lab.run("verify")
    before = Evidence.collect(lab)
    swept = sweep(lab, ("rebuild", "--force"), kill_runner)
    print(f"{len(swept)} kills:", *swept, sep="\n")
    assert len(swept) > 20, "labctl doesn't say its steps any more"
    assert not before.lost(Evidence.collect(lab))
    assert lab.json("converge")["changed"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", [("converge",), ("drain",), ("reattach-volume",)])
@pytest.mark.parametrize("kill", [kill_runner, kill_host])
def test_runner_or_host_killed_at_each_step(
    lab: Commands, command: tuple[str, ...], kill: Callable[[subprocess.Popen[str]], None]
) -> None:
    lab.run("up")
    lab.run("verify")
    before = Evidence.collect(lab)
    print(*sweep(lab, command, kill), sep="\n")
    lab.run("up")
    assert not before.lost(Evidence.collect(lab))
    assert lab.json("converge")["changed"] == 0


@pytest.mark.slow
def test_the_runner_killed_at_each_step_from_nothing_to_a_lab_and_back(lab: Commands) -> None:
    """`up` where there is nothing, a backup, a server given back; and an end of which nothing stays."""
    lab.run("--yes", "destroy", "--force")
    assert len(sweep(lab, ("up",), kill_runner)) > 20, "labctl doesn't say its steps any more"
    lab.run("verify")
    before = Evidence.collect(lab)
    sweep(lab, ("backup",), kill_runner)
    assert lab.json("backup", "verify")["verified_objects"] > 0
    lab.run("--yes", "backup", "delete", "--all")
    sweep(lab, ("down",), kill_runner)
    lab.run("up")
    assert not before.lost(Evidence.collect(lab))
    sweep(lab, ("--yes", "destroy", "--force"), kill_runner)
    status = lab.json("status")
    assert status["server"]["status"] == "ABSENT" and status["volume"]["id"] is None
