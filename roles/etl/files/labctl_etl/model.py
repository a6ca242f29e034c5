"""What is told about a dataset: its description, its files, the manifest and the table that lie in the container."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from labctl_job.errors import Failure

CONTROL = ".labctl"
MANIFEST, PENDING = f"{CONTROL}/manifest.json", f"{CONTROL}/pending.json"
TABLES, PACKED, INCOMING = f"{CONTROL}/tables", f"{CONTROL}/packed", f"{CONTROL}/incoming"
#: What was loaded of a list of archives, until all of it is.
PARTS = f"{CONTROL}/parts"
FORMAT = 1
LAYOUTS = ("files", "packed")


class Refused(Failure):
    """The source isn't what was described, or leads elsewhere: a corrupt or hostile archive."""

    def __init__(self, source: str, why: str, expected: str = "") -> None:
        super().__init__(
            f"{source} is refused: {why}. Nothing was loaded.",
            expected=expected,
            found=why,
            next_step="mend the source or its description under `dataset` in lab.yaml",
        )


@dataclass(frozen=True)
class Dataset:
    """The description. One of `url`, `urls` (a list), `folder` (on this host) and `prefix` (CONTAINER/PATH of the same
    store) is set.

    `rule` says where a file's class is told: `prefix` (<number>_ before its name), `folder` (the one below the
    split's), or `csv` (`labels`: the text of lines `path,class`, or `labels_entry`: the name of the archive's own).
    `classes`: their names in the order of their numbers; empty where the folders' names are to be taken.
    """

    name: str
    url: str = ""
    urls: tuple[str, ...] = ()
    folder: str = ""
    prefix: str = ""
    sha256: str = ""
    sha256s: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    rule: str = "prefix"
    labels: str = ""
    labels_entry: str = ""

    @property
    def where(self) -> str:
        """The source, for a person."""
        many = f"{len(self.urls)} archives, {self.urls[0]} for one" if self.urls else ""
        return self.url or many or self.folder or f"container {self.prefix}"

    @property
    def parts(self) -> list[Dataset]:
        """A description for each archive of the list."""
        known = self.sha256s or ("",) * len(self.urls)
        return [
            replace(self, url=url, urls=(), sha256=sha256, sha256s=())
            for url, sha256 in zip(self.urls, known, strict=True)
        ]

    def recipe(self, layout: str) -> str:
        """A hash of all that decides what a source becomes. The same recipe and source make the same load."""
        parts = [self.name, self.splits, self.classes, self.rule, self.labels, self.labels_entry, layout]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def dataset(document: dict[str, Any]) -> Dataset:
    """A description as the role writes it; its `url` (and `sha256`) may be a list."""
    lists_of = {name: document[name] for name in ("url", "sha256") if isinstance(document.get(name), list)}
    document = {
        **document,
        **{name: "" for name in lists_of},
        **{f"{name}s": found for name, found in lists_of.items()},
    }
    known: dict[str, Any] = {key: value for key, value in document.items() if key in Dataset.__dataclass_fields__}
    lists: dict[str, Any] = {key: tuple(value) for key, value in known.items() if isinstance(value, list)}
    return Dataset(**{**known, **lists})


@dataclass(frozen=True)
class Row:
    """A file of the set: its path in the container, bytes and hashes. `kept`: it was there before, and isn't ours."""

    path: str
    size: int
    sha256: str
    md5: str
    kept: bool = False

    def line(self) -> str:
        """Its line of the table."""
        found: dict[str, Any] = {"path": self.path, "size": self.size, "sha256": self.sha256, "md5": self.md5}
        return json.dumps({**found, **({"kept": True} if self.kept else {})}, ensure_ascii=False)


def pack_table(rows: Iterable[Row]) -> bytes:
    """The table's bytes, the same for the same rows."""
    text = "".join(row.line() + "\n" for row in sorted(rows, key=lambda row: row.path))
    return gzip.compress(text.encode(), mtime=0)


def read_table(data: bytes) -> list[Row]:
    """The rows of a table. ValueError if it isn't one."""
    try:
        text = gzip.decompress(data).decode()
    except (OSError, EOFError) as error:
        raise ValueError(f"not a table: {error}") from None
    return [Row(**json.loads(line)) for line in text.splitlines()]


def version_of(rows: Iterable[Row]) -> str:
    """The version of a set: 16 hex digits that say what its files are."""
    digest = hashlib.sha256()
    for row in sorted(rows, key=lambda row: row.path):
        digest.update(f"{row.path}\0{row.size}\0{row.sha256}\n".encode())
    return digest.hexdigest()[:16]


@dataclass
class Shard:
    """A filesystem image that holds a part of the set. `content`: the version of its own rows."""

    object: str
    bytes: int
    sha256: str
    md5: str
    files: int
    content: str


@dataclass
class Counts:
    """Images by split and class, as they come."""

    classes: int
    images: int = 0
    bytes: int = 0
    left_out: int = 0
    by_split: dict[str, list[int]] = field(default_factory=dict)

    def add(self, split: str, number: int, size: int) -> None:
        """One more image."""
        self.by_split.setdefault(split, [0] * self.classes)[number] += 1
        self.images += 1
        self.bytes += size

    def merge(self, classes: int, by_split: dict[str, list[int]], left_out: int) -> None:
        """Those of a part."""
        self.classes = classes
        self.left_out += left_out
        for split, numbers in by_split.items():
            mine = self.by_split.setdefault(split, [0] * classes)
            self.by_split[split] = [one + other for one, other in zip(mine, numbers, strict=True)]
            self.images += sum(numbers)
