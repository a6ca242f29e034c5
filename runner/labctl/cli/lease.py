"""The lease that the server lives in: `labctl lease …`."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated, Any

import typer

from labctl.cli.core import confirm, context, emit, report, summary, table, verified
from labctl.errors import CloudRefused, ConfigError

app = typer.Typer(no_args_is_help=True, help="The lease that the VM lives in: its end deletes the VM, never the data.")

_UNITS = {"d": "days", "h": "hours", "m": "minutes"}


def duration(text: str, source: str) -> timedelta:
    """48h, 2d or 90m."""
    if not (found := re.fullmatch(r"(\d+)([dhm])", text.strip())):
        raise ConfigError(
            f"{text} is no duration.", expected="a number with d, h or m, such as 48h", found=text, source=source
        )
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


@app.command("show")
def show(
    fail_under: Annotated[
        str, typer.Option("--fail-under", metavar="TIME", help="exit with 3 if less is left, such as 48h or 2d")
    ] = "",
) -> None:
    """Show the lease and its end (UTC). Changes nothing."""
    from labctl import leases
    from labctl.cloud import server as servers

    wanted = duration(fail_under, "--fail-under") if fail_under else None
    ctx = context()
    server = servers.find(ctx.cloud, ctx.lab.server_name, lab=ctx.lab.lab)
    found = leases.describe(ctx, server)
    emit({"lease": found}, _text(found))
    if wanted is not None and _short(ctx, found, wanted):
        raise typer.Exit(CloudRefused.exit_code)


def _text(found: dict[str, Any] | None) -> str:
    if found is None:
        return "No lease: the lab has no server, or its server doesn't need one."
    from labctl.status import left_text

    left = left_text(timedelta(seconds=found["seconds_left"]))
    return table(
        [
            ("lease", f"{found['name']} ({found['id']}), {found['status']}"),
            ("ends", f"{found['ends']}, {left}"),
            ("drains at", f"{found['drains_at']}, by the timer on the server"),
            ("reserves", found["flavor"]),
        ]
    )


def _short(ctx: Any, found: dict[str, Any] | None, wanted: timedelta) -> bool:
    """Whether less than that is left; where leases are needed, none at all is less."""
    from labctl import leases

    if found is None:
        return leases.needed(ctx)
    return bool(found["status"] != "ACTIVE" or found["seconds_left"] < wanted.total_seconds())


@app.command("extend")
def extend(
    days: Annotated[int | None, typer.Option("--days", min=0, metavar="N", help="end so many days from now")] = None,
    hours: Annotated[int | None, typer.Option("--hours", min=0, metavar="N", help="and so many hours")] = None,
) -> None:
    """Let the VM live longer: prolong its lease or, where the site can't, rebuild onto a new one after asking."""
    from labctl import leases, lifecycle

    ctx = context()
    given = (days, hours) != (None, None)
    lasts = timedelta(days=days or 0, hours=hours or 0) if given else ctx.lab.lease.duration
    server = lifecycle.existing_server(ctx)
    if leases.extend(ctx, server, lasts):
        report(lifecycle.converge(ctx))  # the timer on the host learns of the new end
        return
    question = (
        "This site can't prolong the lease of a VM. Rebuild onto a new lease? The VM is replaced; volume, object store"
        " and address stay."
    )
    if not confirm(question):
        raise CloudRefused(
            "The lease was left as it is.", expected="a yes", next_step="labctl rebuild --new-lease, when it suits"
        )
    verified(lifecycle.rebuild(ctx, new_lease=lasts))
    summary(ctx)
