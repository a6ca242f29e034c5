"""The command line: words, options, exit codes. What a command does is decided in `lifecycle` and its neighbours.

A module here holds the commands of one kind; each imports what it runs when it runs, so that `labctl --help` is quick.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from labctl import __version__
from labctl.cli import backup, bucket, dataset, etl, lease, life, look, sandbox, use, volume
from labctl.cli.core import guarded, options

app = typer.Typer(
    name="labctl",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Disposable compute and durable data for a machine-learning lab on Chameleon. Every command can be run again.",
)
for part in (life, look, use, etl, dataset, backup):
    app.add_typer(part.app)
app.add_typer(volume.app, name="volume")
app.add_typer(bucket.app, name="bucket")
app.add_typer(lease.app, name="lease")
app.add_typer(sandbox.app, name="sandbox")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _global(
    lab: Annotated[
        Path | None, typer.Option("--lab", metavar="FILE", help="lab.yaml; else ./lab.yaml, then $LABCTL_LAB")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the result as JSON on stdout, all else on stderr")] = False,
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="say more; twice: Ansible's details")] = 0,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="answer yes to every question")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="print the version", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    del version  # its callback has answered
    options.lab_file, options.as_json, options.verbosity, options.yes = lab, as_json, verbose, yes


def main() -> None:
    """Entry point of the console script."""
    sys.exit(guarded(lambda: app(standalone_mode=False)))
