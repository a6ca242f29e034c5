"""How the server opens the object store: in which dialect, with which credential, and until when.

A credential belongs to one server. Its id stands in the server's metadata once the server has its secret, and nowhere
else is the secret kept. Two dialects: Swift with an application credential, which is narrow and ends; S3 with an EC2
key, which does what its user may do until it is revoked.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from labctl import by_hand
from labctl.cloud import META_CREDENTIAL, META_CREDENTIAL_ENDS, META_DIALECT, META_S3_KEY, ec2
from labctl.cloud import credential as credentials
from labctl.cloud import store as stores
from labctl.context import Context
from labctl.errors import CloudRefused, ConfigError
from labctl.models import Credential, Server
from labctl.status import CredentialStatus

SWIFT, S3, AUTO = "swift", "s3", "auto"


def dialect_of(server: Server) -> str:
    """What the server speaks with the store now."""
    return server.metadata.get(META_DIALECT) or SWIFT


def tags(made: Credential) -> dict[str, str]:
    """What a server is tagged with that has this credential's secret."""
    return {META_CREDENTIAL: made.id, META_DIALECT: made.dialect, META_CREDENTIAL_ENDS: _ends(made)}


def _ends(made: Credential) -> str:
    return f"{made.expires_at[:19]}Z" if made.expires_at else ""


def status_of(server: Server | None) -> CredentialStatus | None:
    """What `labctl status` says of it. No request."""
    if server is None or META_CREDENTIAL not in server.metadata:
        return None
    return CredentialStatus(dialect_of(server), server.metadata.get(META_CREDENTIAL_ENDS) or None)


@dataclass(frozen=True)
class Plan:
    """How the server gets its credential. `dialect` is "" where it has one that serves; `given` was made by hand."""

    dialect: str
    given: Credential | None = None


def check(ctx: Context, server: Server | None) -> Plan:
    """Settle how the server gets its credential, before anything is made; the answer holds for the whole command.

    Raises CloudRefused with page and click, or command, where the login may not make one and nobody gives one.
    """
    if ctx.store_plan is None:
        served = server is not None and serves(ctx, server)
        ctx.store_plan = Plan("") if served else _plan(ctx, server)
    return ctx.store_plan


def _plan(ctx: Context, server: Server | None, *, lost: bool = False) -> Plan:
    """`lost`: the server has no secret any more, so that what it had is of no use."""
    given = _from_file(ctx)
    if given is None:
        dialect = choose(ctx, server)
        said = _why_not(ctx, dialect)
        if not said:
            return Plan(dialect)
        if server is not None and not lost and (left := _in_use(ctx, server)) and credentials.lives(left, timedelta(0)):
            ctx.progress.note(f"{left.name} ends on {left.expires_at} (UTC), and this login may make no other: {said}.")
            return Plan("")
        given = by_hand.ask(ctx, dialect, said)
    if ctx.lab.object_store.dialect not in (AUTO, given.dialect):
        raise ConfigError(
            f"{given.name} is for the dialect {given.dialect}.",
            expected=f"one for {ctx.lab.object_store.dialect}",
            source=ctx.lab.source("object_store.dialect"),
            next_step=f"object_store: {{dialect: {given.dialect}}} in lab.yaml, or name another file",
        )
    given = by_hand.proved(ctx, given, _file_source(ctx))
    if given.expires_at and not credentials.lives(given):
        ctx.progress.note(f"{given.name} ends on {given.expires_at} (UTC): the object mount ends with it.")
    return Plan(given.dialect, given)


def _from_file(ctx: Context) -> Credential | None:
    """The credential in the file that lab.yaml names."""
    chosen = ctx.lab.object_store.credentials_file
    return by_hand.read(Path(chosen).expanduser().absolute(), _file_source(ctx)) if chosen else None


def _file_source(ctx: Context) -> str:
    return ctx.lab.source("object_store.credentials_file")


def _why_not(ctx: Context, dialect: str) -> str:
    """Why the login may not make a credential for the dialect; "" where it may. One request at most."""
    if dialect == S3:
        return ec2.may_be_made(ctx.cloud)
    login = credentials.of_store_login(ctx.cloud)
    if login is None or login.unrestricted:
        return ""
    return f"the login is the application credential {login.name}, which is restricted"


def serves(ctx: Context, server: Server) -> bool:
    """Whether the server's credential is the one that lab.yaml asks for, and lives long enough. One request.

    One that was made by hand serves to its end: only a person can make the next.
    """
    given, used = _from_file(ctx), _in_use(ctx, server)
    if used is None or (given is not None and given.id != used.id):
        return False
    return credentials.lives(used, credentials.MARGIN if credentials.is_ours(used, ctx.lab.lab) else timedelta(0))


