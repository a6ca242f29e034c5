"""One lab in the sandbox for all of these tests, and its removal, also after a failure."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from story import Commands


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """A directory with a lab.yaml; nothing of the lab exists yet."""
    directory = tmp_path_factory.mktemp("lab")
    commands = Commands(directory, quiet=True, environment={"LABCTL_STATE": str(tmp_path_factory.mktemp("state"))})
    commands.run("init", "e2e")
    with contextlib.suppress(AssertionError):
        commands.run("--yes", "destroy", "--force")
    yield commands
    commands.run("--yes", "destroy", "--force")
