"""The container: what it holds, what is written to it and what is removed. Every path is relative to its root."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from labctl_etl.errors import Failure
from labctl_etl.model import CONTROL, MANIFEST, PENDING, Row, read_table
from labctl_etl.rclone import Rclone, StoreError, patient

#: What an object is listed with. Times would cost a request each.
LIST = {"filesOnly": True, "showHash": True, "hashTypes": ["md5"], "noModTime": True, "noMimeType": True}
#: Removals at the same time.
REMOVERS = 8


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

    def remove(self, paths: Iterable[str]) -> int:
        """Remove objects; one that isn't there is no error. Returns how many were asked for."""

        def one(path: str) -> None:
            try:
                patient(f"removing {path}", lambda: self.rclone.call("operations/deletefile", fs=self._fs, remote=path))
            except StoreError:
                return

        wanted = list(paths)
        with ThreadPoolExecutor(REMOVERS) as pool:
            list(pool.map(one, wanted))
        return len(wanted)

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
