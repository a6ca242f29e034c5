"""What `object-view` reads: its state, the whole set ahead of a run, and a look at the set."""

from __future__ import annotations

import base64
import json
import os
import queue
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from __main__ import Failed, ask, in_labctl, manifest, mounts, ours, require_raw, state

#: Reads at a time. Small objects: more than training's own workers, as each waits for the store most of the time.
FILE_READERS, SHARD_READERS = 24, 8
#: Bytes that one reader takes of a shard at a time.
PIECE = 16 << 20
BLOCK = 1 << 20
#: Seconds over which status measures how fast the mount reads from the store.
MEASURE_SECONDS = 0.5
#: Bytes of sample images that `inspect` sends at most.
SAMPLE_BYTES = 6 << 20
#: How Keystone, Swift and S3 say that a credential has ended, was revoked or is wrong.
REFUSED = re.compile(
    r"application credential|\b40[13]\b|Unauthori[sz]ed|AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch",
    re.IGNORECASE,
)
IMAGES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp", ".gif": "image/gif"}


# -- status --------------------------------------------------------------------------------------------------------


def status(config: dict[str, Any]) -> dict[str, Any]:
    """What is shown, and what rclone says of its work; `transfer` is None where rclone doesn't answer."""
    place = config["places"][0]
    shown = any(at == place and ours(at, kind, source) for at, kind, source in mounts())
    found = {"mounted": shown, **{key: state().get(key, "") for key in ("layout", "version", "error")}}
    try:
        found["transfer"] = transfer(config)
    except (OSError, Failed, ValueError) as error:
        found["transfer"], found["error"] = None, found["error"] or last_words(config) or f"rclone: {error}"
    said = found["error"] or (found["transfer"] or {}).get("last_error", "")
    if REFUSED.search(said):
        found["error"] = (
            f"the store refuses this server's credential, and reads fail; `labctl up` makes another: {said}"
        )
    return found


