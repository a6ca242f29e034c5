"""The commands that look and prove; they change nothing that a user made."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from labctl.cli.core import context, emit, options, table, verified

app = typer.Typer()


@app.command()
def status() -> None:
    """Show server, volume, object store and services. Changes nothing."""
    from labctl import observe

    found = observe.status(context())
    emit(found.as_dict(), table(found.rows()))


@app.command()
def verify(
    read_only: Annotated[
        bool, typer.Option("--read-only", help="log no new run, only read back the earlier ones")
    ] = False,
) -> None:
    """Prove persistence: read back every probe run logged so far (by hash), and log another. Safe to run again."""
    from labctl import lifecycle

    verified(lifecycle.verify(context(), write=not read_only))


@app.command()
def inventory(
    everything: Annotated[bool, typer.Option("--list", help="the whole inventory (default)")] = False,
    host: Annotated[str, typer.Option("--host", metavar="NAME", help="one host's variables")] = "",
) -> None:
    """Print the dynamic inventory as JSON, as Ansible asks for it. Changes nothing."""
    from labctl import lifecycle

    document = lifecycle.inventory_document(options.lab_file)
    shown = document["_meta"]["hostvars"].get(host, {}) if host and not everything else document
    typer.echo(json.dumps(shown, indent=2))
