"""The commands that make backups and bring them back: `labctl backup …`, `labctl restore`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from labctl.cli.core import ask, context, emit, options
from labctl.errors import ConfigError

app = typer.Typer()
sets = typer.Typer(
    invoke_without_command=True,
    help="Back the lab's volume up to the object store, now or by a timer. Safe to run again: sends only what differs.",
)
app.add_typer(sets, name="backup")

Keep = Annotated[int | None, typer.Option("--keep", min=1, metavar="N", help="complete backups to keep; default: all")]
FromLab = Annotated[str, typer.Option("--from-lab", metavar="NAME", help="another lab's backups")]


@sets.callback()
def backup(
    command: typer.Context,
    keep: Keep = None,
    schedule: Annotated[
        str, typer.Option("--schedule", metavar="WHEN", help="daily, hourly, 'Mon 03:00' or another OnCalendar=; off")
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="whatever another host's lease says")] = False,
) -> None:
    """Back the lab up: database, artifacts, notebooks, passwords (encrypted). Safe to run again."""
    if command.invoked_subcommand:
        return
    from labctl import backup as backups

    ctx = context()
    if schedule:
        backups.schedule(ctx, schedule, keep)
        text = "No more backups by a timer." if schedule == "off" else f"Backups run {schedule}; see labctl status."
        emit({"schedule": schedule, "keep": keep}, text)
        return
    found = backups.backup(ctx, keep=keep, force=force)
    emit(
        found,
        f"Backup {found['id']}: {found['objects']} objects, {found['files']} files, {_size(found['bytes'])};"
        f" sent {found['sent']} ({_size(found['sent_bytes'])}) in {found['seconds']} s.",
    )


@sets.command("list")
def list_backups(from_lab: FromLab = "") -> None:
    """List the backups, complete and cut off, newest first. Changes nothing."""
    from labctl import backup as backups

    found = backups.listed(context(), from_lab)
    emit(found, "\n".join([f"{found['container']}:", *(_line(one) for one in found["sets"])]))


@sets.command("verify")
def verify(
    which: Annotated[str, typer.Argument(metavar="[ID]")] = "latest",
    from_lab: FromLab = "",
) -> None:
    """Read back every byte of a backup and compare it by hash. Changes nothing."""
    from labctl import backup as backups

    found = backups.verify(context(), which, from_lab)
    emit(found, f"Backup {found['id']} is whole: {found['verified_objects']} objects read back by hash.")


@sets.command("delete")
def delete(
    which: Annotated[str, typer.Argument(metavar="[ID]")] = "",
    everything: Annotated[bool, typer.Option("--all", help="all backups of the lab, with their container")] = False,
) -> None:
    """Delete one backup, or with --all every backup of the lab after asking for its name."""
    from labctl import backup as backups

    if bool(which) == everything:
        raise ConfigError("Which backup?", expected="an id, or --all", next_step="labctl backup list")
    ctx = context()
    if not everything:
        found = backups.delete(ctx, which)
        emit(found, f"Deleted {which} and {found['removed_objects']} objects that only it needed.")
        return
    if not options.yes and ask(f"This deletes every backup. Type the lab's name ({ctx.lab.lab}): ") != ctx.lab.lab:
        raise ConfigError("That is not the lab's name: nothing was deleted.", next_step="labctl backup list")
    gone = backups.delete_all(ctx)
    emit({"deleted_objects": gone}, f"The backups are gone ({gone} objects).")


@sets.command("key")
def key() -> None:
    """Show which file on this machine holds the key to the backed-up passwords; fetches it if it is missing."""
    from labctl import backup as backups
    from labctl import lifecycle

    ctx = context()
    path = backups.keep_key(ctx, lifecycle.existing_server(ctx))
    emit({"key_file": str(path), "key_id": path.stem}, str(path))


@app.command()
def restore(
    which: Annotated[str, typer.Argument(metavar="[ID]", help="a backup's id, or latest")] = "latest",
    *,
    beside: Annotated[bool, typer.Option("--beside", help="next to the data that is there, which stays")] = False,
    into_new_major: Annotated[
        bool, typer.Option("--into-new-major", help="beside, into a newer PostgreSQL than the volume's")
    ] = False,
    new_secrets: Annotated[bool, typer.Option("--new-secrets", help="make new passwords, for want of the key")] = False,
    key_file: Annotated[Path | None, typer.Option("--key-file", help="the key that `labctl backup` handed out")] = None,
    from_lab: FromLab = "",
    again: Annotated[bool, typer.Option("--again", help="also where this backup is served already")] = False,
    back: Annotated[bool, typer.Option("--undo", help="serve again what was served before the last restore")] = False,
) -> None:
    """Bring the lab back from a backup, into an empty volume or --beside its data. Safe to run again: it continues."""
    from labctl import backup as backups

    ctx = context()
    if back:
        result, verified = backups.undo(ctx)
    else:
        wish = backups.Wish(which, beside, into_new_major, new_secrets, again, from_lab, key_file)
        result, verified = backups.restore(ctx, wish)
    done = "The lab serves what it did before the restore" if back else f"Restored {result['id']}"
    document = {**result, "verified": {"earlier_runs": verified.earlier_runs, "run_id": verified.run_id}}
    emit(document, f"{done}; {verified.earlier_runs} earlier runs read back unchanged.")


def _line(one: dict[str, Any]) -> str:
    """A backup as a line of the list."""
    hours = one["age_seconds"] / 3600
    age = f"{hours:.1f} h old" if hours < 48 else f"{hours / 24:.0f} d old"
    if not one["complete"]:
        return f"  {one['id']}  {age:>10}  {one['problem']}"
    return (
        f"  {one['id']}  {age:>10}  complete  {_size(one['bytes']):>10}  {one['objects']} objects  {one['files']} files"
        f"  PostgreSQL {one['postgres']}  MLflow {one['mlflow']}"
    )


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
