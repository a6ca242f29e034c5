"""How the server opens the object store: in which dialect, with which credential, and until when.

A credential belongs to one server. Its id stands in the server's metadata once the server has its secret, and nowhere
else is the secret kept. Two dialects: Swift with an application credential, which is narrow and ends; S3 with an EC2
key, which does what its user may do until it is revoked.
"""

from __future__ import annotations

from labctl.cloud import META_CREDENTIAL, META_DIALECT, META_S3_KEY, ec2
from labctl.cloud import credential as credentials
from labctl.cloud import store as stores
from labctl.context import Context
from labctl.errors import CloudRefused, ConfigError
from labctl.models import Credential, Server

SWIFT, S3, AUTO = "swift", "s3", "auto"


def dialect_of(server: Server) -> str:
    """What the server speaks with the store now."""
    return server.metadata.get(META_DIALECT) or SWIFT


def tags(made: Credential) -> dict[str, str]:
    """What a server is tagged with that has this credential's secret."""
    return {META_CREDENTIAL: made.id, META_DIALECT: made.dialect}


def serves(ctx: Context, server: Server) -> bool:
    """Whether the server's credential is of the dialect that lab.yaml asks for, and lives long enough. One request."""
    used, dialect = server.metadata.get(META_CREDENTIAL), dialect_of(server)
    if not used or ctx.lab.object_store.dialect not in (AUTO, dialect):
        return False
    if dialect == S3:
        return ec2.exists(ctx.cloud, used)
    return any(one.id == used and credentials.lives(one) for one in credentials.list_all(ctx.cloud))


def renewed(ctx: Context, server: Server, *, anew: bool = False, check: bool = False) -> Credential | None:
    """A new credential, unless the server has one that serves. What was there before still works: see `revoke`.

    With `check` none is made: what comes back has no secret, and stands for the one that would be.
    """
    if not anew and serves(ctx, server):
        return None
    if check:
        return Credential("the-one-that-converge-makes", "", None, dialect=choose(ctx, server))
    with ctx.progress.step("credential for the object store") as step:
        made = _make(ctx, server, choose(ctx, server))
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


def _make(ctx: Context, server: Server, dialect: str) -> Credential:
    if dialect == SWIFT:
        return credentials.create(ctx.cloud, ctx.lab.lab, server.id)
    made = ec2.create(ctx.cloud)
    try:
        _remember(ctx, [*s3_keys(ctx), made.id])
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


def revoke(ctx: Context, *, keep: str = "") -> None:
    """Revoke what labctl made for the lab's servers, but `keep`. A login that may not is told of, and nothing stops."""
    for one in credentials.list_ours(ctx.cloud, ctx.lab.lab):
        if one.id != keep:
            try:
                credentials.delete(ctx.cloud, one.id)
            except CloudRefused as refused:
                ctx.progress.note(f"{refused.what}: {refused.found} It ends by itself on {one.expires_at}.")
    keys = s3_keys(ctx)
    left = [key for key in keys if key == keep or not _revoke_key(ctx, key)]
    if left != keys:
        _remember(ctx, left)


def _revoke_key(ctx: Context, key: str) -> bool:
    try:
        ec2.delete(ctx.cloud, key)
        return True
    except CloudRefused as refused:
        ctx.progress.note(f"{refused.what}: {refused.found} It works until then: {refused.next_step}")
        return False
