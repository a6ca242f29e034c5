"""The inventory of one run is remembered for that run only: a stale one would send Ansible to a server that is gone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from labctl import inventory_cache

DOCUMENT = {"_meta": {"hostvars": {"node": {"ansible_host": "192.0.2.1"}}}, "labctl": {"hosts": ["node"]}}


def test_the_same_run_gets_it_and_another_doesnt(tmp_path: Path) -> None:
    inventory_cache.write(tmp_path / "state", "k", DOCUMENT)
    assert inventory_cache.read(tmp_path / "state", "k") == DOCUMENT
    assert inventory_cache.read(tmp_path / "state", "other") is None
    files = list((tmp_path / "state").iterdir())
    assert [(file.name, file.stat().st_mode & 0o777) for file in files] == [("inventory.json", 0o600)]


def test_it_is_forgotten_after_a_change_and_after_its_time(tmp_path: Path) -> None:
    inventory_cache.write(tmp_path, "k", DOCUMENT)
    then = time.time() - inventory_cache.SECONDS - 1
    os.utime(tmp_path / "inventory.json", (then, then))
    assert inventory_cache.read(tmp_path, "k") is None
    inventory_cache.write(tmp_path, "k", DOCUMENT)
    inventory_cache.forget(tmp_path)
    inventory_cache.forget(tmp_path)
    assert inventory_cache.read(tmp_path, "k") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": "k"}', '{"key": "k", "document": 7}'])
def test_a_damaged_file_is_no_inventory(tmp_path: Path, text: str) -> None:
    (tmp_path / "inventory.json").write_text(text)
    assert inventory_cache.read(tmp_path, "k") is None


def test_nobody_known_nothing_remembered(tmp_path: Path) -> None:
    inventory_cache.write(tmp_path, "", DOCUMENT)
    assert not list(tmp_path.iterdir())
    assert inventory_cache.key_of(tmp_path / "none.yaml", None) == ""


def test_the_key_is_the_runs_the_files_and_the_logins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, clouds = tmp_path / "lab.yaml", tmp_path / "clouds.yaml"
    lab.write_text("lab: ada\n")
    clouds.write_text("a")
    keys = [inventory_cache.key_of(lab, clouds)]
    assert inventory_cache.key_of(lab, clouds) == keys[0]
    clouds.write_text("b")
    keys.append(inventory_cache.key_of(lab, clouds))
    lab.write_text("lab: bob\n")
    keys.append(inventory_cache.key_of(lab, clouds))
    monkeypatch.setenv("OS_CLOUD", "elsewhere")
    keys.append(inventory_cache.key_of(lab, clouds))
    code = (
        f"from labctl import inventory_cache as c; from pathlib import Path; print(c.key_of(Path({str(lab)!r}), None))"
    )
    for _ in range(2):  # each by a shell of its own
        shell = ["/bin/sh", "-c", f'"{sys.executable}" -c "$1"; true', "sh", code]
        keys.append(subprocess.run(shell, capture_output=True, text=True, check=True).stdout.strip())
    assert len(set(keys)) == len(keys) and all(keys)
    assert "elsewhere" not in "".join(keys)
