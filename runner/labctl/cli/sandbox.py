"""The embedded cloud on this machine: `labctl sandbox …`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from labctl.cli.core import confirm, emit, progress, table
from labctl.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="A Chameleon of your own in one container, on this machine.")


@app.command("up")
def sandbox_up(
    images: Annotated[str, typer.Option(help="service images: auto, pull or build")] = "auto",
    require_lease: Annotated[
        bool | None,
        typer.Option(
            "--require-lease/--no-require-lease", help="no server without a lease, as on KVM@TACC; default: as it was"
        ),
    ] = None,
) -> None:
    """Start the embedded cloud; builds what is missing. Safe to run again."""
    from labctl import sandbox

    if images not in ("auto", "pull", "build"):
        raise ConfigError(
            f"--images {images}", expected="auto, pull or build", source="--images", next_step="leave it out"
        )
    with progress().step("sandbox up") as step:
        found = sandbox.up(step.tell, images=images, require_lease=require_lease)  # type: ignore[arg-type]
    emit(asdict(found), f"The sandbox is {found.state}.")


@app.command("down")
def sandbox_down() -> None:
    """Stop the embedded cloud. Volumes, objects and servers come back with `up`."""
    from labctl import sandbox

    with progress().step("sandbox down") as step:
        sandbox.down(step.tell)
    emit({"state": "stopped"}, "The sandbox is stopped; its data stays.")


@app.command("status")
def sandbox_status() -> None:
    """Show the embedded cloud. Changes nothing."""
    from labctl import sandbox

    found = asdict(sandbox.status())
    emit(found, table([(name, str(value)) for name, value in found.items()]))


@app.command("image")
def sandbox_image(
    name: Annotated[str, typer.Argument(help="an entry of sandbox/images/versions.json, such as postgres-15")],
) -> None:
    """Make one service image for the sandbox's servers, such as an older PostgreSQL. Safe to run again."""
    from labctl import sandbox

    with progress().step(f"sandbox image {name}") as step:
        reference = sandbox.image(step.tell, name)
    emit({"image": name, "reference": reference}, f"The image {name} is {reference}.")


@app.command("destroy")
def sandbox_destroy(
    images: Annotated[bool, typer.Option("--images", help="delete the images that it was built from, too")] = False,
) -> None:
    """Delete the embedded cloud WITH ALL ITS VOLUMES AND OBJECTS, after asking."""
    from labctl import sandbox

    if not confirm("Delete the sandbox with every server, volume and object in it?"):
        raise ConfigError("Nothing was deleted.", next_step="labctl sandbox destroy")
    with progress().step("sandbox destroy") as step:
        sandbox.destroy(step.tell, images=images)
    emit({"state": "absent"}, "The sandbox is gone.")
