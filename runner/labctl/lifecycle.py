"""The order of steps of every command, readable top to bottom.

Each command finds what is there before it makes or stops anything, so one that was interrupted is mended by running it
again. What is durable (volume, container) and what is disposable (server, address, credential) is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from labctl import ansible, clock, inventory_cache, leases, ssh, store_access
from labctl import inventory as inventories
from labctl import lab as labs
from labctl.ansible import Outcome, Run, Step
from labctl.cloud import FINISHED, META_HOST_KEY, META_LAB, META_REBUILD, UNFINISHED, ownership
from labctl.cloud import keypair as keypairs
from labctl.cloud import network as networks
from labctl.cloud import server as servers
from labctl.cloud import store as stores
from labctl.cloud import volume as volumes
from labctl.context import Context
from labctl.errors import CloudRefused, ConvergeFailed, HostUnreachable
from labctl.models import Credential, Server, Volume
from labctl.progress import Progress

ROLES = ("block_volume", "docker", "rclone", "mlflow_stack")
#: Seconds that a host gets to answer before a command that would rather drain it asks what to do.
DRAIN_LOGIN_SECONDS = 20


@dataclass
class Verification:
    """What `verify` proved: the newest probe run (`logged` by this command), and how many earlier ones are intact."""

    logged: bool = False
    run_id: str = ""
    artifact_sha256: str = ""
    earlier_runs: int = 0
    details: dict[str, Any] = field(default_factory=dict)


# -- bringing up ---------------------------------------------------------------------------------------------------


def up(ctx: Context) -> Outcome:
    """Bring the whole lab up: server, address, ports, volume, container, credential, and all that runs on the host."""
    server, volume = provide(ctx)
    return converge_host(ctx, server, volume)


def provide(ctx: Context, **metadata: str) -> tuple[Server, Volume]:
    """What the cloud has to give, in an order that overlaps its waits: the server builds while the rest is made.

    `metadata`: what a server that is made here is tagged with besides the lab's name.
    """
    progress, cloud, lab = ctx.progress, ctx.cloud, ctx.lab
    clock.refuse_if_wrong(cloud)
    with progress.step("what is there"):
        server, volume = find_server(ctx), find_volume(ctx)
        volume = without_failure(ctx, volume)
        refuse_volume(ctx, volume, server)
        if ctx.retry and server is not None and never_ran(server):
            ownership.refuse_untagged(server, lab.lab)
            discard(ctx, server)
            server = None
    leases.refuse_if_unmakeable(ctx, server)
    store_access.check(ctx, server)
    with progress.step("SSH key and security group"):
        public_key = ssh.ensure_key(ctx.ssh_key)
        key_name = keypairs.ensure(cloud, public_key, f"labctl-{lab.lab}")
        groups = networks.ensure_groups(cloud, [ctx.security_group])
    lease = leases.ensure(ctx) if server is None else None
    with progress.step(f"server {lab.server_name}") as step:
        created = server is None
        launch = partial(
            servers.create,
            cloud,
            lab.server_name,
            image=lab.server.image,
            flavor=leases.launch_flavor(lease, lab.server.flavor),
            network=ctx.site.network,
            key_name=key_name,
            groups=["default", *groups],
            metadata={META_LAB: lab.lab, **leases.tags(lease), **metadata},
            zone=lab.server.availability_zone,
        )
        server = server or launch()
        inventory_cache.forget(ctx.state)
        step.result("requested" if created else f"exists, {server.status}")
    volume = provide_volume(ctx, volume)
    with progress.step(f"container {lab.container_name}"):
        provide_container(ctx)
    with progress.step("server ACTIVE, with an address") as step:
        if server.status == "SHUTOFF":
            servers.start(cloud, server.id)
        if created or server.status != "ACTIVE":
            server = wait_active(ctx, server, step, launch if created and ctx.retry else None)
        if not created:
            networks.put_groups_on(cloud, server, groups)
        address = networks.ensure_floating_ip(cloud, server, lab.lab).address
        server = replace(server, address=address)  # the server's own record shows it seconds later
        step.result(address)
    volume = attach(ctx, server, volume)
    wait_for_login(ctx, server)
    take_over(ctx, server, volume)
    return server, volume


def take_over(ctx: Context, server: Server, volume: Volume) -> None:
    """Tag what this user made by hand as the lab's: only what is tagged is ever deleted. No request if all is."""
    if not ownership.tagged(server, ctx.lab.lab) and server.address:
        networks.claim_floating_ip(ctx.cloud, server.address, ctx.lab.lab)
    for it, set_metadata in ((server, servers.set_metadata), (volume, volumes.set_metadata)):
        if not ownership.tagged(it, ctx.lab.lab):
            set_metadata(ctx.cloud, it.id, **{META_LAB: ctx.lab.lab})


