"""What `make bench-data` runs on the node itself: an epoch, a look at peaks, and a delay on the way to the store.

on_node.py epoch PLACE SEED READERS     JSON: seconds, files, digest of all contents
on_node.py watch [FOLDER…]              until stdin ends; then JSON: peak disk and memory in bytes
on_node.py relay PORT MILLISECONDS      passes on what is redirected to PORT, late by so much in each direction
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import select
import socket
import struct
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

#: Whose memory counts: both sides' programs, in containers too.
PROGRAMS = ("rclone", "labctl_etl", "mksquashfs", "tar2sqfs", "sqfstar", "Food-11")
SPLITS = ("training", "validation", "evaluation")
#: Looking takes time from what is looked at: at most this share of it.
SHARE, LEAST_SECONDS = 0.05, 0.25
SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h
PIECE = 256 << 10


def read(root: Path, path: Path) -> tuple[str, str]:
    """A file's path and SHA-256."""
    return str(path.relative_to(root)), hashlib.sha256(path.read_bytes()).hexdigest()


def epoch(root: Path, seed: int, readers: int) -> dict[str, object]:
    """Every file once, in random order, by so many processes as a DataLoader has workers. Listing is part of it."""
    began = time.monotonic()
    paths = sorted(Path(at, name) for split in SPLITS for at, _, names in os.walk(root / split) for name in names)
    random.Random(seed).shuffle(paths)
    with ProcessPoolExecutor(readers) as pool:
        found = sorted(pool.map(partial(read, root), paths, chunksize=8))
    seconds = time.monotonic() - began
    return {"seconds": seconds, "files": len(found), "digest": hashlib.sha256(json.dumps(found).encode()).hexdigest()}


def disk(folders: list[str]) -> int:
    """Bytes of all files below the folders."""
    total = 0
    for folder in folders:
        for at, _, names in os.walk(folder):
            for name in names:
                try:
                    total += Path(at, name).lstat().st_size
                except OSError:
                    continue  # gone meanwhile
    return total


def memory() -> int:
    """Bytes of memory that the programs have between them."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace")
            if any(program in words for program in PROGRAMS) and str(os.getpid()) != process.name:
                total += int((process / "statm").read_text().split()[1])
        except OSError:
            continue
    return total * os.sysconf("SC_PAGE_SIZE")


def watch(folders: list[str]) -> dict[str, int]:
    """The highest disk (over that at the start) and memory until stdin ends."""
    os.nice(10)
    start = disk(folders)
    peak = {"disk": 0, "memory": 0}
    pause = LEAST_SECONDS
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], pause)[0]:
        began = time.monotonic()
        peak = {"disk": max(peak["disk"], disk(folders) - start), "memory": max(peak["memory"], memory())}
        pause = max(LEAST_SECONDS, (time.monotonic() - began) / SHARE)
    return peak


async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
    """Pass on everything, each piece `delay` seconds after it came."""
    pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)
    clock = asyncio.get_running_loop().time

    async def take() -> None:
        while piece := await reader.read(PIECE):
            await pieces.put((clock() + delay, piece))
        await pieces.put((clock() + delay, b""))

    taking = asyncio.create_task(take())
    try:
        while True:
            due, piece = await pieces.get()
            await asyncio.sleep(max(0.0, due - clock()))
            if not piece:
                if writer.can_write_eof():
                    writer.write_eof()
                return
            writer.write(piece)
            await writer.drain()
    except OSError:
        return
    finally:
        taking.cancel()


async def relay(port: int, delay: float) -> None:
    """A TCP relay that adds `delay` seconds in each direction, and a round trip to each new connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        packed = writer.get_extra_info("socket").getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
        target, address = struct.unpack("!2xH4s8x", packed)
        await asyncio.sleep(2 * delay)
        try:
            there, back = await asyncio.open_connection(socket.inet_ntoa(address), target)
        except OSError:
            writer.transport.abort()
            return
        for stream in (writer, back):
            stream.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.gather(late(reader, back, delay), late(there, writer, delay), return_exceptions=True)
        for stream in (writer, back):
            stream.close()

    server = await asyncio.start_server(serve, "0.0.0.0", port, backlog=512)
    print(os.getpid(), flush=True)
    async with server:
        await server.serve_forever()


def main() -> None:
    """The command line."""
    what, *words = sys.argv[1:]
    if what == "epoch":
        print(json.dumps(epoch(Path(words[0]), int(words[1]), int(words[2]))))
    elif what == "watch":
        print(json.dumps(watch(words)))
    else:
        asyncio.run(relay(int(words[0]), float(words[1]) / 1000))


if __name__ == "__main__":
    main()
