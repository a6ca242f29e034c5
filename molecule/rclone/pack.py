#!/usr/bin/env python3
"""Runs on the node: commits a made-up dataset to the container, in the form that roles/etl/README.md describes.

    pack.py CONTAINER files|packed|half SEED [SHARDS] [IMAGES]

Written by hand, not by the role etl, so that the reading side is tested by itself. Prints {path: SHA-256} as JSON.
`half` is a load of files that was cut off in the middle: announced as a whole, sent by half, not committed.
"""

import gzip
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

RCLONE = ["rclone", "--config", "/etc/rclone/rclone.conf"]


def content(seed: str, images: int) -> dict[str, bytes]:
    """The set's files by path."""
    dice = random.Random(seed)
    files = {}
    for number in range(images):
        split, kind = ("training", "evaluation")[number % 2], number % 3
        files[f"{split}/class_{kind:02d}/{kind}_{seed}-{number}.jpg"] = dice.randbytes(dice.randrange(2_000, 40_000))
    return files


def send(source: Path, target: str) -> None:
    """Copy a folder's files below a prefix of the container."""
    subprocess.run([*RCLONE, "copy", str(source), f"chi_tacc:{target}", "--transfers=8"], check=True)


def put(home: Path, target: str, files: dict[str, bytes]) -> None:
    """Write some objects below a prefix of the container."""
    folder = Path(tempfile.mkdtemp(dir=home))
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    send(folder, target)


def half(home: Path, container: str, files: dict[str, bytes], lines: str) -> None:
    """What a load that is cut off leaves behind."""
    put(home, f"{container}/.labctl", {"pending.json": b'{"format": 1, "layout": "files"}'})
    announced = {"pending-cutoff-00000.jsonl.gz": gzip.compress(lines.encode(), mtime=0)}
    put(home, f"{container}/.labctl/tables", announced)
    put(home, container, dict(list(files.items())[: len(files) // 2]))


def main() -> None:
    """Commit one set, the manifest last."""
    container, layout, seed = sys.argv[1:4]
    shards = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    files = content(seed, int(sys.argv[5]) if len(sys.argv) > 5 else 60)
    rows = [
        {
            "path": path,
            "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "md5": hashlib.md5(data).hexdigest(),
        }
        for path, data in sorted(files.items())
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    version = hashlib.sha256(lines.encode()).hexdigest()[:16]
    home = Path(tempfile.mkdtemp())
    if layout == "half":
        half(home, container, files, lines)
        shutil.rmtree(home)
        print(json.dumps({row["path"]: row["sha256"] for row in rows}))
        return
    listed = []
    for number in range(shards if layout == "packed" else 1):
        tree = home / f"{number:03}"
        for row in rows[number :: shards if layout == "packed" else 1]:
            path = tree / row["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[row["path"]])
        if layout == "files":
            send(tree, container)
            continue
        image = home / "images" / f"{number:03}.squashfs"
        image.parent.mkdir(exist_ok=True)
        subprocess.run(["mksquashfs", tree, image, "-quiet", "-no-progress", "-all-root"], check=True, stdout=2)
        data = image.read_bytes()
        name = f".labctl/packed/{version}/{image.name}"
        listed.append({"object": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "files": 0})
    if layout == "packed":
        send(home / "images", f"{container}/.labctl/packed/{version}")
    listing = subprocess.run(
        [*RCLONE, "lsf", f"chi_tacc:{container}/.labctl/tables"], capture_output=True, text=True, check=False
    ).stdout.splitlines()
    replaced = [f".labctl/tables/{name}" for name in listing if not name.startswith((version, "pending-"))]
    meta = home / "meta"
    (meta / "tables").mkdir(parents=True)
    (meta / "tables" / f"{version}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    send(meta, f"{container}/.labctl")
    counts = {
        split: [sum(1 for path in files if path.startswith(f"{split}/class_{kind:02d}/")) for kind in range(3)]
        for split in ("training", "evaluation")
    }
    manifest = {
        "format": 1, "dataset": "made-up", "layout": layout, "version": version, "classes": ["a", "b", "c"],
        "splits": ["training", "evaluation"], "counts": counts, "images": len(files),
        "bytes": sum(map(len, files.values())), "source": {"url": "", "sha256": "", "bytes": 0},
        "table": f".labctl/tables/{version}.jsonl.gz", "shards": listed, "replaced": replaced,
    }  # fmt: skip
    (home / "last").mkdir()
    (home / "last" / "manifest.json").write_text(json.dumps(manifest))
    send(home / "last", f"{container}/.labctl")
    shutil.rmtree(home)
    print(json.dumps({row["path"]: row["sha256"] for row in rows}))


if __name__ == "__main__":
    main()
