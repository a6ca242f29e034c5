"""The commands that look and prove; they change nothing that a user made."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from labctl.cli.core import context, emit, err, one_of, options, table, verified

app = typer.Typer()


@app.command()
def status() -> None:
    """Show server, volume, object store and services. Changes nothing."""
    from labctl import observe

    found = observe.status(context())
    emit(found.as_dict(), table(found.rows()))


@app.command()
def doctor() -> None:
    """Check tools, lab.yaml, key, logins, quota, image, server; say what to mend. Changes nothing, makes nothing."""
    from labctl import doctor as doctors

    marks = {doctors.OK: "✓", doctors.WARNING: "!", doctors.FAILED: "✗"}
    findings = []
    for one in doctors.examine(context):
        findings.append(one)
        err.print(f"{marks[one.state]} {one.check}: {one.found}", markup=False, highlight=False, soft_wrap=True)
        if one.next_step:
            err.print(f"    next: {one.next_step}", markup=False, highlight=False, soft_wrap=True)
    emit(doctors.as_document(findings), "")
    worst = next((one.exit_code for one in findings if one.state == doctors.FAILED), 0)
    if worst:
        raise typer.Exit(worst)


@app.command()
def logs(
    service: Annotated[str, typer.Argument(metavar="SERVICE", help="mlflow, postgres, s3 or jupyter")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on as it is written, until Ctrl-C")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="how many lines from the end")] = 200,
) -> None:
    """Show what a service wrote last. Changes nothing."""
    from labctl import lifecycle
    from labctl.context import SERVICE_IMAGES
    from labctl.ssh import replace_process

    one_of(SERVICE_IMAGES, service, "SERVICE")
    ctx = context()
    options_ = ["--tail", str(lines), *(["--follow"] if follow else [])]
    # what a service wrote on its standard error is its log, too, and the answer to this command
    command = ["sudo", "docker", "logs", *options_, service, "2>&1"]
    replace_process(ctx.login(lifecycle.existing_server(ctx)), command)


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
