"""The commands of a lab's life, from nothing to nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from labctl.cli.core import ask, confirm, context, emit, err, one_of, options, progress, report, summary, verified
from labctl.errors import ConfigError

app = typer.Typer()


@app.command()
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="the lab's name; default: your user name")] = "",
    site: Annotated[str, typer.Option(help="sandbox, chameleon, or an entry of clouds.yaml")] = "sandbox",
) -> None:
    """Write a commented lab.yaml. Never overwrites one."""
    from labctl import template

    path = template.write(options.lab_file or Path("lab.yaml"), name, site)
    emit({"file": str(path)}, f"Wrote {path}. Next: labctl up")


Accept = Annotated[
    list[str] | None,
    typer.Option("--accept-volume", metavar="IDENTITY", help="take over the volume that a safety stop named so"),
]


Retry = Annotated[bool, typer.Option("--retry", help="make a VM that the cloud can't start once more")]


@app.command()
def up(accept_volume: Accept = None, retry: Retry = False) -> None:
    """Bring the whole lab up: VM, address, ports, volume, object store, services. Safe to run again: it continues."""
    from labctl import lifecycle

    ctx = context(accept_volume)
    ctx.retry = retry
    report(lifecycle.up(ctx))
    summary(ctx)


@app.command()
def converge(
    check: Annotated[bool, typer.Option("--check", help="say what would change, change nothing")] = False,
    only: Annotated[list[str] | None, typer.Option("--only", metavar="ROLE", help="only this role; repeatable")] = None,
    accept_volume: Accept = None,
) -> None:
    """Bring the server to what lab.yaml says. Safe to run again: a second run changes nothing."""
    from labctl import lifecycle

    for role in only or ():
        if role not in lifecycle.ROLES:
            raise ConfigError(
                f"There is no role {role}.",
                expected=f"one of {', '.join(lifecycle.ROLES)}",
                source="--only",
                next_step="labctl converge --help",
            )
    ctx = context(accept_volume)
    report(lifecycle.converge(ctx, check=check, only=only or ()), check=check)


@app.command(name="reattach-volume")
def reattach_volume(accept_volume: Accept = None) -> None:
    """After the VM was made anew: attach the volume, prove it is the lab's, mount, start, verify. Formats nothing."""
    from labctl import lifecycle

    ctx = context(accept_volume)
    verified(lifecycle.reattach_volume(ctx))


Force = Annotated[bool, typer.Option("--force", help="go on where the host can't be drained")]


@app.command()
def rebuild(
    force: Force = False,
    accept_volume: Accept = None,
    new_lease: Annotated[
        bool, typer.Option("--new-lease", help="onto a new lease, made before the old one is given up")
    ] = False,
    retry: Retry = False,
) -> None:
    """Replace the VM by a new one; volume, object store and address stay. Reads everything back. Safe to run again."""
    from labctl import lifecycle

    ctx = context(accept_volume)
    ctx.retry = retry
    verified(lifecycle.rebuild(ctx, force=force, new_lease=ctx.lab.lease.duration if new_lease else None))


@app.command()
def drain(force: Force = False) -> None:
    """Stop the services, flush and unmount the volume; the VM stays. `converge` brings it back. Safe to run again."""
    from labctl import lifecycle

    drained = lifecycle.drain(context(), force=force)
    emit({"drained": drained}, "Drained: nothing uses the volume." if drained else "")


@app.command()
def down(force: Force = False) -> None:
    """Delete the VM after a drain. Volume and object store stay. Safe to run again."""
    from labctl import lifecycle

    ctx = context()
    lifecycle.down(ctx, force=force)
    emit({"down": True}, "The server is gone; the data stays. labctl up (or rebuild) brings it back.")


@app.command()
def destroy(
    force: Force = False,
    keep: Annotated[
        str, typer.Option("--keep", metavar="WHAT", help="what stays: volume, container, or both: a,b")
    ] = "",
) -> None:
    """Delete the lab WITH ALL ITS DATA, after asking for its name. Safe to run again."""
    from labctl import backup as backups
    from labctl import teardown

    kept = [word.strip() for word in keep.split(",") if word.strip()]
    for word in kept:
        one_of(teardown.KEEPABLE, word, "--keep")
    ctx = context()
    doomed = teardown.possessions(ctx, kept)
    for line in doomed.lines:
        err.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    stays = " ".join(
        part for part in (backups.what_stays(ctx), *(f"It stays: {line}." for line in doomed.stays)) if part
    )
    if stays:
        err.print(stays, markup=False, highlight=False, soft_wrap=True)
    if doomed and not options.yes:
        typed = ask(f"This deletes all of it for good. Type the lab's name ({ctx.lab.lab}) to go on: ")
        if typed != ctx.lab.lab:
            raise ConfigError("That is not the lab's name: nothing was deleted.", next_step="labctl destroy")
    teardown.destroy(ctx, force=force, keep=kept)
    emit({"destroyed": list(doomed.lines), "stays": stays}, f"The lab is gone. {stays}".strip())


@app.command()
def adopt(
    *,
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="the lab's name: what follows node-persist-")] = "",
    site: Annotated[str, typer.Option(help="sandbox, chameleon, or an entry of clouds.yaml")] = "",
    server: Annotated[str, typer.Option(metavar="NAME|ID", help="the server, if it isn't node-persist-NAME")] = "",
    volume: Annotated[str, typer.Option(metavar="NAME|ID", help="the volume, if it isn't block-persist-NAME")] = "",
    container: Annotated[str, typer.Option(metavar="NAME", help="the container, if it isn't object-persist-NAME")] = "",
    ssh_key: Annotated[str, typer.Option(metavar="FILE", help="the private key that logs into the server")] = "",
    check: Annotated[bool, typer.Option("--check", help="show the plan, change nothing")] = False,
) -> None:
    """Take over what you made by hand: write lab.yaml, tag it. Touches no data, restarts nothing. Safe to run again."""
    from labctl import adopt as adoption
    from labctl.lab import find_file

    path = options.lab_file or Path("lab.yaml")
    existing = find_file(options.lab_file) if path.is_file() else None
    wish = adoption.Wish(name, site, server, volume, container, ssh_key)
    plan = adoption.look(wish, existing, progress(), confirm)
    for line in plan.lines:
        err.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    if not check and plan.pending and confirm("Take all of it over?"):
        adoption.carry_out(plan, path)
        emit(plan.as_dict(adopted=True), f"The lab {plan.lab.lab} is adopted. Next: labctl rebuild, or labctl status")
        return
    emit(
        plan.as_dict(adopted=not plan.pending), "" if plan.pending else "Nothing to do: all of it is the lab's already."
    )