def provide_container(ctx: Context) -> None:
    """The lab's container, made if there was none. Raises CloudRefused for one with data that isn't known as the lab's.

    A container doesn't say who made it: only its tag tells.
    """
    lab, name = ctx.lab.lab, ctx.lab.container_name
    container, _ = stores.ensure_container(ctx.cloud, name, {META_LAB: lab})
    if ownership.tagged(container, lab):
        return
    other = container.metadata.get(META_LAB)
    if other or container.objects:
        raise CloudRefused(
            f"container {name} isn't known to be this lab's, and is left alone",
            expected=f"none, an empty one, or one that is tagged {META_LAB}={lab}",
            found=f"{container.objects} objects, {container.bytes / 1e6:.1f} MB, "
            + (f"of the lab {other}" if other else "without a tag"),
            source=ctx.lab.source("object_store.container"),
            next_step="another name in lab.yaml (object_store.container)"
            + ("" if other else "; if it is yours: labctl adopt"),
        )
    stores.set_metadata(ctx.cloud, name, {META_LAB: lab})


def refuse_volume(ctx: Context, volume: Volume | None, server: Server | None) -> None:
    """Raises, before anything is made or deleted for it, where the volume is broken or another server's."""
    if volume is not None:
        volumes.refuse_if_broken(volume)
        volumes.refuse_if_used(ctx.cloud, volume, server)


def without_failure(ctx: Context, volume: Volume | None) -> Volume | None:
    """The volume; none where it is this lab's and an interrupted run left it when the cloud found no room for it.

    Such a volume was never anywhere: it is deleted, and the run makes another. A request more only in state error.
    """
    if volume is None or not ownership.tagged(volume, ctx.lab.lab):
        return volume
    why = volumes.never_placed(ctx.cloud, volume)
    if not why:
        return volume
    ctx.progress.note(f"volume {volume.name} was never made: {why} Another one is.")
    volumes.delete(ctx.cloud, volume, ctx.progress.tell)
    return None


def wait_active(ctx: Context, server: Server, step: Progress, again: Callable[[], Server] | None) -> Server:
    """The server once it is ACTIVE. `again` launches another one, once, where the cloud couldn't start this one."""
    try:
        return servers.wait_active(ctx.cloud, server.id, step.tell)
    except CloudRefused as refused:
        now = servers.get(ctx.cloud, server.id) if again else None
        if again is None or now is None or not never_ran(now):
            raise
        ctx.progress.note(f"{refused.what}: {refused.found} Once more, as --retry asks.")
        discard(ctx, now)
    return servers.wait_active(ctx.cloud, again().id, step.tell)


def never_ran(server: Server) -> bool:
    """Whether the cloud couldn't start it: nothing was ever in it, or attached to it."""
    return server.status == "ERROR" and not server.ran


def discard(ctx: Context, server: Server) -> None:
    """Delete a server that never ran."""
    servers.delete(ctx.cloud, server.id, ctx.progress.tell)


def provide_volume(ctx: Context, volume: Volume | None) -> Volume:
    """The lab's volume, made if there was none; a new one is empty, an existing one keeps its size and its data."""
    lab = ctx.lab
    with ctx.progress.step(f"volume {lab.volume_name}") as step:
        if volume is None:
            volume = volumes.create(
                ctx.cloud,
                lab.volume_name,
                lab.volume.size_gib,
                metadata={META_LAB: lab.lab},
                tell=step.tell,
            )
            step.result(f"{volume.size_gib} GiB, new")
        else:
            step.result(f"{volume.size_gib} GiB, {volume.status}")
    if note := volumes.size_note(volume, lab.volume.size_gib):
        ctx.progress.note(note)
    return volume


