"""What a lab is like right now: the record behind `labctl status`, its table and its `--json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

#: A lease with less left than that is worth a warning.
LEASE_WARNING = timedelta(hours=48)
#: The same for the server's credential; from then on `up` and `converge` renew it (`cloud.credential.MARGIN`).
CREDENTIAL_WARNING = timedelta(days=7)


@dataclass(frozen=True)
class ServerStatus:
    """The server. `lease_ends` is ISO 8601 in UTC, or None where there is no lease."""

    name: str
    id: str | None = None
    status: str = "ABSENT"
    address: str | None = None
    lease_ends: str | None = None


@dataclass(frozen=True)
class VolumeStatus:
    """The block volume. `mounted` is None where the host could not be asked."""

    name: str
    id: str | None = None
    size_gib: int | None = None
    attached: bool = False
    mounted: bool | None = None
    filesystem_uuid: str | None = None


@dataclass(frozen=True)
class ObjectStoreStatus:
    """The container of the object store. `objects` is None where there is no such container."""

    container: str
    mounted: bool | None = None
    objects: int | None = None


@dataclass(frozen=True)
class MountStatus:
    """What the object mount shows (`layout`, `version`), what is wrong with it, and what rclone says of its work.

    `transfer`: bytes a second, bytes and files fetched from the store and held in the cache, errors; None where rclone
    doesn't run.
    """

    layout: str = ""
    version: str = ""
    error: str = ""
    transfer: dict[str, Any] | None = None


@dataclass(frozen=True)
class CredentialStatus:
    """What the server opens the object store with. `ends` is ISO 8601 in UTC, or None for never."""

    dialect: str
    ends: str | None = None


@dataclass(frozen=True)
class ServiceStatus:
    """A service: its address on the server's loopback (or opened to the network), its health and version."""

    url: str
    healthy: bool
    version: str
    note: str = ""


@dataclass(frozen=True)
class Status:
    """The whole lab. `host_error` says why the host could not be asked, where it could not."""

    lab: str
    site: str
    server: ServerStatus
    volume: VolumeStatus
    object_store: ObjectStoreStatus
    services: dict[str, ServiceStatus] = field(default_factory=dict)
    host_error: str = ""
    backup: dict[str, Any] = field(default_factory=dict)
    credential: CredentialStatus | None = None
    mount: MountStatus | None = None

    @property
    def healthy(self) -> bool:
        """Everything that `up` brings is there and works."""
        mounted = bool(self.volume.mounted) and bool(self.object_store.mounted)
        return mounted and bool(self.services) and all(service.healthy for service in self.services.values())

    def as_dict(self) -> dict[str, Any]:
        """The document of `status --json`."""
        return asdict(self)

    def with_host(self, host: dict[str, Any]) -> Status:
        """The same with what `host_probe` found on the server."""
        volume, store, view = host["volume"], host["object_store"], host.get("object_view", {})
        return Status(
            self.lab,
            self.site,
            self.server,
            VolumeStatus(
                **{
                    **asdict(self.volume),
                    "mounted": volume is not None,
                    "filesystem_uuid": volume["uuid"] if volume else None,
                }
            ),
            ObjectStoreStatus(
                self.object_store.container,
                store is not None,
                self.object_store.objects,
            ),
            {name: ServiceStatus(**service) for name, service in host["services"].items()},
            backup=host["backup"],
            credential=self.credential,
            mount=MountStatus(**{key: view[key] for key in ("layout", "version", "error", "transfer") if key in view}),
        )

    def rows(self) -> list[tuple[str, str]]:
        """The lines of the table that a person reads."""
        server, volume, store = self.server, self.volume, self.object_store
        rows = [
            ("lab", f"{self.lab} on {self.site}"),
            ("server", " ".join(part for part in (server.name, server.status, server.address) if part)),
            *([("lease", lease_text(server.lease_ends, datetime.now(UTC)))] if server.lease_ends else []),
            ("volume", _volume_text(volume)),
            ("object store", f"{store.container} {_count(store.objects)}, {_mounted(store.mounted)}"),
            *([("", text)] if (text := _transfer_text(self.mount)) else []),
        ]
        if text := credential_text(self.credential, datetime.now(UTC)):
            rows.append(("credential", text))
        for name, service in self.services.items():
            state = "healthy" if service.healthy else "NOT healthy"
            rows.append((name, " ".join(part for part in (service.url, service.version, state, service.note) if part)))
        if text := _backup_text(self.backup):
            rows.append(("backup", text))
        if self.host_error:
            rows.append(("host", self.host_error))
        return rows


def lease_text(ends: str, now: datetime) -> str:
    """When the lease ends (`ends`: ISO 8601, UTC), and a warning when that is soon."""
    moment = datetime.fromisoformat(ends)
    left = moment - now
    text = f"ends {moment:%Y-%m-%d %H:%M} UTC, {left_text(left)}"
    return text if left >= LEASE_WARNING else f"{text}. WARNING: the VM goes with it; labctl lease extend"


def credential_text(credential: CredentialStatus | None, now: datetime) -> str:
    """A warning when the server's credential for the object store ends soon, or has; else ""."""
    if credential is None or credential.ends is None:
        return ""
    left = datetime.fromisoformat(credential.ends) - now
    if left >= CREDENTIAL_WARNING:
        return ""
    ends = f"for the object store ends {credential.ends[:16].replace('T', ' ')} UTC, {left_text(left)}"
    return f"{ends}. WARNING: the mount goes with it; labctl up renews it"


def left_text(left: timedelta) -> str:
    """How long there is left, or that there is nothing."""
    minutes = int(left.total_seconds() // 60)
    if minutes <= 0:
        return "which is over"
    if minutes < 120:
        return f"in {minutes} min"
    return f"in {minutes // 60} h" if left < timedelta(days=4) else f"in {left.days} days"


def _volume_text(volume: VolumeStatus) -> str:
    if volume.id is None:
        return f"{volume.name} ABSENT"
    attached = "attached" if volume.attached else "not attached"
    return f"{volume.name} {volume.size_gib} GiB, {attached}, {_mounted(volume.mounted)}"


def _mounted(mounted: bool | None) -> str:
    return {True: "mounted", False: "NOT mounted", None: "mount unknown"}[mounted]


def _count(objects: int | None) -> str:
    return "ABSENT" if objects is None else f"{objects} objects"


def _transfer_text(mount: MountStatus | None) -> str:
    """What the mount shows and does; "" where nothing is known of it."""
    if mount is None:
        return ""
    parts = [f"shown as {mount.layout} {mount.version}".strip()] if mount.layout else []
    if found := mount.transfer:
        parts.append(f"reading {found['bytes_per_second'] / 1e6:.1f} MB/s")
        parts.append(f"fetched {found['fetched_files']} files ({found['fetched_bytes'] / 1e6:.1f} MB)")
        full = ", FULL" if found["cache_full"] else ""
        parts.append(f"cache {found['cached_files']} files ({found['cached_bytes'] / 1e6:.1f} MB{full})")
        parts.append(f"{found['errors']} errors" + (f", last: {found['last_error']}" if found["last_error"] else ""))
    return "; ".join([*parts, *([mount.error] if mount.error else [])])


def _backup_text(backup: dict[str, Any]) -> str:
    """When the next backup is, and how the last one from this server ended; "" where there is neither."""
    last = backup.get("last") or {}
    parts = [f"next {backup['next']}"] if backup.get("scheduled") else []
    if last:
        ended = f"{last['ended']}: {last['id']}" if last["ok"] else f"{last['ended']} FAILED: {last['error']}"
        parts.append(f"last {ended}")
    return "; ".join(parts)
