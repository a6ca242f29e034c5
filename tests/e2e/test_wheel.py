"""What a user installs: the wheel alone, in an empty environment, run from a directory of nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from story import REPOSITORY


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds the wheel and what it depends on."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = folder.glob("labctl-*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    pip = [str(folder / "venv" / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, str(wheel)], check=True)
    return folder / "venv" / "bin"


def run(installed: Path, directory: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    environment |= {"LABCTL_STATE": str(directory / "state")}
    return subprocess.run(
        [str(installed / command[0]), *command[1:]],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_command_explains_itself(installed: Path, tmp_path: Path) -> None:
    listed = run(installed, tmp_path, "labctl", "--help")
    assert listed.returncode == 0
    commands = listed.stdout.partition("Commands:")[2].split("\n")
    names = [line.split()[0] for line in commands if line.startswith("  ") and not line.startswith("   ")]
    assert {"up", "rebuild", "reattach-volume", "verify", "sandbox"} <= set(names)
    for name in names:
        assert run(installed, tmp_path, "labctl", name, "--help").returncode == 0, name


def test_a_lab_is_written_and_asked_for_from_anywhere(installed: Path, tmp_path: Path) -> None:
    assert run(installed, tmp_path, "labctl", "init", "wheel").returncode == 0
    assert "ABSENT" in run(installed, tmp_path, "labctl", "status").stdout
    assert run(installed, tmp_path, "labctl", "sandbox", "status").returncode == 0
    converged = run(installed, tmp_path, "labctl", "converge")
    assert converged.returncode == 3 and "labctl up" in converged.stderr


def test_playbooks_roles_inventory_and_sandbox_are_in_the_wheel(installed: Path, tmp_path: Path) -> None:
    asked = run(installed, tmp_path, "python", "-c", "from labctl import resources; print(resources.root())")
    root = Path(asked.stdout.strip())
    assert root.is_relative_to(installed.parent)
    playbook = run(
        installed,
        tmp_path,
        "ansible-playbook",
        "--syntax-check",
        "-i",
        "node,",
        str(root / "playbooks" / "converge.yml"),
    )
    assert playbook.returncode == 0, playbook.stderr
    for needed in (
        "sandbox/images/versions.json",
        "roles/common/module_utils/deb_packages.py",
        "playbooks/ansible.cfg",
    ):
        assert (root / needed).is_file(), needed
    assert os.access(root / "inventory" / "labctl.py", os.X_OK)


def test_plain_ansible_never_takes_a_failed_inventory_for_an_empty_one(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = run(installed, tmp_path, "python", "-c", "from labctl import resources; print(resources.root())")
    root = Path(asked.stdout.strip())
    monkeypatch.setenv("ANSIBLE_CONFIG", str(root / "playbooks" / "ansible.cfg"))
    monkeypatch.setenv("ANSIBLE_CONFIG", str(root / "playbooks" / "ansible.cfg"))
    listed = run(installed, tmp_path, "ansible-inventory", "-i", str(root / "inventory" / "labctl.py"), "--list")
    assert listed.returncode != 0 and "lab.yaml" in listed.stderr
