"""The containers of the object store: `labctl bucket …`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from labctl.cli.core import confirm_by_name, context, emit, options, whose

app = typer.Typer(no_args_is_help=True, help="Containers of the project's object store, the lab's own among them.")
Name = Annotated[str, typer.Argument(metavar="NAME")]


@app.command("list")
def bucket_list() -> None:
    """List the project's containers, the lab's first. Changes nothing."""
    from labctl import buckets

    rows = [asdict(row) for row in buckets.overview(context())]
    lines = [
        f"{'*' if row['lab'] else ' '} {row['name']}  {row['objects']} objects  {row['bytes'] / 1e6:.1f} MB"
        for row in rows
    ]
    emit(rows, "\n".join(lines) or "The project has no containers.")


@app.command("create")
def bucket_create(name: Name) -> None:
    """Make an empty container for the lab. Safe to run again."""
    from labctl import buckets

    made = buckets.create(context(), name)
    emit(asdict(made), f"Container {made.name} has {made.objects} objects.")


@app.command("delete")
def bucket_delete(
    name: Name,
    confirmed: Annotated[str, typer.Option("--confirm", metavar="NAME", help="the name once more, for scripts")] = "",
) -> None:
    """Delete a container WITH ALL ITS OBJECTS, after asking for its name; --yes is enough for one made for this lab."""
    from labctl import buckets
    from labctl.cloud import META_LAB

    ctx = context()
    doomed = buckets.doomed(ctx, name)
    owner = doomed[0].metadata.get(META_LAB, "")
    sizes = "; ".join(f"{one.name}: {one.objects} objects, {one.bytes / 1e6:.1f} MB" for one in doomed)
    if not (options.yes and owner == ctx.lab.lab):
        confirm_by_name("bucket", name, f"container {sizes}, {whose(owner)}", confirmed)
    deleted = buckets.delete(ctx, name)
    emit({"deleted": name, "objects": deleted}, f"Container {name} is gone, with {deleted} objects.")
