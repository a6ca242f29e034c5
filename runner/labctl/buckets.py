"""Containers by hand: list, create, delete. What a server reads, and the backups, aren't deleted from under it."""

from __future__ import annotations

from dataclasses import dataclass

from labctl import backup, lifecycle
from labctl.cloud import META_LAB
from labctl.cloud import store as stores
from labctl.context import Context
from labctl.errors import CloudRefused, ConfigError
from labctl.models import Container


@dataclass(frozen=True)
class Listed:
    """A container of the project. `lab`: the one that lab.yaml names."""

    name: str
    objects: int
    bytes: int
    lab: bool


def overview(ctx: Context) -> list[Listed]:
    """All containers of the project, the lab's own first."""
    own = ctx.lab.container_name
    rows = [Listed(one.name, one.objects, one.bytes, one.name == own) for one in stores.list_containers(ctx.cloud)]
    return sorted(rows, key=lambda row: (not row.lab, row.name))


def create(ctx: Context, name: str) -> Container:
    """A new container, tagged as made for the lab; one that is there and tagged so is taken for it."""
    if not name or "/" in name or len(name.encode()) > 256:
        raise ConfigError(f"A container can't be called {name}.", expected="1 to 256 bytes without /", source="NAME")
    container, new = stores.ensure_container(ctx.cloud, name, {META_LAB: ctx.lab.lab})
    if container.metadata.get(META_LAB) != ctx.lab.lab:
        raise ConfigError(
            f"There is a container {name} already.",
            expected=f"none, or one made for the lab {ctx.lab.lab}",
            found=f"{container.objects} objects, made for {container.metadata.get(META_LAB) or 'nobody'}",
            next_step="another name",
        )
    if not new:
        ctx.progress.note(f"Container {name} is there already.")
    return container


def doomed(ctx: Context, name: str) -> list[Container]:
    """The container to delete, and those of its segments. Raises CloudRefused for what isn't there or is in use."""
    found = stores.with_segments(ctx.cloud, name)
    if not found or found[0].name != name:
        raise CloudRefused(f"There is no container {name}.", next_step="labctl bucket list")
    if name.startswith(backup.container_of("")):
        raise CloudRefused(
            f"container {name} holds backups and wasn't deleted",
            next_step="labctl backup list; labctl backup delete ID, or --all",
        )
    server = lifecycle.find_server(ctx) if name == ctx.lab.container_name else None
    if server is not None:
        raise CloudRefused(
            f"container {name} is mounted on the lab's server and wasn't deleted",
            expected="a lab without a server",
            found=f"server {server.name}, {server.status}",
            next_step="labctl down (the volume stays), then the same again",
        )
    return found


def delete(ctx: Context, name: str) -> int:
    """Delete a container with its objects; how many there were."""
    with ctx.progress.step(f"delete container {name}") as step:
        return stores.delete_container(ctx.cloud, name, step.tell)