def attach(ctx: Context, server: Server, volume: Volume) -> Volume:
    """The volume attached to the server, which no other server may have."""
    if volume.status == "in-use" and volume.attached_to == server.id:
        return volume
    with ctx.progress.step(f"attach {volume.name}") as step:
        return volumes.attach(ctx.cloud, server, volume, step.tell)


def wait_for_login(ctx: Context, server: Server) -> None:
    """Until the server can be logged into."""
    with ctx.progress.step("login") as step:
        ssh.wait_for_login(ctx.login(server), step.tell)


# -- the host ------------------------------------------------------------------------------------------------------


def converge(ctx: Context, *, check: bool = False, only: Sequence[str] = ()) -> Outcome:
    """Bring what runs on the host to what lab.yaml says; with `check`, only say what would change."""
    return converge_host(ctx, existing_server(ctx), existing_volume(ctx), check=check, only=only)


def converge_host(
    ctx: Context,
    server: Server,
    volume: Volume,
    *,
    check: bool = False,
    only: Sequence[str] = (),
    never_format: bool = False,
    grow: bool = False,
) -> Outcome:
    """Run the roles on a host whose volume is attached. A credential that the host lacks is made first."""
    server = leases.watched(ctx, server, check=check)
    options: dict[str, Any] = {"tags": only, "check": check, "volume": volume}
    variables: dict[str, Any] = {"block_volume_format": "never"} if never_format else {}
    if grow:
        variables.update(block_volume_grow=True, block_volume_size_gib=volume.size_gib)
    if ctx.accept_volumes:
        variables["block_volume_accept_marker"] = ",".join(ctx.accept_volumes)
    if known := volume.metadata.get(META_HOST_KEY):
        # from the moment at which the role puts the volume's keys in place, also if this run is cut off there
        ssh.trust(ctx.login(server).known_hosts, server.id, [known])
    made = store_access.renewed(ctx, server, dry=check) if not only or "rclone" in only else None
    try:
        outcome = play(ctx, server, "converge.yml", variables, made=made, **options)
    except ansible.SecretNeeded:
        # the credential is as it should be, and the host lost what it knew of it
        made = store_access.renewed(ctx, server, anew=True)
        outcome = play(ctx, server, "converge.yml", variables, made=made, **options)
    if made and not check:
        servers.set_metadata(ctx.cloud, server.id, **store_access.tags(made))
        store_access.revoke(ctx, server, keep=made.id)
    if not check:
        remember_host_keys(ctx, server, volume, outcome.data.get("host_keys", []))
    return outcome


def remember_host_keys(ctx: Context, server: Server, volume: Volume, keys: Sequence[str]) -> None:
    """Put on record by which keys (`type base64`) the lab's host is known: here, and in the cloud for other machines.

    No request when all is on record. An RSA key is longer than the 255 characters that metadata may have.
    """
    if not keys:
        return
    ssh.trust(ctx.login(server).known_hosts, server.id, keys, no_others=True)
    short = sorted((key for key in keys if len(key) <= 255), key=lambda key: not key.startswith("ssh-ed25519 "))
    for tagged, set_metadata in ((volume, volumes.set_metadata), (server, servers.set_metadata)):
        if short and tagged.metadata.get(META_HOST_KEY) != short[0]:
            set_metadata(ctx.cloud, tagged.id, **{META_HOST_KEY: short[0]})


def play(
    ctx: Context,
    server: Server,
    playbook: str,
    variables: dict[str, Any] | None = None,
    *,
    made: Credential | None = None,
    tags: Sequence[str] = (),
    check: bool = False,
    volume: Volume | None = None,
) -> Outcome:
    """Run a playbook against the lab's host, telling its roles and tasks as they start.

    `made`: a credential for the object store that the host doesn't know yet.
    """
    volume = volume or find_volume(ctx)
    tagged = replace(server, metadata={**server.metadata, **store_access.tags(made)}) if made else server
    store = inventories.object_store(ctx.cloud, tagged)
    document = inventories.document(ctx.inventory_spec, tagged, volume, store)
    variables = dict(variables or {})
    secrets: dict[str, Any] = inventories.store_secret(made) if made and made.secret else {}
    if playbook == "converge.yml" and ctx.volume_credentials:
        secrets["mlflow_stack_credentials"] = ctx.volume_credentials
    run = Run(playbook, document, ctx.state / "logs", variables, secrets, tuple(tags), check, ctx.verbosity)
    with ctx.progress.step(playbook.removesuffix(".yml")) as step:

        def on_step(task: Step) -> None:
            step.tell(f"{task.role}: {task.name}" if task.role else task.name)

        outcome = ansible.run(run, on_step)
        verb = "would change" if check else "changed"
        step.result(f"ok={outcome.ok} {verb}={outcome.changed}")
    return outcome


