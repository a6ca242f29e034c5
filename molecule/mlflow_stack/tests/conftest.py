"""Running an entry point of the role against the scenario's node, from a test."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

SCENARIO = Path(__file__).parents[1]
sys.path.insert(0, str(SCENARIO.parents[1] / "tests"))

import nodes  # noqa: E402


@dataclass
class Played:
    """How a play ended: changed tasks, the custom statistics, all of its output, and the failing task's result."""

    ok: bool
    changed: int
    output: str
    custom: str
    failure: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="session")
def play_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Played]:
    """`play` for fixtures that outlive a test."""
    return player(tmp_path_factory.mktemp("play"))


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., Played]:
    """`play("main", **variables)` runs an entry point; `check=True` in check mode."""
    return player(tmp_path)


@pytest.fixture
def kill_at() -> Callable[[str], AbstractContextManager[None]]:
    """`with kill_at(step):` kills the module of the play in it at that step (kill_at.py), and fails if it couldn't."""

    @contextmanager
    def run(step: str) -> Iterator[None]:
        container = nodes.container_name("mlflow-stack")
        command = ["docker", "exec", "-i", container, "python3", "-u", "-", step]
        with (
            (Path(__file__).parent / "kill_at.py").open() as program,
            subprocess.Popen(command, stdin=program, stderr=subprocess.PIPE, text=True) as killer,
        ):
            yield
            _, said = killer.communicate()
            assert killer.returncode == 0, said

    return run


def player(folder: Path) -> Callable[..., Played]:
    """What the fixtures give; the failing task's result goes through a file in `folder`."""

    def run(entry: str, *, check: bool = False, **variables: Any) -> Played:
        report = folder / "report.json"
        report.unlink(missing_ok=True)
        inventory = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "inventory"
        # A node that was rebooted may have another address than molecule's inventory says.
        here = {"ansible_host": nodes.inspect("mlflow-stack")["address"]}
        extra = json.dumps({"entry": entry, "report": str(report), **here, **variables})
        done = subprocess.run(
            [
                "ansible-playbook", "-i", str(inventory), "-e", extra, *(["--check"] if check else []),
                str(SCENARIO / "stack.yml"),
            ],
            capture_output=True,
            text=True,
            check=False,
            env={
                **os.environ,
                "ANSIBLE_ROLES_PATH": str(SCENARIO.parents[1] / "roles"),
                "ANSIBLE_PIPELINING": "1",
                "ANSIBLE_NOCOLOR": "1",
                "ANSIBLE_SHOW_CUSTOM_STATS": "1",
            },
        )  # fmt: skip
        recap = re.search(r"changed=(\d+)", done.stdout)
        return Played(
            ok=done.returncode == 0,
            changed=int(recap[1]) if recap else -1,
            output=done.stdout + done.stderr,
            custom=done.stdout.partition("CUSTOM STATS")[2],
            failure=json.loads(report.read_text()) if report.exists() else {},
        )

    return run
