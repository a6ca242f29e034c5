"""The commands that bring a dataset in: `labctl etl …`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from labctl.cli import dataset
from labctl.cli.core import context, emit, err, one_of, options

app = typer.Typer()
loads = typer.Typer(
    invoke_without_command=True,
    help="Load the dataset into the object store. Safe to run again: sends only what is missing, or nothing.",
)
app.add_typer(loads, name="etl")

#: Standard error, a JSON document a line.
_JSON_EVENT = {"markup": False, "highlight": False, "soft_wrap": True}

loads.command("inspect")(dataset.inspect)


@loads.callback()
def etl(
    command: typer.Context,
    layout: Annotated[
        str, typer.Option("--layout", metavar="LAYOUT", help="files (an object an image) or packed (filesystem images)")
    ] = "",
    restart: Annotated[bool, typer.Option("--restart", help="forget what a run that was cut off has sent")] = False,
) -> None:
    """Load the dataset into the object store. Safe to run again: sends only what is missing, or nothing."""
    if command.invoked_subcommand:
        return
    from labctl import etl as loading

    if layout:
        one_of(("files", "packed"), layout, "--layout")
    found = loading.load(context(), layout=layout, restart=restart, watch=_event if options.as_json else None)
    emit(found, _told(found))


def _event(document: dict[str, Any]) -> None:
    """One line of progress, for a program: on stderr, so that stdout holds the result alone."""
    err.print(json.dumps(document), **_JSON_EVENT)  # type: ignore[arg-type]


def _told(found: dict[str, Any]) -> str:
    what = f"{found['dataset']}: {found['images']} images, {found['bytes'] / 1e6:,.1f} MB, as {found['layout']}"
    if not found["changed"]:
        return f"{what}; the container has it, nothing was sent."
    return f"{what}; sent {found['sent']} objects, {found['sent_bytes'] / 1e6:,.1f} MB (version {found['version']})."
