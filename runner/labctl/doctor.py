"""Everything that has to be right before a lab can come up, looked at without making anything.

Each check says what it found and, where that isn't enough, the next thing to do. A check that can't be made because an
earlier one failed is left out.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from labctl import clock
from labctl.errors import LabctlError

OK, WARNING, FAILED = "ok", "warning", "failed"
#: A credential that ends sooner is worth a word.
ENDS_SOON = timedelta(days=7)
#: Seconds for a first answer from sshd.
LOGIN_SECONDS = 10


@dataclass(frozen=True)
class Finding:
    """The outcome of one check. `exit_code` is what the error would have ended a command with."""

    check: str
    state: str
    found: str
    next_step: str = ""
    exit_code: int = 0


def failed(check: str, error: LabctlError) -> Finding:
    """A finding from what labctl itself would have said."""
    said = " ".join(part for part in (error.what, error.found and f"found: {error.found}") if part)
    return Finding(check, FAILED, said, error.next_step, error.exit_code)


def examine(make_context: Callable[[], Any]) -> Iterator[Finding]:
    """Check after check. `make_context` reads lab.yaml."""
    yield from _tools()
    try:
        ctx = make_context()
    except LabctlError as error:
        yield failed("lab.yaml", error)
        return
    yield Finding("lab.yaml", OK, f"lab {ctx.lab.lab} on {ctx.site.name}")
    yield _key(ctx)
    try:
        cloud = ctx.cloud
    except LabctlError as error:
        yield failed("compute login", error)
        return
    yield Finding("compute login", OK, f"project {cloud.project_id} at {cloud.auth_url}, region {cloud.region}")
    for check, examined in (
        ("clock", _clock),
        ("object store login", _store),
        ("credential", _credential),
        ("store credential", _store_credential),
        ("image, flavor, network", _choices),
        ("quota", _quota),
        ("images", lambda ctx: Finding("images", OK, ", ".join(sorted(ctx.images.references)))),
        ("server", _server),
    ):
        try:
            yield examined(ctx)
        except LabctlError as error:
            yield failed(check, error)


def _tools() -> Iterator[Finding]:
    missing = [name for name in ("ssh", "ssh-keygen") if shutil.which(name) is None]
    if missing:
        yield Finding("tools", FAILED, f"not in PATH: {', '.join(missing)}", "install the package openssh-client", 2)
    else:
        yield Finding("tools", OK, "ssh, ssh-keygen")


def _key(ctx: Any) -> Finding:
    key: Path = ctx.ssh_key
    if not key.exists():
        return Finding("SSH key", OK, f"{key}: made by the first labctl up")
    mode = key.stat().st_mode & 0o777
    if mode & 0o077:
        return Finding("SSH key", FAILED, f"{key} is readable by others ({mode:04o})", f"chmod 600 {key}", 2)
    if not os.access(key, os.R_OK):
        return Finding("SSH key", FAILED, f"{key} can't be read", f"check the owner of {key}", 2)
    return Finding("SSH key", OK, str(key))


def _clock(ctx: Any) -> Finding:
    """By the time at which Keystone says that it issued the token."""
    skew = ctx.cloud.clock_skew
    if abs(skew) > clock.NOTICEABLE:
        off = f"{clock.skew_text(skew)} of the cloud's"
        return Finding("clock", FAILED, off, "set it: timedatectl set-ntp true", 2)
    return Finding("clock", OK, "agrees with the cloud's")


def _store(ctx: Any) -> Finding:
    from labctl.cloud import store

    store.stat(ctx.cloud, ctx.lab.container_name)
    return Finding("object store login", OK, f"{ctx.cloud.object_auth_url}, region {ctx.cloud.object_region}")


def _credential(ctx: Any) -> Finding:
    """The kinds of login, and for an application credential how long it lives and what it may do."""
    from labctl.cloud import credential

    used = {"compute": credential.of_login(ctx.cloud), "object store": credential.of_store_login(ctx.cloud)}
    if used["compute"] == used["object store"]:
        used = {"both": used["compute"]}
    said, steps = [], []
    for place, one in used.items():
        if one is None:
            said.append(f"{place}: password or token")
            continue
        kind = "unrestricted" if one.unrestricted else "restricted, so it may make neither leases nor credentials"
        said.append(f"{place}: application credential {one.name}, {kind}, ends {one.expires_at or 'never'}")
        if not one.unrestricted or not _lasts(one.expires_at):
            steps.append(ctx.cloud.login_help if place != "object store" else ctx.cloud.store_login_help)
    return Finding("credential", WARNING if steps else OK, "; ".join(said), steps[0] if steps else "")


def _lasts(ends: str | None) -> bool:
    return ends is None or datetime.fromisoformat(ends).replace(tzinfo=UTC) - datetime.now(UTC) >= ENDS_SOON


def _store_credential(ctx: Any) -> Finding:
    """What the server opens the store with, or will; nothing is made or asked for."""
    from labctl import store_access
    from labctl.cloud import server

    ctx.prompt = None
    found = server.find(ctx.cloud, ctx.lab.server_name)
    plan = store_access.check(ctx, found)
    if plan.given is not None:
        ends = plan.given.expires_at
        state = OK if _lasts(ends) else WARNING
        return Finding("store credential", state, f"{plan.given.name}, {plan.dialect}, ends {ends or 'never'}")
    if plan.dialect or found is None:
        return Finding("store credential", OK, f"{plan.dialect}, made by labctl up")
    return Finding("store credential", OK, f"{store_access.dialect_of(found)}, the server has one that serves")


def _choices(ctx: Any) -> Finding:
    from labctl.cloud import server

    server.check_choices(ctx.cloud, ctx.lab.server.image, ctx.lab.server.flavor, ctx.site.network)
    return Finding("image, flavor, network", OK, f"{ctx.lab.server.image}, {ctx.lab.server.flavor}, {ctx.site.network}")


def _quota(ctx: Any) -> Finding:
    """Only what the lab doesn't have yet has to fit."""
    from labctl.cloud import quota, server, volume

    has_server = server.find(ctx.cloud, ctx.lab.server_name, lab=ctx.lab.lab) is not None
    has_volume = volume.find(ctx.cloud, ctx.lab.volume_name, lab=ctx.lab.lab) is not None
    rooms = quota.room(ctx.cloud)
    needed = {} if has_server else {"instances": 1, "floating IPs": 1}
    needed |= {} if has_volume else {"volumes": 1, "gigabytes": ctx.lab.volume.size_gib}
    full = [f"{what} ({rooms[what]})" for what, more in needed.items() if not rooms[what].fits(more)]
    if full:
        advice = "delete what the project doesn't need, or ask the site for more"
        return Finding("quota", FAILED, f"used up: {', '.join(full)}", advice, 3)
    return Finding("quota", OK, "; ".join(f"{what} {one}" for what, one in rooms.items()))


def _server(ctx: Any) -> Finding:
    from labctl import ssh
    from labctl.cloud import server

    found = server.find(ctx.cloud, ctx.lab.server_name, lab=ctx.lab.lab)
    if found is None:
        return Finding("server", OK, f"no {ctx.lab.server_name} yet")
    ssh.wait_for_login(ctx.login(found), lambda _: None, timeout=LOGIN_SECONDS)
    return Finding("server", OK, f"{found.name} {found.status}, {found.address} can be logged into")


def as_document(findings: list[Finding]) -> dict[str, Any]:
    """The document of `doctor --json`."""
    healthy = all(one.state != FAILED for one in findings)
    return {"healthy": healthy, "checks": [asdict(one) for one in findings]}