def _in_use(ctx: Context, server: Server) -> Credential | None:
    """The server's credential, if it exists and is of a dialect that lab.yaml allows."""
    used, dialect = server.metadata.get(META_CREDENTIAL), dialect_of(server)
    if not used or ctx.lab.object_store.dialect not in (AUTO, dialect):
        return None
    if dialect == SWIFT:
        return next((one for one in credentials.list_all(ctx.cloud) if one.id == used), None)
    # a login that may ask for no key knows nothing of this one either: it is believed
    there = ec2.exists(ctx.cloud, used) or bool(ec2.may_be_made(ctx.cloud))
    return Credential(used, f"EC2 key {used}", None, None, S3) if there else None


def renewed(ctx: Context, server: Server, *, anew: bool = False, dry: bool = False) -> Credential | None:
    """A new credential, unless the server has one that serves. What was there before still works: see `revoke`.

    With `dry` none is made: what comes back has no secret, and stands for the one that would be.
    """
    if anew and ctx.store_plan == Plan(""):
        ctx.store_plan = _plan(ctx, server, lost=True)
    plan = check(ctx, server)
    if not plan.dialect:
        return None
    if dry:
        return Credential("the-one-that-converge-makes", "", None, dialect=plan.dialect)
    with ctx.progress.step("credential for the object store") as step:
        made = _make(ctx, server, plan)
        ctx.store_plan = Plan("")
        step.result(f"{made.dialect}, {f'ends {made.expires_at}' if made.expires_at else 'without an end'}")
    return made


def choose(ctx: Context, server: Server | None) -> str:
    """The dialect: lab.yaml's, else the one that the server has, else the first that a credential can be made for."""
    wanted: str = ctx.lab.object_store.dialect
    if wanted == AUTO and server is not None and META_CREDENTIAL in server.metadata:
        wanted = dialect_of(server)
    if wanted == S3 and not ec2.offered(ctx.cloud):
        raise ConfigError(
            f"The object store at {ctx.cloud.store.s3_endpoint} doesn't speak S3.",
            expected="an S3 answer from the host and port of the store's Swift API",
            source=ctx.lab.source("object_store.dialect"),
            next_step="object_store: {dialect: swift} in lab.yaml",
        )
    if wanted != AUTO:
        return wanted
    by_api = not credentials.is_restricted(ctx.cloud)
    return SWIFT if by_api or ec2.may_be_made(ctx.cloud) or not ec2.offered(ctx.cloud) else S3


def _make(ctx: Context, server: Server, plan: Plan) -> Credential:
    if plan.given is not None:
        return by_hand.proved_over_s3(ctx, plan.given, _file_source(ctx)) if plan.dialect == S3 else plan.given
    if plan.dialect == SWIFT:
        return credentials.create(ctx.cloud, ctx.lab.lab, server.id)
    made = ec2.create(ctx.cloud)
    try:
        _remember(ctx, [*s3_keys(ctx), made.id])
        by_hand.proved_over_s3(ctx, made, f"Keystone at {ctx.cloud.object_auth_url}")
    except BaseException:
        ec2.delete(ctx.cloud, made.id)  # nobody would know of it
        raise
    return made


def s3_keys(ctx: Context) -> list[str]:
    """The access keys that labctl made for the lab. One request."""
    container = stores.stat(ctx.cloud, ctx.lab.container_name)
    remembered = container.metadata.get(META_S3_KEY, "") if container else ""
    return [key for key in remembered.split(",") if key]


def _remember(ctx: Context, keys: list[str]) -> None:
    stores.set_metadata(ctx.cloud, ctx.lab.container_name, {META_S3_KEY: ",".join(keys)})


def revoke(ctx: Context, server: Server | None, *, keep: str = "") -> None:
    """Revoke what labctl made for the lab's servers, but `keep`. A login that may not is told of, and nothing stops.

    What a person made stays, and is named: labctl doesn't know what else it opens. `server`: None where it is gone.
    """
    ours, keys = credentials.list_ours(ctx.cloud, ctx.lab.lab), s3_keys(ctx)
    used = server.metadata.get(META_CREDENTIAL) if server else None
    again = ctx.store_plan.given.id if ctx.store_plan and ctx.store_plan.given else ""
    known = (keep, again, *(one.id for one in ours), *keys)
    if server and used and used not in known and _is_there(ctx, server, used):
        kind = "ec2 credentials" if dialect_of(server) == S3 else "application credential"
        ctx.progress.note(f"{used} wasn't made by labctl and stays: openstack {kind} delete {used}")
    for one in ours:
        if one.id != keep:
            try:
                credentials.delete(ctx.cloud, one.id)
            except CloudRefused as refused:
                ctx.progress.note(f"{refused.what}: {refused.found} It ends by itself on {one.expires_at}.")
    left = [key for key in keys if key == keep or not _revoke_key(ctx, key)]
    if left != keys:
        _remember(ctx, left)


def _is_there(ctx: Context, server: Server, used: str) -> bool:
    if dialect_of(server) == S3:
        return ec2.exists(ctx.cloud, used)
    return any(one.id == used for one in credentials.list_all(ctx.cloud))


def _revoke_key(ctx: Context, key: str) -> bool:
    try:
        ec2.delete(ctx.cloud, key)
        return True
    except CloudRefused as refused:
        ctx.progress.note(f"{refused.what}: {refused.found} It works until then: {refused.next_step}")
        return False
