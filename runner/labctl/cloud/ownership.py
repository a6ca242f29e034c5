"""Whose a server, volume or container is, in a project that others share: by its tag, else by who made it."""

from __future__ import annotations

from labctl.cloud import META_LAB
from labctl.cloud.session import Cloud
from labctl.errors import CloudRefused
from labctl.models import Container, Server, Volume


def tagged(it: Server | Volume | Container, lab: str) -> bool:
    """Whether it carries the lab's tag: what doesn't is never deleted."""
    return it.metadata.get(META_LAB) == lab


def others(cloud: Cloud, it: Server | Volume, lab: str) -> str:
    """Why it isn't this lab's to use, in words; "" for what is tagged as the lab's, or this user's and untagged."""
    return verdict(it.metadata.get(META_LAB), it.user_id, cloud.user_id, lab)


def verdict(tag: str | None, maker: str, user: str, lab: str) -> str:
    """The decision: `tag` is the lab that it is tagged with, `maker` and `user` are user ids."""
    if tag == lab:
        return ""
    if tag:
        return f"it belongs to the lab {tag}"
    if maker and maker != user:
        return f"another user of the project made it ({maker})"
    return ""


def refuse_others(cloud: Cloud, it: Server | Volume, lab: str) -> None:
    """Raises CloudRefused for what is somebody else's. No request."""
    if said := others(cloud, it, lab):
        kind = "server" if isinstance(it, Server) else "volume"
        raise CloudRefused(
            f"{kind} {it.name} isn't this lab's, and is left alone",
            expected=f"one that is tagged {META_LAB}={lab}, or that you made",
            found=f"{it.id}: {said}",
            next_step=f"another name in lab.yaml ({kind}.name); if it is yours all the same: "
            f"labctl adopt --{kind} {it.id}",
        )


def refuse_untagged(it: Server, lab: str) -> None:
    """Raises CloudRefused before a server is deleted that isn't known to be the lab's."""
    if not tagged(it, lab):
        raise CloudRefused(
            f"server {it.name} isn't known to be this lab's, and isn't deleted",
            expected=f"the tag {META_LAB}={lab}",
            found=f"{it.id}, {it.metadata.get(META_LAB) or 'no tag'}",
            next_step=f"if it is: labctl adopt --server {it.id}, then the same command again",
        )
