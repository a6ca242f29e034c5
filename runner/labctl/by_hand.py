"""A credential for the object store that a person made, where the login may not make one: how to, and from where."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from labctl.cloud import credential as credentials
from labctl.cloud import ec2, logins, session
from labctl.cloud import store as stores
from labctl.context import Context
from labctl.credentials_file import pairs
from labctl.errors import CloudRefused, ConfigError
from labctl.models import Credential

#: What a file may call an id and its secret, by dialect: Horizon's openrc and ec2rc.sh, and AWS's own names.
NAMES = (
    ("swift", "OS_APPLICATION_CREDENTIAL_ID", "OS_APPLICATION_CREDENTIAL_SECRET"),
    ("s3", "EC2_ACCESS_KEY", "EC2_SECRET_KEY"),
    ("s3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
)
_KINDS = {"swift": "an application credential", "s3": "an EC2 key"}


def read(path: Path, source: str) -> Credential:
    """The credential in a file of Horizon's: an openrc, an ec2rc.sh or a clouds.yaml, with the mode 0600.

    Raises ConfigError for what isn't one; the text holds no secret.
    """
    text = logins.private_text(path, source)
    found = _from_clouds(text) if path.suffix in (".yaml", ".yml") else dict(pairs(text))
    for dialect, identity, secret in NAMES:
        if found.get(identity) and found.get(secret):
            return Credential(found[identity], f"{_KINDS[dialect]} from {path}", None, found[secret], dialect)
    password = any(key in found for key in ("OS_PASSWORD", "OS_USERNAME"))
    raise ConfigError(
        f"{path} holds no credential for the object store.",
        expected="; or ".join(f"{identity} and {secret}" for _, identity, secret in NAMES),
        found="a login by password, which stays on this machine and is never given to a server"
        if password
        else "none of these",
        source=source,
        next_step="download the openrc file of an application credential, or write these two lines",
    )


def _from_clouds(text: str) -> dict[str, str]:
    """The application credential of a clouds.yaml's only entry, by the names that an openrc has for it."""
    import yaml

    try:
        entries = list((yaml.safe_load(text) or {}).get("clouds", {}).values())
        auth: Any = entries[0].get("auth", {}) if len(entries) == 1 else {}
    except (yaml.YAMLError, AttributeError):
        return {}
    return {f"OS_{key.upper()}": str(value) for key, value in auth.items()}


def how_to(ctx: Context, dialect: str) -> str:
    """The steps that make one, with this site's page or the command."""
    cloud = ctx.cloud
    page = logins.horizon_page(cloud.object_auth_url)
    if dialect == "s3":
        made = f"openstack ec2 credentials create --project {cloud.store.project_id}"
        return (
            f"with a login by password or token at {cloud.object_region}: {made}; EC2_ACCESS_KEY=… and EC2_SECRET_KEY=…"
        )
    roles = [role for role in credentials.ROLES if role in cloud.store.roles] or list(cloud.store.roles)
    ends = (datetime.now(UTC) + credentials.LIFETIME).strftime("%Y-%m-%dT%H:%M:%S")
    name = f"labctl-{ctx.lab.lab}-by-hand"
    if page:
        return (
            f"open {page}, Create Application Credential: name {name}, expiration date {ends[:10]}, roles "
            f"{' and '.join(roles)}, Unrestricted not ticked; Create, Download openrc file"
        )
    chosen = " ".join(f"--role {role}" for role in roles)
    command = f"openstack application credential create {chosen} --expiration {ends} {name}"
    return f"with a login by password or token: {command}"


def ask(ctx: Context, dialect: str, said: str) -> Credential:
    """Walk the person at the terminal through making one and take it; CloudRefused with the steps if nobody is there.

    `said`: why labctl can't make it.
    """
    if ctx.prompt is None:
        raise CloudRefused(
            f"The login may not make {_KINDS[dialect]} for the server.",
            expected="a login by password or token" + ("" if dialect == "s3" else ", or an unrestricted one of these"),
            found=said,
            source=f"login at {ctx.cloud.object_auth_url}",
            next_step=f"{how_to(ctx, dialect)}; chmod 600 the file and name it in lab.yaml: "
            "object_store: {credentials_file: FILE}",
        )
    ctx.progress.note(
        f"The server needs {_KINDS[dialect]} for the object store, and this login may not make one ({said}). "
        f"Make it by hand: {how_to(ctx, dialect)}. Then give it here; the secret isn't shown."
    )
    identity = ctx.prompt("Access key: " if dialect == "s3" else "ID: ", False).strip()
    secret = ctx.prompt("Secret: ", True).strip()
    if not identity or not secret:
        raise ConfigError("No credential was given.", next_step="run the same command again")
    return Credential(identity, f"{_KINDS[dialect]} made by hand", None, secret, dialect)


def proved(ctx: Context, given: Credential, source: str) -> Credential:
    """The credential with its name and end, once it has opened the store. Raises CloudRefused for another."""
    if given.dialect == "s3":
        return proved_over_s3(ctx, given, source, container_is_there=False)
    cloud = ctx.cloud
    login = session.by_application_credential(cloud, given.id, str(given.secret), source)
    if login.project_id != cloud.store.project_id:
        raise _unusable(ctx, given, source, f"project {login.project_id}", f"project {cloud.store.project_id}")
    answer = stores.head(login.connection, ctx.lab.container_name)
    if answer not in (200, 204, 404):
        roles = ", ".join(login.roles)
        raise _unusable(
            ctx, given, source, f"HTTP {answer} from the store, roles {roles}", "a role that opens the store"
        )
    return Credential(given.id, login.credential.name, login.credential.expires_at, given.secret)


def proved_over_s3(ctx: Context, given: Credential, source: str, *, container_is_there: bool = True) -> Credential:
    """The same for an EC2 key; before the container is made, only that the store knows the key."""
    said = ec2.refusal(ctx.cloud, given, ctx.lab.container_name)
    if said and (container_is_there or "NoSuchBucket" not in said):
        raise _unusable(ctx, given, source, said, f"an EC2 key of project {ctx.cloud.store.project_id}")
    return given


def _unusable(ctx: Context, given: Credential, source: str, found: str, expected: str) -> CloudRefused:
    return CloudRefused(
        f"{given.name} doesn't open the object store.",
        expected,
        found,
        source,
        f"make another: {how_to(ctx, given.dialect)}",
    )