def reattach_volume(ctx: Context) -> Verification:
    """After the VM was made anew: attach, prove that it is this lab's volume, mount, start, and read everything back.

    The server may have been made by hand: what it lacks (address, security group) it gets. Nothing is ever formatted.
    """
    existing_volume(ctx)
    existing_server(ctx)
    server, volume = provide(ctx)
    converge_host(ctx, server, volume, never_format=True)
    return verify(ctx)


def rebuild(ctx: Context, *, force: bool = False, new_lease: timedelta | None = None) -> Verification:
    """Replace the server by a new one at the same address; volume and container stay, and everything is read back.

    A server that an interrupted rebuild made is kept and finished, not replaced once more. `new_lease`: onto a lease
    that lasts so long, which is made before the old one is given up.
    """
    volume = existing_volume(ctx)
    server = find_server(ctx)
    refuse_volume(ctx, volume, server)
    if server is not None and server.metadata.get(META_REBUILD) == UNFINISHED and server.status != "ERROR":
        ctx.progress.note(
            f"Continuing the rebuild that made {server.name} ({server.id}); labctl down first for another."
        )
    elif server is not None:
        ownership.refuse_untagged(server, ctx.lab.lab)
        store_access.check(ctx, None)  # what the new server needs, before the old one goes
        lease = leases.renewed(ctx, server, new_lease) if new_lease is not None else None
        release_volume(ctx, server, volume, force=force)
        delete_server(ctx, server)
        if lease is not None:
            leases.end(ctx, keep=lease.id)
    server, volume = provide(ctx, **{META_REBUILD: UNFINISHED})
    converge_host(ctx, server, volume, never_format=True)
    found = verify(ctx)
    servers.set_metadata(ctx.cloud, server.id, **{META_REBUILD: FINISHED})
    return found


def verify(ctx: Context, *, write: bool = True) -> Verification:
    """Read back every probe run logged so far and, with `write`, log another one and read it back."""
    outcome = play(ctx, existing_server(ctx), "verify.yml", {"mlflow_stack_verify_write": write})
    found = outcome.data.get("verify", {})
    earlier = int(found.get("previous_runs", 0))
    return Verification(write, found.get("run_id", ""), found.get("artifact_sha256", ""), earlier, found)


def mount(ctx: Context) -> Outcome:
    """Mount the object store on the host."""
    return play(ctx, existing_server(ctx), "mount.yml")


def unmount(ctx: Context) -> Outcome:
    """Unmount the object store on the host, until `mount` or `converge`."""
    return play(ctx, existing_server(ctx), "unmount.yml")


# -- taking down ---------------------------------------------------------------------------------------------------


def drain(ctx: Context, *, force: bool = False) -> bool:
    """Stop what writes, flush, unmount. The host stays. False where there was no host to drain."""
    server = find_server(ctx)
    if server is None:
        ctx.progress.note(f"There is no server {ctx.lab.server_name}: nothing to drain.")
        return False
    return drain_host(ctx, server, force=force)


def drain_host(ctx: Context, server: Server, *, force: bool, volume: Volume | None = None) -> bool:
    """Drain a host, or have it agreed that it can't be: what its last seconds wrote is then not guaranteed.

    `volume`: the one that is mounted, where that isn't the one that lab.yaml names.
    """
    try:
        if server.status != "ACTIVE" or not server.address:
            raise HostUnreachable(f"{server.name} is {server.status}.", next_step="labctl status")
        with ctx.progress.step("login") as step:
            ssh.wait_for_login(ctx.login(server), step.tell, timeout=DRAIN_LOGIN_SECONDS)
        play(ctx, server, "drain.yml", volume=volume)
        return True
    except (HostUnreachable, ConvergeFailed) as error:
        question = (
            f"{error.what} It can't be drained: what it wrote in its last seconds may be missing from the volume"
            " (PostgreSQL and ext4 recover to a consistent state). Go on without?"
        )
        if force or (isinstance(error, HostUnreachable) and ctx.confirm(question)):
            ctx.progress.note(f"Going on without a drain: {error.what}")
            return False
        raise