def last_words(config: dict[str, Any]) -> str:
    """The last error in the journal of an rclone that doesn't run, such as the store's refusal of its credential."""
    command = ["journalctl", "--unit", config["unit"], "--lines", "40", "--no-pager", "--output", "cat"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return next((line for line in reversed(said.splitlines()) if "CRITICAL" in line or "ERROR" in line), "")


def transfer(config: dict[str, Any]) -> dict[str, Any]:
    """How fast, how much, how much of it is in the cache, and what went wrong since rclone started."""
    first, began = ask(config, "core/stats", timeout=5), time.monotonic()
    time.sleep(MEASURE_SECONDS)
    last, seconds = ask(config, "core/stats", timeout=5), time.monotonic() - began
    tree = ask(config, "vfs/stats", timeout=5)
    cache = tree.get("diskCache", {})
    return {
        "bytes_per_second": round((last["bytes"] - first["bytes"]) / seconds),
        "fetched_bytes": last["bytes"],
        "fetched_files": last["transfers"],
        "errors": last["errors"],
        "last_error": last.get("lastError", ""),
        "cached_bytes": cache.get("bytesUsed", 0),
        "cached_files": cache.get("files", 0),
        "cache_full": cache.get("outOfSpace", False),
        "known_files": tree.get("metadataCache", {}).get("files", 0),
    }


# -- prefetch ------------------------------------------------------------------------------------------------------


class Work:
    """What is to be read: (path, offset, bytes) pieces; how far it is; what went wrong first."""

    def __init__(self, pieces: list[tuple[Path, int, int]], files: int) -> None:
        self.pieces: queue.SimpleQueue[tuple[Path, int, int]] = queue.SimpleQueue()
        for piece in pieces:
            self.pieces.put(piece)
        self.bytes_total, self.files_total = sum(piece[2] for piece in pieces), files
        self.left = dict.fromkeys((str(path) for path, _, _ in pieces), 0)
        for path, _, _ in pieces:
            self.left[str(path)] += 1
        self.bytes = self.files = 0
        self.error: OSError | None = None
        self.lock = threading.Lock()

    def run(self) -> None:
        """Read piece after piece until there are none, or one can't be read."""
        while self.error is None:
            try:
                path, offset, length = self.pieces.get_nowait()
            except queue.Empty:
                return
            try:
                self._read(path, offset, length)
            except OSError as error:
                self.error = error

    def _read(self, path: Path, offset: int, length: int) -> None:
        with path.open("rb", buffering=0) as file:
            while length > 0:
                got = len(os.pread(file.fileno(), min(BLOCK, length), offset))
                if got == 0:
                    raise OSError(f"{path} ended {length} bytes early")
                offset, length = offset + got, length - got
                with self.lock:
                    self.bytes += got
        with self.lock:
            self.left[str(path)] -= 1
            self.files += self.left[str(path)] == 0

    def progress(self, began: float, event: str) -> dict[str, Any]:
        """A line of progress. Bytes, files; bytes and files a second since the beginning; seconds left."""
        seconds = max(time.monotonic() - began, 1e-3)
        rate = self.bytes / seconds
        return {
            "event": event,
            "stage": "prefetch",
            "bytes": self.bytes,
            "bytes_total": self.bytes_total,
            "files": self.files,
            "files_total": self.files_total,
            "bytes_per_second": round(rate),
            "files_per_second": round(self.files / seconds, 1),
            "seconds_left": round((self.bytes_total - self.bytes) / rate, 1) if rate else None,
            "seconds": round(seconds, 2),
        }


def walk(place: Path) -> Iterator[tuple[Path, int]]:
    """Every file below place with its size."""
    for folder, _, names in os.walk(place, onerror=raise_it):
        for name in sorted(names):
            path = Path(folder, name)
            yield path, path.stat().st_size


def raise_it(error: OSError) -> None:
    """What can't be listed isn't left out silently."""
    raise error


def planned(config: dict[str, Any]) -> tuple[Work, int]:
    """What there is to read of the set that is shown, and how many readers are good for it."""
    found = manifest()
    if found and found["layout"] == "packed":
        shards = [(in_labctl(shard["object"]), int(shard["bytes"])) for shard in found["shards"]]
        pieces = [(path, at, min(PIECE, size - at)) for path, size in shards for at in range(0, size, PIECE)]
        return Work(pieces, len(shards)), SHARD_READERS
    files = list(walk(Path(config["places"][0])))
    return Work([(path, 0, size) for path, size in files], len(files)), FILE_READERS


def refuse_if_too_large(config: dict[str, Any], work: Work) -> None:
    """Raises Failed for a set that the cache can't hold: half of it would only push out the other half."""
    answer = ask(config, "vfs/stats")
    used = answer["diskCache"]["bytesUsed"]
    limit, spare = answer["opt"]["CacheMaxSize"], max(answer["opt"]["CacheMinFreeSpace"], 0)
    room = shutil.disk_usage(config["cache"]).free - spare + used
    room = min(room, limit) if limit >= 0 else room
    if work.bytes_total > room:
        raise Failed(
            f"the set has {work.bytes_total / 1e9:.2f} GB and the cache room for {max(room, 0) / 1e9:.2f} GB "
            f"({spare / 1e9:.2f} GB of the disk stay free). Nothing was fetched; free disk, or read without a prefetch"
        )


def prefetch(config: dict[str, Any]) -> int:
    """Read the whole set once, which leaves it in rclone's cache. A line of progress a second; the last is `done`."""
    require_raw(config)
    work, readers = planned(config)
    refuse_if_too_large(config, work)
    began = time.monotonic()
    threads = [threading.Thread(target=work.run, daemon=True) for _ in range(readers)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        threads[0].join(1.0) if threads[0].is_alive() else time.sleep(0.1)
        print(json.dumps(work.progress(began, "progress")), flush=True)
    if work.error is not None:
        raise Failed(f"{work.error}; what was fetched stays in the cache, and the same command goes on from there")
    print(json.dumps(work.progress(began, "done")), flush=True)
    return 0


# -- inspect -------------------------------------------------------------------------------------------------------


def inspect(config: dict[str, Any], samples: int) -> dict[str, Any]:
    """The set: name, layout, classes, images and bytes by split and class, and `samples` images of each class.

    Counted in the tree that readers see; compared with the manifest where there is one.
    """
    require_raw(config)
    place, found = Path(config["places"][0]), manifest() or {}
    counted: dict[str, dict[str, list[int]]] = {}
    pictures: dict[str, list[Path]] = {}
    other = 0
    for path, size in walk(place):
        parts = path.relative_to(place).parts
        if len(parts) != 3:
            other += 1
            continue
        numbers = counted.setdefault(parts[0], {}).setdefault(parts[1], [0, 0])
        numbers[0] += 1
        numbers[1] += size
        if path.suffix.lower() in IMAGES:
            pictures.setdefault(parts[1], []).append(path)
    keys = ("dataset", "layout", "version", "classes", "splits", "counts", "images", "bytes", "source")
    return {
        "container": config["container"],
        "manifest": {key: found.get(key) for key in keys} if found else None,
        "folders": counted,
        "other_files": other,
        "samples": {name: chosen(paths, samples, len(pictures)) for name, paths in sorted(pictures.items())},
    }


def chosen(paths: list[Path], samples: int, classes: int) -> list[dict[str, str]]:
    """Images from all over a class, none so large that the page becomes heavy."""
    share = SAMPLE_BYTES // max(1, classes * samples)
    fitting = [path for path in paths if path.stat().st_size <= share]
    step = max(1, len(fitting) // max(1, samples))
    return [
        {
            "name": path.name,
            "type": IMAGES[path.suffix.lower()],
            "base64": base64.b64encode(path.read_bytes()).decode(),
        }
        for path in fitting[::step][:samples]
    ]


def main(command: str, options: Sequence[str], config: dict[str, Any]) -> int:
    """The commands that only read."""
    if command == "prefetch":
        return prefetch(config)
    if command == "status":
        print(json.dumps(status(config)))
        return 0
    if command == "inspect":
        print(json.dumps(inspect(config, int(options[0]) if options else 5)))
        return 0
    raise Failed("one of refresh, clear, status, prefetch, inspect")
