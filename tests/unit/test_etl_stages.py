"""Extract and transform as the containers run them: a bad archive must end before anything is unpacked or loaded."""

from __future__ import annotations

import hashlib
import json
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

STAGES = Path(__file__).parents[2] / "roles/etl/files"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """`run(stage, archive, **dataset)` runs a stage, with the archive on a real HTTP server and its own staging."""

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "staging").mkdir()

    def stage(name: str, archive: str = "a.zip", **dataset: Any) -> subprocess.CompletedProcess[str]:
        described = {
            "name": "test",
            "url": f"http://127.0.0.1:{server.server_address[1]}/{archive}",
            "sha256": "",
            "splits": ["training", "evaluation"],
            "classes": ["a", "b", "c"],
            **dataset,
        }
        (tmp_path / "dataset.json").write_text(json.dumps(described))
        return subprocess.run(
            [sys.executable, STAGES / f"{name}.py", tmp_path / "dataset.json", tmp_path / "staging"],
            capture_output=True,
            text=True,
            check=False,
        )

    yield stage
    server.shutdown()


def archive(path: Path, *entries: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries:
            file.writestr(name, content)
    return path


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


GOOD = [
    ("training/0_1.jpg", b"one"),
    ("training/2_5.jpg", b"two"),
    ("evaluation/1_1.JPG", b"three"),
    ("training/x.txt", b""),
]


def test_a_good_archive_ends_in_class_folders(tmp_path: Path, run: Run) -> None:
    path = archive(tmp_path / "a.zip", *GOOD)
    extracted = run("extract")
    assert extracted.returncode == 0, extracted.stderr
    assert json.loads(extracted.stdout.splitlines()[-1]) == {
        "archive_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "archive_bytes": path.stat().st_size,
    }
    transformed = run("transform")
    assert transformed.returncode == 0, transformed.stderr
    result = json.loads(transformed.stdout.splitlines()[-1])
    assert (result["images"], result["bytes"], result["left_out"]) == (3, 11, 1)
    assert result["counts"] == {"training": [1, 0, 1], "evaluation": [0, 1, 0]}
    done = tmp_path / "staging" / "sorted"
    files = sorted(str(path.relative_to(done)) for path in done.rglob("*") if path.is_file())
    assert files == [
        "evaluation/class_01/1_1.JPG",
        "labctl-manifest.json",
        "training/class_00/0_1.jpg",
        "training/class_02/2_5.jpg",
    ]


@pytest.mark.parametrize(
    "entries",
    [
        [*GOOD, ("../evil", b"x")],
        [*GOOD, ("training/../../evil", b"x")],
        [*GOOD, ("/etc/evil", b"x")],
        [*GOOD, ("C:/evil", b"x")],
        [*GOOD, ("training\\..\\evil", b"x")],
        [*GOOD, (link("training/0_2.jpg"), b"/etc/passwd")],
        [],
        [("training/", b"")],
    ],
    ids=["parent", "hidden parent", "absolute", "drive", "backslash", "symbolic link", "empty", "folders only"],
)
def test_a_hostile_or_empty_archive_unpacks_nothing(tmp_path: Path, run: Run, entries: list[Any]) -> None:
    archive(tmp_path / "a.zip", *entries)
    refused = run("extract")
    assert refused.returncode != 0
    assert "Nothing was loaded" in refused.stderr
    assert not (tmp_path / "staging" / "unpacked").exists()
    assert not (tmp_path / "evil").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_entry_that_is_there_twice_is_refused(tmp_path: Path, run: Run) -> None:
    archive(tmp_path / "a.zip", *GOOD, GOOD[0])
    assert "twice" in run("extract").stderr


@pytest.mark.parametrize("what", ["no zip", "cut off", "bit flipped", "other hash", "missing"])
def test_what_arrives_must_be_what_was_described(tmp_path: Path, run: Run, what: str) -> None:
    path = archive(tmp_path / "a.zip", *GOOD)
    content = bytearray(path.read_bytes())
    if what == "no zip":
        path.write_text("<html>sign in</html>")
    elif what == "cut off":
        path.write_bytes(content[: len(content) // 2])
    elif what == "bit flipped":
        content[content.index(b"three")] ^= 1
        path.write_bytes(content)
    refused = run("extract", "b.zip" if what == "missing" else "a.zip", sha256="0" * 64 if what == "other hash" else "")
    assert refused.returncode != 0
    assert "Nothing was loaded" in refused.stderr


@pytest.mark.parametrize(
    "entries",
    [[("training/3_1.jpg", b"x")], [("training/dog.jpg", b"x")], [("other/0_1.jpg", b"x")]],
    ids=["class number too high", "no class number", "no split"],
)
def test_images_that_fit_no_class_stop_the_set(tmp_path: Path, run: Run, entries: list[Any]) -> None:
    archive(tmp_path / "a.zip", *entries)
    assert run("extract").returncode == 0
    refused = run("transform")
    assert refused.returncode != 0
    assert "Nothing was loaded" in refused.stderr
