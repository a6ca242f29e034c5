"""Takes over what was made by hand, by the tutorial or otherwise: finds it, writes lab.yaml, tags it.

No data is touched and nothing is restarted. What is ambiguous is listed with its ids and asked for, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from labctl import lab as labs
from labctl import leases, resources, ssh, template
from labctl.cloud import META_LAB, ownership
from labctl.cloud import keypair as keypairs
from labctl.cloud import network as networks
from labctl.cloud import server as servers
from labctl.cloud import store as stores
from labctl.cloud import volume as volumes
from labctl.context import Context
from labctl.errors import CloudRefused, ConfigError, HostUnreachable
from labctl.lab import Lab
from labctl.models import Container, Server, Volume
from labctl.progress import Progress
from labctl.sites import SANDBOX

#: How the tutorial calls its server and its volume; the user's or net id follows.
SERVER_PREFIX, VOLUME_PREFIX = "node-persist-", "block-persist-"
#: Seconds that the server gets to answer a login.
LOGIN_SECONDS = 5

Kind = TypeVar("Kind", Server, Volume)


@dataclass(frozen=True)
class Wish:
    """What was asked for: the lab's name, its site, names or ids, a private key; "" for what wasn't said."""

    name: str = ""
    site: str = ""
    server: str = ""
    volume: str = ""
    container: str = ""
    ssh_key: str = ""


@dataclass(frozen=True)
class Found:
    """What there is of a lab."""

    server: Server | None
    volume: Volume | None
    container: Container | None


@dataclass
class Plan:
    """What is there and what adopting it means. `text` is the lab.yaml to write, None where there is one."""

    lab: Lab
    found: Found
    text: str | None = None
    lines: list[str] = field(default_factory=list)
    actions: list[Callable[[], object]] = field(default_factory=list)

    @property
    def pending(self) -> bool:
        """Whether there is anything to do."""
        return self.text is not None or bool(self.actions)

    def as_dict(self, *, adopted: bool) -> dict[str, Any]:
        """The plan for `--json`."""
        found = self.found
        return {
            "lab": self.lab.lab,
            "adopted": adopted,
            "server": found.server.id if found.server else None,
            "volume": found.volume.id if found.volume else None,
            "container": found.container.name if found.container else None,
            "plan": self.lines,
        }


# -- looking -------------------------------------------------------------------------------------------------------


def look(wish: Wish, existing: Path | None, progress: Progress, confirm: Callable[[str], bool]) -> Plan:
    """What there is to adopt; changes nothing. `existing`: a lab.yaml whose resources are meant.

    Raises CloudRefused for what is ambiguous, absent, in use elsewhere, or somebody else's.
    """
    known = labs.load(existing) if existing else None
    ctx = Context(known or Lab(lab=wish.name or "unnamed", site=wish.site or SANDBOX), progress, confirm)
    with progress.step("what is there"):
        name = known.lab if known else wish.name or _only_name(ctx, wish)
        names = known or Lab(lab=name, site=ctx.lab.site)
        server = _pick_server(ctx, wish.server, names)
        volume = _pick_volume(ctx, wish.volume, names)
        if volume is not None:
            volumes.refuse_if_used(ctx.cloud, volume, server)
        container = _pick_container(ctx, wish.container, names)
        found = Found(server, volume, container)
        if found == Found(None, None, None):
            raise CloudRefused(
                f"There is nothing to adopt under the name {name}.",
                expected=f"at least one of {names.server_name}, {names.volume_name}, {names.container_name}",
                source=f"site {ctx.site.name}, project {ctx.cloud.project_id}",
                next_step="labctl adopt NAME, or --server, --volume, --container with a name or an id",
            )
    if known:
        _same_as(known, wish, found)
        return _plan(ctx, found, None)
    text = _lab_yaml(ctx, name, wish, found)
    lab = template.validated(text, "what labctl adopt would write")
    return _plan(Context(lab, progress, confirm), found, text)


def _only_name(ctx: Context, wish: Wish) -> str:
    """The lab's name where none was given: by what was named, else by all that this user has of the tutorial's."""
    given = [one.name for one in servers.called(ctx.cloud, wish.server)] if wish.server else []
    given += [one.name for one in volumes.called(ctx.cloud, wish.volume)] if wish.volume else []
    if not given:
        mine: list[Server | Volume] = [*servers.list_servers(ctx.cloud), *volumes.list_volumes(ctx.cloud)]
        given = [one.name for one in mine if one.user_id == ctx.cloud.user_id and META_LAB not in one.metadata]
    return only_suffix(given)


def only_suffix(names: Sequence[str]) -> str:
    """What follows the tutorial's prefixes in these names, if that is one word for all. Raises CloudRefused."""
    found = sorted({n.removeprefix(p) for n in names for p in (SERVER_PREFIX, VOLUME_PREFIX) if n.startswith(p)} - {""})
    if len(found) != 1:
        raise CloudRefused(
            "Which lab is to be adopted?" if found else "There is nothing of yours by the tutorial's names.",
            expected=f"one server {SERVER_PREFIX}NAME or volume {VOLUME_PREFIX}NAME",
            found=", ".join(found) or "none",
            next_step="labctl adopt NAME, or labctl adopt NAME --server ID --volume ID",
        )
    return found[0]


