#!/usr/bin/env python3
"""A stand-in for the Food-11 dataset: real JPEGs in the tutorial's zip layout, and an HTTP server to load them from.

    food11.py make FILE [--images N] [--pixels P] [--seed S]     N from 33 up to 16643, the size of the real set
    food11.py serve FILE [--address A] [--port P]                prints the URL, then serves until it is stopped

As in the real Food-11.zip, the folders training, validation and evaluation hold `<class>_<number>.jpg`, with the
real set's share of each class. An image's class shows in its colours and its texture, with enough of a spread that a
simple model is better than chance and not perfect. The same arguments give the same file, byte for byte.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import io
import json
import math
import multiprocessing
import os
import random
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFilter

#: Images by class in the real set (bread, dairy product, dessert, egg, fried food, meat, noodles or pasta, rice,
#: seafood, soup, vegetable or fruit), from the description at https://mmspg.epfl.ch/food-image-datasets.
REAL_COUNTS = {
    "training": (994, 429, 1500, 986, 848, 1325, 440, 280, 855, 1500, 709),
    "validation": (362, 144, 500, 327, 326, 449, 147, 96, 347, 500, 232),
    "evaluation": (368, 148, 500, 335, 287, 432, 147, 96, 303, 500, 231),
}
TOTAL = sum(sum(counts) for counts in REAL_COUNTS.values())
CLASSES = len(REAL_COUNTS["training"])
#: Before 1980 a zip can't say; a fixed date keeps the file the same from run to run.
TIMESTAMP = (2016, 10, 15, 12, 0, 0)


def counts(images: int) -> dict[str, list[int]]:
    """How many images each class of each split gets: the real shares, at least one each, `images` in all."""
    least = CLASSES * len(REAL_COUNTS)
    if not least <= images <= TOTAL:
        raise ValueError(f"the number of images must be from {least} to {TOTAL}, not {images}")
    chosen = {split: [max(1, n * images // TOTAL) for n in real] for split, real in REAL_COUNTS.items()}
    places = sorted(((real[i], split, i) for split, real in REAL_COUNTS.items() for i in range(CLASSES)), reverse=True)
    difference = images - sum(map(sum, chosen.values()))
    step = 1 if difference > 0 else -1
    while difference:
        for real_count, split, i in places:
            if difference and 1 <= chosen[split][i] + step <= real_count:
                chosen[split][i] += step
                difference -= step
    return chosen


def picture(name: str, class_number: int, pixels: int, seed: int) -> bytes:
    """One JPEG of `pixels` by `pixels`, decided by its arguments alone."""
    dice = random.Random(f"{seed} {name} {pixels}")
    hue = (class_number / CLASSES * 256 + dice.gauss(0, 11)) % 256
    ground = (int(hue), int(dice.uniform(70, 200)), int(dice.uniform(90, 220)))
    image = Image.new("HSV", (pixels, pixels), ground)
    draw = ImageDraw.Draw(image)
    for _ in range(6 + 3 * (class_number % 4)):
        size = pixels * dice.uniform(0.05, 0.12 + 0.03 * (class_number % 5))
        x, y = dice.uniform(0, pixels), dice.uniform(0, pixels)
        tone = (int(hue + dice.gauss(30, 25)) % 256, int(dice.uniform(60, 255)), int(dice.uniform(60, 255)))
        if class_number % 3 == 0:
            draw.ellipse((x - size, y - size, x + size, y + size), fill=tone)
        elif class_number % 3 == 1:
            draw.rectangle((x - size, y - size / 3, x + size, y + size / 3), fill=tone)
        else:
            angle = dice.uniform(0, math.pi)
            end = (x + 3 * size * math.cos(angle), y + 3 * size * math.sin(angle))
            draw.line((x, y, *end), fill=tone, width=max(1, int(size / 3)))
    grain = Image.frombytes("L", (pixels, pixels), dice.randbytes(pixels * pixels)).filter(ImageFilter.GaussianBlur(1))
    mixed = Image.blend(image.convert("RGB"), Image.merge("RGB", (grain, grain, grain)), 0.15)
    out = io.BytesIO()
    mixed.save(out, "JPEG", quality=88)
    return out.getvalue()


def entries(images: int) -> Iterator[tuple[str, int]]:
    """Names in the archive and their classes, in the archive's order."""
    for split, numbers in counts(images).items():
        for class_number, count in enumerate(numbers):
            for i in range(count):
                yield f"{split}/{class_number}_{i}.jpg", class_number


def _draw(entry: tuple[str, int], pixels: int, seed: int) -> tuple[str, bytes]:
    return entry[0], picture(*entry, pixels, seed)


def make(file: Path, images: int = 1100, pixels: int = 128, seed: int = 11) -> dict[str, int]:
    """Write the archive (replaced only when complete). Returns {"images", "bytes"}."""
    partial = file.with_name(file.name + ".part")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive, multiprocessing.Pool() as pool:
        for split in REAL_COUNTS:
            archive.writestr(zipfile.ZipInfo(f"{split}/", TIMESTAMP), b"")
        draw = functools.partial(_draw, pixels=pixels, seed=seed)
        for name, content in pool.imap(draw, list(entries(images)), chunksize=16):
            archive.writestr(zipfile.ZipInfo(name, TIMESTAMP), content)
    partial.replace(file)
    return {"images": images, "bytes": file.stat().st_size}


def server(file: Path, address: str, port: int) -> http.server.ThreadingHTTPServer:
    """A server that gives out this one file and nothing else; port 0 takes a free one. Not started yet."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            return str(file) if path.partition("?")[0] == f"/{file.name}" else os.devnull + "/none"

        def send_head(self) -> Any:
            """As a web server does it: one range, if one is asked for."""
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            path = Path(self.translate_path(self.path))
            if not found or not path.is_file():
                return super().send_head()
            size = path.stat().st_size
            start, end = int(found[1]), min(int(found[2] or size - 1), size - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
            self.send_header("Content-Length", str(end - start + 1))
            self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
            self.end_headers()
            with path.open("rb") as content:
                content.seek(start)
                return io.BytesIO(content.read(end - start + 1))

        def log_message(self, format: str, *args: object) -> None:
            pass

    return http.server.ThreadingHTTPServer((address, port), Handler)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("make")
    maker.add_argument("file", type=Path)
    maker.add_argument("--images", type=int, default=1100)
    maker.add_argument("--pixels", type=int, default=128, help="width and height; the real set's are about 512")
    maker.add_argument("--seed", type=int, default=11)
    serving = commands.add_parser("serve")
    serving.add_argument("file", type=Path)
    serving.add_argument("--address", default="127.0.0.1")
    serving.add_argument("--port", type=int, default=0)
    chosen = parser.parse_args()
    if chosen.command == "make":
        try:
            print(json.dumps(make(chosen.file, chosen.images, chosen.pixels, chosen.seed)))
        except ValueError as error:
            sys.exit(f"{Path(__file__).name}: {error}")
        return
    if not chosen.file.is_file():
        sys.exit(f"{chosen.file} doesn't exist: `{Path(__file__).name} make {chosen.file}` writes it")
    with server(chosen.file, chosen.address, chosen.port) as serving_it:
        host, port = serving_it.server_address[:2]
        print(f"http://{host!s}:{port}/{chosen.file.name}", flush=True)
        serving_it.serve_forever()


if __name__ == "__main__":
    main()
