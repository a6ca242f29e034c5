"""The dataset into the object store: a program on the lab's server (role `etl`) does it, as a unit of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from labctl import jobs, lifecycle
from labctl.context import Context
from labctl.errors import ConvergeFailed

#: Where the role puts the program.
PROGRAM = "/usr/local/lib/labctl/labctl_etl"
#: What a load is at, by stage: for a program that reads it.
Watcher = Callable[[dict[str, Any]], None]


def load(ctx: Context, *, layout: str = "", restart: bool = False, watch: Watcher | None = None) -> dict[str, Any]:
    """Load the lab's dataset unless the container has it. `layout`: files or packed instead of lab.yaml's.

    `restart`: forget what a run that was cut off has sent. `watch` gets each stage's numbers, about twice a second.
    """
    server = lifecycle.existing_server(ctx)
    arguments = ["load", *(["--layout", layout] if layout else []), *(["--restart"] if restart else [])]
    variables = {"etl_job": arguments, "etl_job_wait": False}
    started = lifecycle.play(ctx, server, "etl.yml", variables).data.get("etl_job", {})
    if started.get("running") and started.get("arguments") != arguments:
        raise ConvergeFailed(
            f"The server is busy with: {' '.join(started.get('arguments') or ['another load'])}.",
            next_step="wait for it, then run the command again",
        )
    with ctx.progress.step(f"load the dataset into {ctx.lab.container_name}") as step:

        def tell(found: dict[str, Any]) -> None:
            step.tell(words(found))
            if watch is not None:
                watch({"event": "progress", "step": found.get("step", ""), "stages": found.get("stages", {})})

        ended = jobs.follow(ctx, server, PROGRAM, str(started["job"]), tell)
    for note in ended.get("notes", []):
        ctx.progress.note(note)
    return dict(ended["result"])


def words(found: Mapping[str, Any]) -> str:
    """Where each stage is, for a person."""
    stages = found.get("stages") or {}
    parts = [
        _stage(name, stages[name]) for name in ("extract", "transform", "load") if stages.get(name, {}).get("bytes")
    ]
    step = str(found.get("step", ""))
    return "; ".join(parts) if parts and step.startswith("extract") else step


def _stage(name: str, stage: Mapping[str, Any]) -> str:
    images = f"{stage['images']}" + (f" of {stage['total_images']}" if stage["total_images"] >= 0 else "")
    size = f"{stage['bytes'] / 1e6:.1f}" + (
        f" of {stage['total_bytes'] / 1e6:.1f}" if stage["total_bytes"] >= 0 else ""
    )
    left = f", {stage['left']:.0f} s left" if stage["left"] else ""
    return f"{name} {images} images, {size} MB, {stage['bytes_per_second'] / 1e6:.1f} MB/s{left}"