def release_volume(ctx: Context, server: Server, volume: Volume | None, *, force: bool) -> None:
    """Drain the host and detach the volume from it; from one that can't be drained, the server's end detaches it."""
    if volume is None or volume.attached_to != server.id or not drain_host(ctx, server, force=force):
        return
    with ctx.progress.step(f"detach {volume.name}") as step:
        volumes.detach(ctx.cloud, server.id, volume, step.tell)


def delete_server(ctx: Context, server: Server) -> None:
    """Delete the server and the credential that only it had. Its address stays the lab's."""
    inventory_cache.forget(ctx.state)
    with ctx.progress.step(f"delete server {server.name}") as step:
        servers.delete(ctx.cloud, server.id, step.tell)
        store_access.revoke(ctx, server)


def down(ctx: Context, *, force: bool = False) -> None:
    """Delete the server, give its address back, end the lease that labctl made. Volume and container stay.

    What an earlier `down` that was cut off, or the end of a lease, has left is finished.
    """
    server = find_server(ctx)
    if server is None:
        ctx.progress.note(f"There is no server {ctx.lab.server_name}.")
        store_access.revoke(ctx, None)
    else:
        ownership.refuse_untagged(server, ctx.lab.lab)
        release_volume(ctx, server, find_volume(ctx), force=force)
        delete_server(ctx, server)
    leases.end(ctx)  # after the server, which it would delete without a drain
    with ctx.progress.step("floating IP"):
        networks.release_floating_ips(ctx.cloud, ctx.lab.lab)


# -- what is there -------------------------------------------------------------------------------------------------


def find_server(ctx: Context) -> Server | None:
    """The lab's server, or None; one that is being deleted, also by the end of its lease, is waited for."""
    return leases.outlived(ctx, _server(ctx))


def _server(ctx: Context) -> Server | None:
    server = servers.find(ctx.cloud, ctx.lab.server_name, ctx.progress.tell, lab=ctx.lab.lab)
    if server is not None:
        ownership.refuse_others(ctx.cloud, server, ctx.lab.lab)
    return server


def find_volume(ctx: Context) -> Volume | None:
    """The lab's volume, or None. Raises CloudRefused for one of its name that is somebody else's."""
    volume = volumes.find(ctx.cloud, ctx.lab.volume_name, lab=ctx.lab.lab)
    if volume is not None:
        ownership.refuse_others(ctx.cloud, volume, ctx.lab.lab)
    return volume


def existing_server(ctx: Context) -> Server:
    """The lab's server. Raises CloudRefused where there is none, or only somebody else's."""
    server = _server(ctx)
    if server is None:
        raise CloudRefused(
            f"There is no server {ctx.lab.server_name}.",
            source=ctx.lab.source("server.name"),
            next_step="labctl up, or labctl rebuild if its volume exists",
        )
    return server


def existing_volume(ctx: Context) -> Volume:
    """The lab's volume. Raises CloudRefused where there is none: no other volume is ever taken for it."""
    volume = find_volume(ctx)
    if volume is None:
        raise CloudRefused(
            f"There is no volume {ctx.lab.volume_name}.",
            source=ctx.lab.source("volume.name"),
            next_step="check the name in lab.yaml, or labctl up to begin with an empty volume",
        )
    return volume


def inventory_document(lab_file: Path | None) -> dict[str, Any]:
    """The dynamic inventory of the lab that a lab.yaml describes; the same that labctl itself runs Ansible with.

    Asked for again by the same process within seconds, it is the one of before, without a request. An error is never
    remembered.
    """
    path = labs.find_file(lab_file)
    ctx = Context(labs.load(path), Progress(Console(stderr=True, quiet=True)), lambda _: False)
    key = inventory_cache.key_of(path, ctx.site.clouds_file)
    document = inventory_cache.read(ctx.state, key) if key else None
    if document is None:
        document = inventories.build(ctx.cloud, ctx.inventory_spec)
        inventory_cache.write(ctx.state, key, document)
    return document