def _pick_server(ctx: Context, wanted: str, lab: Lab) -> Server | None:
    name = wanted or lab.server_name
    return pick("server", name, servers.called(ctx.cloud, name), lab.lab, ctx.cloud.user_id, asked=bool(wanted))


def _pick_volume(ctx: Context, wanted: str, lab: Lab) -> Volume | None:
    name = wanted or lab.volume_name
    return pick("volume", name, volumes.called(ctx.cloud, name), lab.lab, ctx.cloud.user_id, asked=bool(wanted))


def pick(kind: str, wanted: str, found: Sequence[Kind], lab: str, user: str, *, asked: bool) -> Kind | None:
    """The one that is meant, by a name or an id; None where there is none. Pure; the cases are in the unit tests.

    Another user's is taken by its id only: that its name fits proves nothing in a shared project. `asked`: it was
    named by an option, so it must be there.
    """
    if not found:
        if asked:
            raise CloudRefused(f"There is no {kind} {wanted}.", source=f"--{kind}", next_step=f"openstack {kind} list")
        return None
    labs_own = [one for one in found if ownership.tagged(one, lab)]
    if len(found) > 1 and len(labs_own) != 1:
        raise CloudRefused(
            f"there are {len(found)} {kind}s called {wanted}",
            expected="one, or an id",
            found="; ".join(described(one, user) for one in found),
            next_step=f"labctl adopt {lab} --{kind} ID",
        )
    one = labs_own[0] if len(found) > 1 else found[0]
    tag = one.metadata.get(META_LAB)
    said = ownership.verdict(tag, one.user_id, user, lab)
    if said and (tag or one.id != wanted):
        advice = f"if that lab is given up: openstack {kind} unset --property {META_LAB} {one.id}, then the same again"
        raise CloudRefused(
            f"{kind} {one.name} isn't yours to adopt",
            expected="one that you made and no lab has",
            found=f"{one.id}: {said}",
            next_step=advice if tag else f"if it is meant all the same: labctl adopt {lab} --{kind} {one.id}",
        )
    return one


def described(one: Server | Volume, user: str) -> str:
    """A server or volume for a list to choose from."""
    whose = "yours" if one.user_id == user else f"of user {one.user_id}"
    tag = f", lab {one.metadata[META_LAB]}" if META_LAB in one.metadata else ""
    return f"{one.id} ({one.status}, {whose}, made {one.created}{tag})"


def _pick_container(ctx: Context, wanted: str, lab: Lab) -> Container | None:
    name = wanted or lab.container_name
    found = stores.stat(ctx.cloud, name)
    if found is None and wanted:
        raise CloudRefused(f"There is no container {name}.", source="--container", next_step="labctl bucket list")
    tag = found.metadata.get(META_LAB) if found else None
    if tag and tag != lab.lab:
        raise CloudRefused(f"container {name} belongs to the lab {tag}.", next_step="labctl adopt --container OTHER")
    return found


def _same_as(lab: Lab, wish: Wish, found: Found) -> None:
    """Raises ConfigError where an option says another thing than the lab.yaml that is there."""
    server, volume, container = found.server, found.volume, found.container
    pairs = (
        ("lab", wish.name, lab.lab),
        ("site", wish.site, lab.site),
        ("server.name", server.name if server else "", lab.server_name),
        ("volume.name", volume.name if volume else "", lab.volume_name),
        ("object_store.container", container.name if container else "", lab.container_name),
    )
    for key, seen, wanted in pairs:
        if seen and seen != wanted:
            raise ConfigError(
                f"lab.yaml has another {key}.",
                expected=wanted,
                found=seen,
                source=lab.source(key),
                next_step="edit lab.yaml, or --lab OTHER labctl adopt",
            )


# -- the plan ------------------------------------------------------------------------------------------------------


def _lab_yaml(ctx: Context, name: str, wish: Wish, found: Found) -> str:
    """The lab.yaml of what was found: what differs from the defaults, and what a rebuild must make again alike."""
    server, volume, container = found.server, found.volume, found.container
    plain = Lab(lab=name, site=ctx.lab.site)
    data: dict[str, Any] = {"lab": name, "site": plain.site}
    if server is not None:
        section: dict[str, Any] = {"name": server.name} if server.name != plain.server_name else {}
        lease = leases.of_server(ctx.cloud, server)
        if lease is not None:
            data["lease"] = {"name": lease.name}
        reserved = [one.flavor for one in lease.reservations if one.launch_flavor == server.flavor] if lease else []
        flavor = (reserved or [server.flavor])[0]
        image = servers.image_name(ctx.cloud, server.image_id) if server.image_id else ""
        section |= {key: value for key, value in (("image", image), ("flavor", flavor)) if value}
        if key := _private_key(ctx, server, wish.ssh_key):
            section["ssh_key"] = str(key)
        data["server"] = section
    elif wish.ssh_key:
        data["server"] = {"ssh_key": wish.ssh_key}
    if volume is not None:
        named = {"name": volume.name} if volume.name != plain.volume_name else {}
        data["volume"] = {**named, "size_gib": volume.size_gib}
    if container is not None and container.name != plain.container_name:
        data["object_store"] = {"container": container.name}
    head = "# Written by labctl adopt, from what was there. Every key there is: labctl --lab example.yaml init\n"
    return head + yaml.safe_dump(data, sort_keys=False)


