"""Where an entry of a source goes, and what is refused: pure functions over names, sizes and kinds."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable

from labctl_etl.model import Dataset, Refused
from labctl_job.errors import Failure

IMAGE = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?)$", re.IGNORECASE)
PREFIXED = re.compile(r"^(\d+)_")
NUMBERED = re.compile(r"^(?:class_)?(\d+)$")
#: Unpacked, nothing that is an image is this many times as large as packed; BOMB_BYTES are allowed in any case.
BOMB_RATIO, BOMB_BYTES = 100, 256 << 20
#: What an object's name may have, in bytes of UTF-8 (Swift and S3).
NAME_BYTES = 1024


def bad_name(name: str) -> str:
    """Why an entry of that name is refused, or ""."""
    if name.startswith(("/", "\\")) or name[1:2] == ":" or "\\" in name or "\0" in name:
        return f"the entry {name!r} has an absolute or foreign name"
    if any(part in ("", ".", "..") for part in name.rstrip("/").split("/")):
        return f"the entry {name!r} leads out of the archive's own folder"
    if any(ord(char) < 32 or ord(char) == 127 or 0xD800 <= ord(char) < 0xE000 for char in name):
        return f"the entry {name!r} has a control character, or one that isn't Unicode, in its name"
    if len(name.encode()) > NAME_BYTES:
        return f"the entry {name[:60]!r}… has a name of more than {NAME_BYTES} bytes"
    return ""


def is_bomb(packed: int, unpacked: int) -> bool:
    """Whether so many bytes out of so few can't be a set of images."""
    return unpacked > max(BOMB_BYTES, packed * BOMB_RATIO)


class Sorter:
    """Gives each entry its place `(split, class, path)` in the container. Raises Refused; every path is given once."""

    def __init__(self, described: Dataset, names: Iterable[str] | None = None) -> None:
        self._set, self._seen = described, set[str]()
        self._labels = read_labels(described.labels) if described.labels else {}
        self.classes = described.classes
        if not self.classes and described.rule == "folder":
            self.classes = self._folders(names)
        if not self.classes and self._labels:
            self.classes = tuple(sorted(set(self._labels.values())))
        if not self.classes:
            raise Failure("The dataset has no classes.", kind="usage", next_step="dataset: {classes: […]} in lab.yaml")
        self._numbers = {name: number for number, name in enumerate(self.classes)}

    def labels(self, text: str) -> None:
        """The archive's own list of labels, once it was read."""
        self._labels = read_labels(text)

    @property
    def needs_labels(self) -> bool:
        """Whether the labels are still missing."""
        return self._set.rule == "csv" and not self._labels

    def place(self, name: str) -> tuple[str, int, str] | None:
        """Where an entry goes; None for what is no image of the set. Refused for a class that there isn't."""
        split, below = self._split(name)
        file = below[-1] if below else ""
        if not IMAGE.search(file):
            return None
        number = self._number(name, below)
        if number is None:
            return None
        if not 0 <= number < len(self.classes):
            raise self._refused(
                f"{name}: class {number} of a set of {len(self.classes)} (0 to {len(self.classes) - 1})"
            )
        path = f"{split}/class_{number:02d}/{file}"
        if path in self._seen:
            raise self._refused(f"the file {path} is there twice (again as {name})")
        self._seen.add(path)
        return split, number, path

    def _split(self, name: str) -> tuple[str, list[str]]:
        """The split and what is below it: the split's folder is the archive's own, or in its only one."""
        parts = name.split("/")
        if not self._set.splits:
            return "all", parts
        for depth in (0, 1):
            if len(parts) > depth + 1 and parts[depth] in self._set.splits:
                return parts[depth], parts[depth + 1 :]
        return "", []

    def _number(self, name: str, below: list[str]) -> int | None:
        if self._set.rule == "prefix":
            match = PREFIXED.match(below[-1]) if len(below) == 1 else None
            return int(match[1]) if match else None
        if self._set.rule == "csv":
            label = self._labels.get(name, self._labels.get("/".join(below), self._labels.get(below[-1])))
            return None if label is None else self._named(label, name)
        if len(below) < 2:
            return None
        return self._named(below[0], name)

    def _named(self, label: str, name: str) -> int:
        if label in self._numbers:
            return self._numbers[label]
        if match := NUMBERED.match(label):
            return int(match[1])
        raise self._refused(f"{name}: {label!r} is no class of the set ({', '.join(self.classes)[:200]})")

    def _folders(self, names: Iterable[str] | None) -> tuple[str, ...]:
        """The classes as the folders are called, where the names are known before the first file is read."""
        if names is None:
            raise Failure(
                "A tar doesn't say which folders it has before all of it was read.",
                kind="usage",
                expected="the classes in the order of their numbers",
                next_step="dataset: {classes: [a, b, …]} in lab.yaml",
            )
        found = {below[0] for _, below in map(self._split, names) if len(below) > 1 and IMAGE.search(below[-1])}
        if not found:
            raise self._refused("it has no folder with images below any of its splits")
        return tuple(sorted(found))

    def _refused(self, why: str) -> Refused:
        return Refused(self._set.where, why)


def read_labels(text: str) -> dict[str, str]:
    """{path: class} of a CSV with two columns; a first line `path,class` (or the like) is a heading."""
    rows = [row for row in csv.reader(io.StringIO(text)) if row]
    if any(len(row) < 2 for row in rows) or not rows:
        raise Failure(
            "The labels aren't lines of a path and a class.", kind="usage", found=str(rows[:1])[:200],
            next_step="mend the file that dataset.labels names",
        )  # fmt: skip
    if not IMAGE.search(rows[0][0]):
        rows = rows[1:]
    return {row[0].strip(): row[1].strip() for row in rows}
