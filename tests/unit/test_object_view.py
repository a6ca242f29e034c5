"""What is covered of a container with an unfinished load, and that a table can't have anything covered elsewhere."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[2] / "roles" / "rclone" / "files" / "object_view.py"


@pytest.fixture
def view(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The program, with the container's tree in a folder."""
    spec = importlib.util.spec_from_file_location("object_view", PROGRAM)
    assert spec
    assert spec.loader
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    monkeypatch.setattr(program, "RAW", tmp_path)
    return program


def made(home: Path, *paths: str) -> Path:
    """A tree of empty files."""
    for path in paths:
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).touch()
    return home


def test_only_what_is_hidden_is_covered(view: Any, tmp_path: Path) -> None:
    files = made(tmp_path / "files", "training/class_00/a", "training/class_00/b", "notes.txt")
    assert view.covering(files, {"training/class_00/b"}) == {"training/class_00/b"}


def test_a_folder_of_nothing_else_is_covered_as_a_whole(view: Any, tmp_path: Path) -> None:
    files = made(tmp_path / "files", "training/class_00/a", "training/class_01/b", "evaluation/class_00/c")
    hidden = {"training/class_01/b", "evaluation/class_00/c", "evaluation/class_07/not-sent-yet"}
    assert view.covering(files, hidden) == {"training/class_01", "evaluation"}


def test_a_folder_with_a_folder_of_others_in_it_stays(view: Any, tmp_path: Path) -> None:
    files = made(tmp_path / "files", "training/class_00/a", "training/mine/b")
    assert view.covering(files, {"training/class_00/a"}) == {"training/class_00"}


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "training/../../x"])
def test_a_table_that_points_out_of_the_tree_is_refused(view: Any, tmp_path: Path, path: str) -> None:
    tables = tmp_path / "labctl" / "tables"
    tables.mkdir(parents=True)
    (tables / "pending-x-0.jsonl.gz").write_bytes(gzip.compress(json.dumps({"path": path}).encode()))
    with pytest.raises(view.Failed, match="isn't a table"):
        view.table(".labctl/tables/pending-x-0.jsonl.gz")


def test_a_table_that_was_cut_is_refused(view: Any, tmp_path: Path) -> None:
    tables = tmp_path / "labctl" / "tables"
    tables.mkdir(parents=True)
    (tables / "t.jsonl.gz").write_bytes(gzip.compress(json.dumps({"path": "a"}).encode())[:-6])
    with pytest.raises(view.Failed, match="isn't a table"):
        view.table(".labctl/tables/t.jsonl.gz")


def test_only_tables_are_taken_for_tables(view: Any, tmp_path: Path) -> None:
    made(
        tmp_path / "labctl" / "tables", "pending-x-00000.jsonl.gz", "pending-x-shards.json", "1.jsonl.gz", "2.jsonl.gz"
    )
    found = {"replaced": [".labctl/tables/1.jsonl.gz", ".labctl/tables/gone.jsonl.gz"]}
    assert view.unfinished(found) == [".labctl/tables/pending-x-00000.jsonl.gz", ".labctl/tables/1.jsonl.gz"]
    assert view.unfinished(None) == [".labctl/tables/pending-x-00000.jsonl.gz"]