def _private_key(ctx: Context, server: Server, chosen: str) -> Path | None:
    """The private key on this machine that opens the server, or None; `chosen` by the user is taken as it is."""
    if chosen:
        path = Path(chosen).expanduser().absolute()
        if not path.is_file():
            raise ConfigError(f"There is no private key {path}.", source="--ssh-key", next_step="check the path")
        return path
    pair = keypairs.public_key(ctx.cloud, server.key_name) if server.key_name else None
    if pair is None:
        return None
    folders = (Path.home() / ".ssh", resources.state_directory())
    for public in [one for folder in folders for one in sorted(folder.glob("*.pub"))]:
        private = public.with_suffix("")
        if private.is_file() and keypairs.same(public.read_text(errors="replace"), pair):
            return private
    return None


def _plan(ctx: Context, found: Found, text: str | None) -> Plan:
    """What is done to each, in words and as actions. `ctx` is of the lab as it will be."""
    lab, cloud, meta = ctx.lab, ctx.cloud, {META_LAB: ctx.lab.lab}
    server, volume, container = found.server, found.volume, found.container
    plan = Plan(lab, found, text)

    def tag(it: Server | Volume | Container, what: str, action: Callable[[], object]) -> None:
        done = ownership.tagged(it, lab.lab)
        plan.lines.append(f"{what}: {'has the tag of this lab' if done else f'gets the tag {META_LAB}={lab.lab}'}")
        if not done:
            plan.actions.append(action)

    if server is not None:
        what = f"server {server.name} ({server.id}, {server.status}, {server.address or 'no address'})"
        tag(server, what, lambda: servers.set_metadata(cloud, server.id, **meta))
        if (address := server.address) and address not in _addresses(ctx):
            plan.lines.append(f"floating IP {address}: becomes the lab's: kept by a rebuild, given back by destroy")
            plan.actions.append(lambda: networks.claim_floating_ip(cloud, address, lab.lab))
        plan.lines += _about_server(ctx, server)
    else:
        plan.lines.append(f"server {lab.server_name}: there is none; labctl up makes it")
    if volume is not None:
        what = f"volume {volume.name} ({volume.id}, {volume.size_gib} GiB, {volume.status})"
        tag(volume, what, lambda: volumes.set_metadata(cloud, volume.id, **meta))
    else:
        plan.lines.append(f"volume {lab.volume_name}: there is none; labctl up makes an empty one")
    if container is not None:
        what = f"container {container.name} ({container.objects} objects, {container.bytes / 1e6:.1f} MB)"
        tag(container, what, lambda: stores.set_metadata(cloud, container.name, meta))
    else:
        plan.lines.append(f"container {lab.container_name}: there is none; labctl up makes it")
    if text is not None:
        plan.lines.append("lab.yaml: is written")
    return plan


def _addresses(ctx: Context) -> list[str]:
    return [str(ip.floating_ip_address) for ip in networks.floating_ips(ctx.cloud, ctx.lab.lab)]


def _about_server(ctx: Context, server: Server) -> list[str]:
    """What a person should know before the next rebuild."""
    lines = []
    if lease := leases.of_server(ctx.cloud, server):
        lines.append(f"lease {lease.name} (ends {leases.shown(lease.ends)}): stays yours")
    if server.status == "ACTIVE" and server.address:
        try:
            ssh.wait_for_login(ctx.login(server), ctx.progress.tell, timeout=LOGIN_SECONDS)
        except HostUnreachable as error:
            lines.append(
                f"login as {ctx.lab.server.user} with {ctx.ssh_key}: {error.found.splitlines()[-1]}. Without it a"
                " rebuild can't stop the services first: --ssh-key FILE (server.ssh_key in lab.yaml)"
            )
        else:
            lines.append(f"login as {ctx.lab.server.user} with {ctx.ssh_key}: works")
    lines.append(
        "ports: the next server has labctl's own security group: SSH from everywhere, the services through labctl"
        " tunnel (or access.services_from in lab.yaml)"
    )
    return lines


# -- doing ---------------------------------------------------------------------------------------------------------


def carry_out(plan: Plan, path: Path) -> None:
    """Write lab.yaml, then tag: a run that was cut off between is finished by the same command."""
    if plan.text is not None:
        template.write_text(path, plan.text, "labctl adopt")
    for action in plan.actions:
        action()
