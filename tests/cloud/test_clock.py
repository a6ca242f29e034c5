"""A machine whose clock is wrong, against the cloud's real one: said, and nothing made whose end would be wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import CLOUD, CLOUDS_FILE, object_entry, site
from labctl.cloud import server, session

LABCTL = Path(sys.executable).with_name("labctl")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A lab.yaml for the test cloud, under a name that is no preset."""
    entries = yaml.safe_load(CLOUDS_FILE.read_text())["clouds"]
    path = tmp_path / "clouds.yaml"
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump({"clouds": {"t": entries[CLOUD], "o": entries[object_entry()]}}))
    (tmp_path / "lab.yaml").write_text("lab: lct-clock\nsite: t\ncloud: {object_cloud: o}\n")
    return tmp_path


def at(shift: str, folder: Path, *command: str) -> tuple[int, str]:
    """A command of labctl's on a machine whose clock is off by `shift`."""
    if not shutil.which("faketime"):
        pytest.skip("needs the package faketime")
    environment = {
        **os.environ,
        "OS_CLIENT_CONFIG_FILE": str(folder / "clouds.yaml"),
        "LABCTL_STATE": str(folder / "state"),
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    done = subprocess.run(
        ["faketime", "-f", shift, str(LABCTL), *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(("shift", "word"), [("+20m", "ahead"), ("-3h", "behind")])
def test_nothing_is_made_by_a_clock_that_is_wrong(folder: Path, shift: str, word: str) -> None:
    code, said = at(shift, folder, "up")
    assert code == 2, said
    for text in (word, "expected", "found", "from", "timedatectl set-ntp true"):
        assert text in said
    assert server.find(session.connect(site()), "node-persist-lct-clock") is None
    assert not (folder / "state" / "id_ed25519").exists()


def test_doctor_says_it_earlier(folder: Path) -> None:
    code, said = at("+2m", folder, "doctor")
    assert code == 2, said
    assert "clock: this machine's clock is 1" in said and "ahead" in said


def test_a_clock_beyond_the_tokens_own_end_neither_loops_nor_hides_the_lab(folder: Path) -> None:
    """Every token looks as if it had ended; looking must go on all the same."""
    code, said = at("+2d", folder, "status")
    assert code == 0, said
    assert "ABSENT" in said
