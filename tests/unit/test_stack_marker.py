"""The marker's pointers say which database and objects are served: a torn, dropped or misleading one loses them."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

import pytest


def load() -> ModuleType:
    path = Path(__file__).parents[2] / "roles/mlflow_stack/module_utils/stack_marker.py"
    spec = importlib.util.spec_from_file_location("stack_marker", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


marker = load()
IDENTITY = {"lab": "ada", "volume_id": "v", "filesystem_uuid": "u", "later": {"key": [1]}}
STACK = {"postgres_major": "17", "postgres_dir": "postgres_data", "s3_dir": "restored/minio_data", "origin": "labctl"}


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    (tmp_path / ".labctl").mkdir()
    (tmp_path / ".labctl" / "volume.json").write_text(json.dumps(IDENTITY))
    return tmp_path


def test_a_volume_that_served_no_stack_yet_has_no_key(volume: Path) -> None:
    assert marker.read(str(volume)) == {}


def test_what_was_written_is_read_and_the_identity_stays(volume: Path) -> None:
    assert marker.write(str(volume), STACK) is True
    assert marker.read(str(volume)) == STACK
    assert json.loads((volume / ".labctl/volume.json").read_text()) == {**IDENTITY, "stack": STACK}
    assert sorted(path.name for path in (volume / ".labctl").iterdir()) == ["volume.json"]
    assert (volume / ".labctl/volume.json").stat().st_mode & 0o777 == 0o600


def test_the_same_again_writes_nothing(volume: Path) -> None:
    marker.write(str(volume), STACK)
    before = (volume / ".labctl/volume.json").stat()
    assert marker.write(str(volume), dict(STACK)) is False
    assert (volume / ".labctl/volume.json").stat().st_ino == before.st_ino


def test_a_write_that_fails_leaves_the_old_marker(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker.write(str(volume), STACK)

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        marker.write(str(volume), {**STACK, "postgres_dir": "other"})
    assert marker.read(str(volume)) == STACK
    assert sorted(path.name for path in (volume / ".labctl").iterdir()) == ["volume.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stack": []}', '{"stack": "postgres_data"}'])
def test_a_marker_that_says_nothing_sensible_is_no_empty_one(volume: Path, text: str) -> None:
    (volume / ".labctl/volume.json").write_text(text)
    with pytest.raises(marker.MarkerError):
        marker.read(str(volume))


def test_a_missing_marker_is_not_made_up(volume: Path) -> None:
    (volume / ".labctl/volume.json").unlink()
    for call in (lambda: marker.read(str(volume)), lambda: marker.write(str(volume), STACK)):
        with pytest.raises(marker.MarkerError, match="there is no"):
            call()


@pytest.mark.parametrize(
    "path", ["/etc", "../other", "a/../../b", "", "a//b", ".", ".labctl", ".labctl/dumps", "a\nb", 7]
)
def test_a_pointer_never_leads_out_of_the_volume(volume: Path, path: object) -> None:
    with pytest.raises(marker.MarkerError, match="isn't a path on the volume"):
        marker.write(str(volume), {**STACK, "s3_dir": path})
    (volume / ".labctl/volume.json").write_text(json.dumps({**IDENTITY, "stack": {**STACK, "postgres_dir": path}}))
    with pytest.raises(marker.MarkerError, match="isn't a path on the volume"):
        marker.read(str(volume))
