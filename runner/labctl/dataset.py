"""The set that readers see on the server: into the cache ahead of a run, and a look at it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from labctl import lifecycle, ssh
from labctl.context import Context

#: The host's program (role rclone).
PROGRAM = "/usr/local/lib/labctl/object-view"


def prefetch(ctx: Context, watch: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Fill the server's cache with the set. Returns the last numbers: bytes, files, seconds and rates.

    `watch` gets the numbers once a second. Raises ConvergeFailed where the cache can't hold the set or a file can't be
    read; what was fetched stays.
    """
    login = ctx.login(lifecycle.existing_server(ctx))
    last: dict[str, Any] = {}
    with ctx.progress.step("prefetch") as step:
        for line in ssh.lines(login, "sudo", "-n", PROGRAM, "prefetch"):
            last = json.loads(line)
            step.tell(words(last))
            if watch is not None:
                watch(last)
        step.result(words({**last, "seconds_left": None}))
    return last


def words(numbers: dict[str, Any]) -> str:
    """How far it is, for a person."""
    left = numbers.get("seconds_left")
    return (
        f"{numbers['bytes'] / 1e6:.1f} of {numbers['bytes_total'] / 1e6:.1f} MB, "
        f"{numbers['files']} of {numbers['files_total']} files, {numbers['bytes_per_second'] / 1e6:.1f} MB/s"
        + (f", {left:.0f} s left" if left else "")
    )


@dataclass(frozen=True)
class Inspection:
    """What a set is: its own words (`manifest`, None where nobody loaded it by labctl), and what readers find.

    `folders`: {split: {class folder: (files, bytes)}}; `samples`: {class folder: [{name, type, base64}]}.
    """

    container: str
    manifest: dict[str, Any] | None
    folders: dict[str, dict[str, tuple[int, int]]]
    other_files: int
    samples: dict[str, list[dict[str, str]]]

    @property
    def classes(self) -> list[str]:
        """The class folders, in order."""
        return sorted({name for classes in self.folders.values() for name in classes})

    def title(self, folder: str) -> str:
        """A class's name by the manifest, or its folder's."""
        names = (self.manifest or {}).get("classes") or []
        number = folder.removeprefix("class_")
        known = number.isdecimal() and int(number) < len(names)
        return str(names[int(number)]) if known else folder

    def files(self, split: str, folder: str) -> tuple[int, int]:
        """(files, bytes) of a class in a split."""
        return self.folders.get(split, {}).get(folder, (0, 0))

    def total(self, split: str) -> tuple[int, int]:
        """(files, bytes) of a split."""
        found = list(self.folders.get(split, {}).values())
        return sum(files for files, _ in found), sum(size for _, size in found)

    @property
    def mismatch(self) -> str:
        """What the manifest says otherwise than the tree; empty where they agree, or there is no manifest."""
        said = (self.manifest or {}).get("counts") or {}
        for split, counts in said.items():
            for number, count in enumerate(counts):
                found = self.files(split, f"class_{number:02d}")[0]
                if found != count and (self.manifest or {}).get("layout") == "packed":
                    return f"{split}/class_{number:02d} has {found} files, the manifest says {count}"
                if found < count:
                    return f"{split}/class_{number:02d} has {found} files, the manifest says {count}"
        return ""

    def as_dict(self) -> dict[str, Any]:
        """The document of `etl inspect --json`; the images stay in the picture."""
        return {
            "container": self.container,
            "manifest": self.manifest,
            "splits": {
                split: {
                    folder: {"name": self.title(folder), "images": files, "bytes": size}
                    for folder, (files, size) in sorted(classes.items())
                }
                for split, classes in self.folders.items()
            },
            "other_files": self.other_files,
            "mismatch": self.mismatch,
        }

    def rows(self) -> list[list[str]]:
        """The table: a class a row, images (and megabytes) by split; the last row is the sum."""
        head = ["class", *(f"{split} (MB)" for split in self.folders), "all (MB)"]
        rows = [head]
        for folder in self.classes:
            cells = [self.files(split, folder) for split in self.folders]
            rows.append([f"{folder} {self.title(folder)}" if self.title(folder) != folder else folder, *_cells(cells)])
        rows.append(["all", *_cells([self.total(split) for split in self.folders])])
        return rows


def _cells(found: list[tuple[int, int]]) -> list[str]:
    total = (sum(files for files, _ in found), sum(size for _, size in found))
    return [f"{files} ({size / 1e6:.1f})" for files, size in [*found, total]]


def inspect(ctx: Context, samples: int) -> Inspection:
    """The set as readers on the server see it, with `samples` images of each class."""
    login = ctx.login(lifecycle.existing_server(ctx))
    with ctx.progress.step("read the set"):
        found = json.loads("".join(ssh.lines(login, "sudo", "-n", PROGRAM, "inspect", str(samples))))
    folders = {
        split: {folder: (int(pair[0]), int(pair[1])) for folder, pair in classes.items()}
        for split, classes in found["folders"].items()
    }
    return Inspection(found["container"], found["manifest"], folders, found["other_files"], found["samples"])
