"""Loop devices of this sandbox's volumes: those whose backing file lies in its volumes folder, and no others."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Loop:
    """A loop device and what is behind it; a path would not do, since it depends on who looks at it."""

    name: str
    device: str
    inode: int


def parse(text: str) -> list[Loop]:
    """What `losetup --json` lists, with BACK-INO and BACK-MAJ:MIN."""
    listed = json.loads(text or "{}").get("loopdevices", [])
    return [
        Loop(str(entry["name"]), str(entry["back-maj:min"]).strip(), int(entry["back-ino"]))
        for entry in listed
        if entry.get("back-ino") is not None and entry.get("back-maj:min")
    ]


def belonging_to(loops: Iterable[Loop], files: Iterable[tuple[str, int]]) -> list[Loop]:
    """Those loops whose backing file is one of `files`, each (major:minor of its filesystem, inode number)."""
    mine = set(files)
    return [loop for loop in loops if (loop.device, loop.inode) in mine]


def identities(folder: Path) -> list[tuple[str, int]]:
    """(major:minor, inode) of the files in a folder."""
    stats = [file.stat() for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
    return [(f"{os.major(s.st_dev)}:{os.minor(s.st_dev)}", s.st_ino) for s in stats]


def of_folder(folder: Path) -> list[Loop]:
    """The loop devices of the volumes in a folder."""
    done = subprocess.run(
        ["losetup", "--list", "--json", "-O", "NAME,BACK-INO,BACK-MAJ:MIN"], capture_output=True, text=True, check=True
    )
    return belonging_to(parse(done.stdout), identities(folder))


def detach_all(folder: Path, waiting: Callable[[str], None], seconds: float = 15) -> list[Loop]:
    """Detaches them; returns those that were still in use after `seconds`."""
    deadline = time.monotonic() + seconds
    while left := of_folder(folder):
        for loop in left:
            subprocess.run(["losetup", "-d", loop.name], capture_output=True, check=False)
        if not (left := of_folder(folder)) or time.monotonic() > deadline:
            return left
        waiting(f"waiting for {len(left)} loop devices to be let go")
        time.sleep(0.5)
    return []
