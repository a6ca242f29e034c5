"""Sources as the load reads them: what is hostile or damaged must be refused and never loaded."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

sys.path.extend(str(Path(__file__).parents[2] / "roles" / role / "files") for role in ("etl", "common"))

from labctl_etl import archives, fetch, load, rules, sources
from labctl_etl.model import Dataset, Refused, Row, pack_table, read_table, version_of
from labctl_job.errors import Failure

GOOD = [
    ("training/0_1.jpg", b"one" * 700),
    ("training/2_5.jpg", b"two"),
    ("evaluation/1_1.JPG", b"three"),
    ("training/x.txt", b""),
]


def described(url: str = "", **more: Any) -> Dataset:
    return Dataset(
        "test", url=url, splits=("training", "evaluation"), classes=more.pop("classes", ("a", "b", "c")), **more
    )


def make_zip(path: Path, *entries: tuple[str | zipfile.ZipInfo, bytes], packed: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", packed) as file:
        for name, content in entries:
            file.writestr(name, content)
    return path


def make_tar(path: Path, *entries: tuple[str | tarfile.TarInfo, bytes]) -> Path:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, content in entries:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    data = buffer.getvalue()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout
    path.write_bytes(data)
    return path


def read(dataset: Dataset) -> dict[str, bytes]:
    """What a load would send: {path: content}, with every check that it makes."""
    source = archives.archive(dataset, lambda _: False) if dataset.url else sources.Folder(dataset)
    try:
        sorter = rules.Sorter(dataset, source.names)
        if sorter.needs_labels:
            sorter.labels((source.peek(dataset.labels_entry) or b"").decode())
        places = {name: sorter.place(name) for name in source.names} if source.names is not None else None
        found = {}
        for entry in source.entries():
            place = places[entry.name] if places is not None else sorter.place(entry.name)
            if place:
                content = b""
                while block := entry.read(1000):
                    content += block
                found[place[2]] = content
        assert source.sha256()
        return found
    finally:
        source.close()


class Server(ThreadingHTTPServer):
    """One file. `cut`: each answer ends after so many bytes; `ranges`: whether it gives out parts."""

    daemon_threads = True

    def __init__(self, path: Path, *, ranges: bool = True, cut: int = 0) -> None:
        self.path, self.ranges, self.cut, self.asked = path, ranges, cut, list[str]()
        super().__init__(("127.0.0.1", 0), _Answer)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/archive"

    def handle_error(self, request: Any, client_address: Any) -> None:
        del request, client_address  # a client that has seen enough


class _Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        data, span = self.server.path.read_bytes(), self.headers.get("Range", "")
        self.server.asked.append(span)
        size, found = len(data), re.fullmatch(r"bytes=(\d+)-(\d*)", span)
        if self.server.ranges and found:
            start, end = int(found[1]), min(int(found[2] or size - 1), size - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
            data = data[start : end + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{size}"')
        self.end_headers()
        self.wfile.write(data[: self.server.cut] if self.server.cut else data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Any]:
    running = []

    def one(path: Path, **how: Any) -> Server:
        running.append(Server(path, **how))
        return running[-1]

    yield one
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def small_bombs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "BOMB_BYTES", 1 << 20)


EXPECTED = {
    "training/class_00/0_1.jpg": b"one" * 700,
    "training/class_02/2_5.jpg": b"two",
    "evaluation/class_01/1_1.JPG": b"three",
}


@pytest.mark.parametrize("how", ["stored", "deflated", "bzip2", "tar", "tar.gz", "tar.zst"])
@pytest.mark.parametrize("ranges", [True, False])
def test_every_kind_of_archive_gives_the_same_files(
    tmp_path: Path, serve: Any, how: str, ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "SPOOL", str(tmp_path / "spool"))
    methods = {"stored": zipfile.ZIP_STORED, "deflated": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2}
    if how.endswith("zst") and not shutil.which("zstd"):
        pytest.skip("no zstd here")
    path = (
        make_zip(tmp_path / "a.zip", *GOOD, packed=methods[how]) if how in methods else make_tar(tmp_path / how, *GOOD)
    )
    assert read(described(serve(path, ranges=ranges).url)) == EXPECTED
    assert read(described(path.as_uri())) == EXPECTED


@pytest.mark.parametrize("kind", ["a.zip", "a.tar"])
def test_a_download_that_is_cut_again_and_again_is_taken_up_where_it_ended(
    tmp_path: Path, serve: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.time, "sleep", lambda _: None)
    path = (make_zip if kind == "a.zip" else make_tar)(tmp_path / kind, *GOOD)
    server = serve(path, cut=0)
    server.cut = 700 if kind == "a.tar" else 0
    if kind == "a.zip":  # its directory is read in one piece, the rest is cut
        remote = fetch.Remote(server.url)
        stream = fetch.Stream(remote)
        server.cut = 700
        assert hashlib.sha256(path.read_bytes()).hexdigest() == stream.sha256()
        assert stream.resumed > 2
        return
    assert read(described(server.url)) == EXPECTED
    assert any(span.startswith("bytes=700-") for span in server.asked)


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def tar_link(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


HOSTILE = {
    "parent": ("../evil", b"x"),
    "hidden parent": ("training/../../evil", b"x"),
    "absolute": ("/etc/evil", b"x"),
    "drive": ("C:/evil", b"x"),
    "backslash": ("training\\..\\evil", b"x"),
    "control character": ("training/0_\n.jpg", b"x"),
    "class number too high": ("training/3_1.jpg", b"x"),
    "twice": GOOD[0],
    "twice below another folder": ("top/training/0_1.jpg", b"other"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("what", [*HOSTILE, "symbolic link", "bomb", "encrypted", "nothing", "folders only"])
@pytest.mark.usefixtures("small_bombs")
def test_a_hostile_zip_is_refused_before_its_content_is_read(tmp_path: Path, what: str) -> None:
    entries: list[Any] = [*GOOD, HOSTILE[what]] if what in HOSTILE else [*GOOD]
    entries = {
        "nothing": [],
        "folders only": [("training/", b"")],
        "symbolic link": [*GOOD, (link("training/0_2.jpg"), b"/x")],
    }.get(what, entries)
    path = make_zip(tmp_path / "a.zip", *entries)
    if what == "bomb":
        path = make_zip(tmp_path / "a.zip", ("training/0_1.jpg", bytes(8 << 20)), packed=zipfile.ZIP_DEFLATED)
    if what == "encrypted":
        data = bytearray(path.read_bytes())
        at = data.rindex(b"PK\1\2")
        data[at + 8] |= 1
        path.write_bytes(data)
    with pytest.raises(Refused, match="Nothing was loaded"):
        source = archives.archive(described(path.as_uri()), lambda _: False)
        sorter = rules.Sorter(described(), source.names)
        for name in source.names or []:
            sorter.place(name)


@pytest.mark.parametrize("what", [*HOSTILE, "symbolic link", "hard link", "device", "nothing", "bomb"])
@pytest.mark.usefixtures("small_bombs")
def test_a_hostile_tar_is_refused_where_it_shows(tmp_path: Path, what: str) -> None:
    kinds = {"symbolic link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.BLKTYPE}
    extra: list[Any] = (
        [HOSTILE[what]]
        if what in HOSTILE
        else [(tar_link("training/0_2.jpg", kinds[what]), b"")]
        if what in kinds
        else []
    )
    entries: list[Any] = [] if what == "nothing" else [*GOOD, *extra]
    if what == "bomb":
        entries = [("training/0_9.jpg", bytes(8 << 20))]
    path = make_tar(tmp_path / "a.tar.gz", *entries)
    with pytest.raises(Refused, match="Nothing was loaded"):
        read(described(path.as_uri()))


@pytest.mark.parametrize("kind", ["a.zip", "a.tar", "a.tar.gz", "a.tar.zst"])
@pytest.mark.parametrize("what", ["not one", "cut off", "bit flipped"])
def test_a_damaged_archive_is_refused(tmp_path: Path, kind: str, what: str) -> None:
    if kind.endswith("zst") and not shutil.which("zstd"):
        pytest.skip("no zstd here")
    if (kind, what) == ("a.tar", "bit flipped"):
        pytest.skip("a plain tar has no checksum of its content: dataset.sha256 is for that")
    path = (make_zip if kind == "a.zip" else make_tar)(tmp_path / kind, *GOOD)
    content = bytearray(path.read_bytes())
    if what == "not one":
        content = bytearray(b"<html>sign in</html>")
    elif what == "cut off":
        content = content[: 3000 if kind == "a.tar" else len(content) // 2]
    else:
        content[content.index(b"three") if kind == "a.zip" else len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(Refused):
        read(described(path.as_uri()))


def test_a_zip_whose_entries_have_other_names_inside_is_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", *GOOD)
    content = path.read_bytes().replace(b"training/2_5.jpg", b"training/1_5.jpg", 1)
    path.write_bytes(content)
    with pytest.raises(Refused, match="another name"):
        read(described(path.as_uri()))


def test_classes_by_folder_and_by_labels(tmp_path: Path) -> None:
    files = [("training/cat/a.jpg", b"1"), ("training/dog/b.png", b"2"), ("evaluation/cat/deep/c.jpg", b"3")]
    by_folder = read(described(make_zip(tmp_path / "f.zip", *files).as_uri(), rule="folder", classes=()))
    assert sorted(by_folder) == ["evaluation/class_00/c.jpg", "training/class_00/a.jpg", "training/class_01/b.png"]
    labels = b"path,class\na.jpg,dog\nb.jpg,cat\n"
    path = make_zip(tmp_path / "l.zip", ("training/a.jpg", b"1"), ("training/b.jpg", b"2"), ("labels.csv", labels))
    by_labels = read(described(path.as_uri(), rule="csv", labels_entry="labels.csv", classes=("cat", "dog")))
    assert by_labels == {"training/class_01/a.jpg": b"1", "training/class_00/b.jpg": b"2"}
    with pytest.raises(Refused, match="no class of the set"):
        read(described(path.as_uri(), rule="csv", labels_entry="labels.csv", classes=("cat", "bird")))
    with pytest.raises(Failure, match="doesn't say which folders"):
        read(described(make_tar(tmp_path / "f.tar", *files).as_uri(), rule="folder", classes=()))


def test_a_folder_is_a_source_and_its_links_are_refused(tmp_path: Path) -> None:
    for name, content in GOOD:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(content)
    assert read(described(folder=str(tmp_path / "set"))) == EXPECTED
    (tmp_path / "set" / "training" / "0_7.jpg").symlink_to("/etc/passwd")
    with pytest.raises(Refused, match="symbolic link"):
        read(described(folder=str(tmp_path / "set")))


def test_an_unchanged_source_is_known_without_reading_it(tmp_path: Path, serve: Any) -> None:
    path = make_zip(tmp_path / "a.zip", *GOOD)
    source = archives.archive(described(serve(path).url), lambda _: False)
    fingerprint = source.fingerprint()
    assert load.same_source({**fingerprint, "sha256": "1"}, fingerprint)
    make_zip(path, *GOOD[:2], ("evaluation/1_1.JPG", b"THREE"), GOOD[3])
    other = archives.archive(described(serve(path).url), lambda _: False)
    assert not load.same_source(fingerprint, other.fingerprint())
    assert not load.same_source(fingerprint, {})
    with pytest.raises(archives.Known):
        archives.archive(described(serve(path, ranges=False).url), lambda _: True)


def test_a_table_reads_back_and_its_version_is_that_of_its_files() -> None:
    rows = [Row("b", 2, "s", "m"), Row("a", 1, "s", "m", kept=True)]
    assert read_table(pack_table(rows)) == sorted(rows, key=lambda row: row.path)
    assert version_of(rows) == version_of(rows[::-1]) != version_of(rows[:1])


def test_what_was_replaced_stays_on_record_until_it_is_removed() -> None:
    """By the tables of the replaced loads their files are hidden, found and removed; a packed load has no files."""
    old = {"layout": "files", "table": "t/2", "replaced": ["t/0", "t/1"]}
    control = dict.fromkeys(["t/1", "t/2", "t/3"])
    assert load.replaced(old, "t/3", control) == ["t/1", "t/2"]
    assert load.replaced(old, "t/2", control) == ["t/1"], "the same set once more replaces nothing of its own"
    assert load.replaced({**old, "layout": "packed"}, "t/3", control) == ["t/1"]
    assert load.replaced(None, "t/3", control) == []
