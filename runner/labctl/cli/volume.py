"""The block volumes: `labctl volume …`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from labctl.cli.core import confirm_by_name, context, emit, options, whose
from labctl.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Block volumes of the project, and the lab's own among them.")
Name = Annotated[str, typer.Argument(metavar="NAME", help="a volume's name or id")]


@app.command("list")
def volume_list() -> None:
    """List the project's volumes, the lab's first. Changes nothing."""
    from labctl import storage

    rows = [asdict(row) for row in storage.overview(context())]
    lines = [
        f"{'*' if row['lab'] else ' '} {row['name']}  {row['id']}  {row['size_gib']} GiB  {row['status']}"
        + (f"  on {row['attached_to']}" if row["attached_to"] else "")
        + (f"  (lab {row['made_for']})" if row["made_for"] else "")
        for row in rows
    ]
    emit(rows, "\n".join(lines) or "The project has no volumes.")


@app.command("create")
def volume_create(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    size: Annotated[int, typer.Argument(metavar="SIZE", min=1, help="in GiB")],
) -> None:
    """Make an empty volume for the lab. Safe to run again."""
    from labctl import storage

    made = storage.create(context(), name, size)
    emit(asdict(made), f"Volume {made.name} ({made.id}) has {made.size_gib} GiB and is {made.status}.")


@app.command("attach")
def volume_attach(name: Name) -> None:
    """Attach a volume to the lab's server, unless another server has it. Mounts nothing. Safe to run again."""
    from labctl import storage

    ctx = context()
    volume = storage.attach(ctx, name)
    hint = " Next: labctl converge mounts it." if storage.is_labs(ctx, volume) else ""
    emit(asdict(volume), f"Volume {volume.name} is attached as {volume.device}.{hint}")


@app.command("detach")
def volume_detach(name: Name) -> None:
    """Detach a volume from the lab's server, after a drain; never from under a mount. Safe to run again."""
    from labctl import storage

    volume = storage.detach(context(), name)
    emit(asdict(volume), f"Volume {volume.name} is {volume.status}.")


@app.command("extend")
def volume_extend(
    words: Annotated[list[str], typer.Argument(metavar="[NAME] SIZE", help="the lab's volume by default; size in GiB")],
) -> None:
    """Make a volume larger, its partition and filesystem too. Safe to run again: it continues, or changes nothing."""
    from labctl import storage

    name, size = ("", words[0]) if len(words) == 1 else (words[0], words[-1])
    if len(words) > 2 or not size.isdecimal() or int(size) < 1:
        raise ConfigError(
            "Which volume gets which size?",
            expected="[NAME] SIZE, the size in whole GiB",
            found=" ".join(words),
            next_step="labctl volume extend 4",
        )
    volume, outcome = storage.extend(context(), name, int(size))
    document = {**asdict(volume), "host_changed": outcome.changed if outcome else None}
    emit(document, f"Volume {volume.name} has {volume.size_gib} GiB.")


@app.command("delete")
def volume_delete(
    name: Name,
    confirmed: Annotated[str, typer.Option("--confirm", metavar="NAME", help="the name once more, for scripts")] = "",
) -> None:
    """Delete a volume WITH ITS DATA, after asking for its name; --yes is enough for those made for this lab."""
    from labctl import storage
    from labctl.cloud import META_LAB

    ctx = context()
    volume = storage.doomed(ctx, name)
    owner = volume.metadata.get(META_LAB, "")
    text = f"volume {volume.name} ({volume.id}, {volume.size_gib} GiB), {whose(owner)}"
    if not (options.yes and owner == ctx.lab.lab):
        confirm_by_name("volume", volume.name, text, confirmed)
    storage.delete(ctx, volume)
    emit({"deleted": volume.id}, f"Volume {volume.name} is gone.")
