"""The container: what it holds, what is written to it and what is removed. Every path is relative to its root."""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from labctl_etl.model import CONTROL, MANIFEST, PENDING, Row, read_table
from labctl_etl.rclone import UNKNOWN, Rclone, StoreError, patient
from labctl_job.errors import Failure

#: What an object is listed with. Times would cost a request each.
LIST = {"filesOnly": True, "showHash": True, "hashTypes": ["md5"], "noModTime": True, "noMimeType": True}
#: Removals at the same time, and from how many on they go by a list: one by one, each costs a HEAD beside the DELETE.
REMOVERS, BY_LIST = 32, 4
#: What a store says to a conditional PUT of an object that is there, or that another is just writing.
EXISTS = re.compile(r"\b412\b|PreconditionFailed|ConditionalRequestConflict")


@dataclass(frozen=True)
class Stored:
    """An object as a listing shows it; `md5` is "" where the store doesn't say."""

    size: int
    md5: str = ""

    def is_it(self, size: int, md5: str) -> bool:
        """Whether it has that content, as far as the listing tells."""
        return self.size == size and self.md5 in ("", md5)


class Store:
    """One container of the host's remote."""

    def __init__(self, rclone: Rclone, remote: str, container: str) -> None:
        self.rclone, self.container = rclone, container
        self._fs = f"{remote}:{container}"
        self._remote = remote
        #: Whether the store takes conditions with a PUT; Swift's own S3 says that it doesn't.
        self.conditional = True

    def listing(self, below: str = "", *, recurse: bool = True) -> dict[str, Stored]:
        """{path: object} of all that is there below a folder; empty where there is nothing."""
        rows = self.rows(self._fs, below, recurse=recurse)
        return {row["Path"]: Stored(row["Size"], row.get("Hashes", {}).get("md5", "")) for row in rows}

    def rows(self, fs: str, below: str, *, recurse: bool = True) -> list[dict[str, Any]]:
        """rclone's own rows."""

        def ask() -> Any:
            return self.rclone.call("operations/list", fs=fs, remote=below, opt={**LIST, "recurse": recurse})

        try:
            return list(patient(f"listing {below or self.container}", ask)["list"] or [])
        except StoreError:
            return []

    def get(self, path: str) -> bytes | None:
        """A small object's content, None where there is none."""
        try:
            return bytes(patient(f"reading {path}", lambda: self.rclone.get(self._fs, path)))
        except StoreError:
            return None

    def put(self, path: str, data: bytes, stop: threading.Event | None = None) -> None:
        """An object out of memory; what was there is replaced."""
        patient(f"writing {path}", lambda: self.rclone.upload(self._fs, path, data), stop)

    def create(self, path: str, data: bytes) -> bool:
        """An object that mustn't be there yet. False if it is, as far as the store minds the condition.

        Where it refuses all conditions, the object is written without one, and `conditional` is False from then on.
        """

        def ask() -> bool:
            condition = [{"Key": "If-None-Match", "Value": "*"}] if self.conditional else []
            try:
                with tempfile.NamedTemporaryFile(dir=self.rclone.folder) as file:
                    file.write(data)
                    file.flush()
                    source = {"srcFs": os.path.dirname(file.name), "srcRemote": os.path.basename(file.name)}
                    self.rclone.call("operations/copyfile", **source, dstFs=self._fs, dstRemote=path,
                                     _config={"UploadHeaders": condition, "NoCheckDest": True})  # fmt: skip
                return True
            except StoreError as error:
                if EXISTS.search(str(error)):
                    return False
                if not (self.conditional and UNKNOWN.search(str(error))):
                    raise
            self.conditional = False
            return ask()

        return bool(patient(f"writing {path}", ask))

    def put_json(self, path: str, document: Any) -> None:
        """A small document."""
        self.put(path, json.dumps(document, ensure_ascii=False, indent=1).encode())

    def put_file(self, local: str, path: str, stop: threading.Event | None = None) -> None:
        """A file of this host."""
        source = {"srcFs": os.path.dirname(local), "srcRemote": os.path.basename(local)}
        target = {"dstFs": self._fs, "dstRemote": path}
        patient(f"writing {path}", lambda: self.rclone.call("operations/copyfile", **source, **target), stop)

    def move(self, source: str, target: str) -> None:
        """Within the container, by the store itself. What isn't there any more was moved before."""
        paths = {"srcFs": self._fs, "srcRemote": source, "dstFs": self._fs, "dstRemote": target}
        try:
            patient(f"moving {source}", lambda: self.rclone.call("operations/movefile", **paths))
        except StoreError:
            return

    def send_folder(self, folder: str, transfers: int, stop: threading.Event, told: Callable[[int, int], None]) -> None:
        """Every file below a folder of this host to the same path here: `transfers` at a time, a PUT each, by MD5.

        A file leaves the folder when the store has it. `told` hears of that: (bytes, files).
        """
        there = files_below(folder)

        def look() -> int:
            nonlocal there
            now = files_below(folder)
            gone = there.keys() - now.keys()
            told(sum(there[path] for path in gone), len(gone))
            there = now
            return len(now)

        def ask() -> None:
            # without the look at what is there: it would cost a listing, and who sends knows it
            options = {"Transfers": transfers, "NoCheckDest": True, "NoTraverse": True}
            self.rclone.follow("sync/move", look, stop, srcFs=folder, dstFs=self._fs, _config=options)
            if left := look():
                raise StoreError(f"{left} files weren't sent", 500)

        patient(f"writing into {self.container}", ask, stop, look)

    def remove(self, paths: Iterable[str]) -> int:
        """Remove objects; one that isn't there is no error. Returns how many were asked for."""

        def one(path: str) -> None:
            try:
                patient(f"removing {path}", lambda: self.rclone.call("operations/deletefile", fs=self._fs, remote=path))
            except StoreError:
                return

        wanted = list(paths)
        if len(wanted) < BY_LIST or not self._remove_by_list(wanted):
            with ThreadPoolExecutor(REMOVERS) as pool:
                list(pool.map(one, wanted))
        return len(wanted)

    def _remove_by_list(self, wanted: list[str]) -> bool:
        """Remove just these by one command. False where it isn't certain that nothing else would go, or it failed."""
        folder = os.path.commonpath([os.path.dirname(path) for path in wanted])
        names = {os.path.relpath(path, folder) if folder else path for path in wanted}
        if any("\n" in name for name in names):
            return False
        with tempfile.NamedTemporaryFile("w", dir=self.rclone.folder, encoding="utf-8") as file:
            file.write("".join(f"{name}\n" for name in sorted(names)))
            file.flush()
            chosen = {"fs": f"{self._fs}/{folder}" if folder else self._fs, "_filter": {"FilesFromRaw": [file.name]}}
            options = {"UseListR": True, "Checkers": REMOVERS, "Transfers": REMOVERS}
            try:
                # what the filter chooses, before it chooses what is removed
                found = self.rclone.call("operations/list", **chosen, _config=options, remote="",
                                         opt={**LIST, "showHash": False, "recurse": True})["list"] or []  # fmt: skip
                if not {row["Path"] for row in found} <= names:
                    return False
                self.rclone.call("operations/delete", **chosen, _config={**options, "MaxDelete": len(names)})
            except StoreError:
                return False
        return True

    def control(self) -> dict[str, Stored]:
        """What is ours beside the data."""
        return self.listing(CONTROL)

    def document(self, path: str, control: dict[str, Stored]) -> dict[str, Any] | None:
        """A manifest, None where there is none. A safety stop where it can't be understood."""
        data = self.get(path) if path in control else None
        if data is None:
            return None
        try:
            found = json.loads(data)
            if found["format"] != 1 or found["layout"] not in ("files", "packed"):
                raise ValueError(f"format {found['format']}, layout {found['layout']}")
        except (ValueError, KeyError, TypeError) as error:
            if path == PENDING:
                return {}  # cut off while it was written: nothing in it was begun
            raise Failure(
                f"{path} in {self.container} isn't a manifest that this labctl can read. Nothing was written.",
                kind="safety_stop", expected="format 1", found=str(error),
                next_step="use the labctl that wrote it, or another container",
            ) from None  # fmt: skip
        return dict(found)

    def manifest(self, control: dict[str, Stored]) -> dict[str, Any] | None:
        """The committed load."""
        return self.document(MANIFEST, control)

    def table(self, path: str) -> list[Row]:
        """The rows of a table in the container. A safety stop where it is damaged or gone."""
        data = self.get(path)
        try:
            if data is None:
                raise ValueError("it isn't there")
            return read_table(data)
        except (ValueError, TypeError, KeyError) as error:
            raise Failure(
                f"The table {path} in {self.container} can't be used. Nothing was removed.",
                kind="safety_stop", expected="the table that the manifest names", found=str(error),
                next_step="restore it, or load into another container",
            ) from None  # fmt: skip

    def other(self, prefix: str) -> tuple[str, str]:
        """(fs, path) of CONTAINER/PATH in the same store, as rclone takes them."""
        container, _, path = prefix.strip("/").partition("/")
        return f"{self._remote}:{container}", path


def files_below(folder: str) -> dict[str, int]:
    """{path: bytes} of the files below a folder, some of which may go meanwhile."""
    found = {}
    for at, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(at, name)
            try:
                found[path] = os.stat(path).st_size
            except FileNotFoundError:
                continue
    return found
