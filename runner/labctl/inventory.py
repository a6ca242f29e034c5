"""What the cloud holds, as an Ansible inventory: one group `labctl`, one host, the variables that the roles read."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labctl import ssh
from labctl.errors import CloudRefused
from labctl.models import Credential, Server, Volume

if TYPE_CHECKING:
    from labctl.cloud.session import Cloud

#: The group that the playbooks name as their hosts.
GROUP = "labctl"
#: The images that run on the volume.
STACK_IMAGES = ("mlflow", "postgres", "s3", "jupyter", "postgres-15", "postgres-16", "postgres-17", "postgres-18")
#: A connection outlives a run, so that the next command of a session needs no new handshake.
_SSH_OPTIONS = (
    *("-o", "StrictHostKeyChecking=accept-new", "-o", "IdentitiesOnly=yes", "-o", "ConnectTimeout=10"),
    *("-o", "ControlMaster=auto", "-o", "ControlPersist=120s"),
)


@dataclass(frozen=True)
class InventorySpec:
    """What lab.yaml and the site say about the host; the rest is asked of the cloud.

    `services_open`: the services listen on all addresses rather than on 127.0.0.1. `extra`: more host variables,
    which win over the others. `credential_id` overrides the one in the server's metadata.
    """

    lab: str
    site: str
    server: str
    volume: str
    container: str
    ssh_key: Path
    known_hosts: Path
    user: str = "cc"
    volume_mount_point: str = "/mnt/block"
    object_mount_point: str = "/mnt/object"
    object_view_parent: str = "/srv/labctl/mnt"
    object_view: str = "Food-11"
    rclone_remote: str = "chi_tacc"
    ports: Mapping[str, int] = field(default_factory=dict)
    services_open: bool = False
    allowed_hosts: tuple[str, ...] = ()
    images: Mapping[str, str] = field(default_factory=dict)
    s3_flavour: str = ""
    insecure_registries: tuple[str, ...] = ()
    registry_mirrors: tuple[str, ...] = ()
    dataset: Mapping[str, Any] | None = None
    layout: str = ""
    credential_id: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ObjectStore:
    """Where the host finds the object store: Keystone's URL and the region for Swift, or an endpoint for S3."""

    auth_url: str
    region: str
    s3_endpoint: str = ""
    s3_provider: str = ""


def object_store(cloud: Cloud, server: Server) -> ObjectStore:
    """The store as the server needs it. No request for Swift; for S3 a login at the store's site."""
    from labctl.cloud import META_DIALECT, ec2

    if server.metadata.get(META_DIALECT) == "s3":
        return ObjectStore(cloud.object_auth_url, ec2.REGION, cloud.store.s3_endpoint, cloud.store.s3_provider)
    return ObjectStore(cloud.object_auth_url, cloud.object_region)


def store_secret(made: Credential) -> dict[str, Any]:
    """The secret of a new credential, by the name that the role has for it."""
    name = "rclone_s3_secret_access_key" if made.dialect == "s3" else "rclone_application_credential_secret"
    return {name: made.secret}


def build(cloud: Cloud, spec: InventorySpec, *, allow_missing: bool = False) -> dict[str, Any]:
    """The inventory as the document of a dynamic inventory (`--list`), from two requests, whatever the project holds.

    Raises CloudRefused when the cloud refuses or doesn't answer: never an empty inventory instead. Without a server,
    or one without an address, it raises too, unless `allow_missing`: then the group has no host.
    """
    from labctl.cloud import server, volume

    found = server.find(cloud, spec.server, lab=spec.lab)
    if found is None or found.address is None:
        if allow_missing:
            return empty()
        raise _missing(spec, found)
    return document(spec, found, volume.find(cloud, spec.volume, lab=spec.lab), object_store(cloud, found))


def empty() -> dict[str, Any]:
    """The inventory of a lab that has no server."""
    return {"_meta": {"hostvars": {}}, "all": {"children": [GROUP]}, GROUP: {"hosts": []}}


def document(spec: InventorySpec, server: Server, volume: Volume | None, store: ObjectStore) -> dict[str, Any]:
    """The inventory from what is known already, without a request. Raises CloudRefused for a server without address."""
    from labctl.cloud import META_HOST_KEY, META_LEASE_ENDS

    if server.address is None:
        raise _missing(spec, server)
    if key := server.metadata.get(META_HOST_KEY):
        ssh.trust(spec.known_hosts, server.id, [key])
    variables = {
        "ansible_host": server.address,
        "ansible_user": spec.user,
        "ansible_ssh_private_key_file": str(spec.ssh_key),
        "ansible_ssh_common_args": shlex.join(_ssh_options(spec, server)),
        # a connection left open to an earlier server of this address is nobody's business
        "ansible_control_path": f"%(directory)s/labctl-{server.id[:18]}",
        "labctl_lab": spec.lab,
        "labctl_site": spec.site,
        "docker_user": spec.user,
        "docker_data_mount": spec.volume_mount_point,
        "docker_insecure_registries": list(spec.insecure_registries),
        "docker_registry_mirrors": list(spec.registry_mirrors),
        **_volume_variables(spec, volume),
        **_rclone_variables(spec, server, store),
        **_service_variables(spec, server.address),
        "lease_guard_ends": server.metadata.get(META_LEASE_ENDS),
        "lease_guard_data_dir": spec.volume_mount_point,
        **spec.extra,
    }
    return {
        "_meta": {"hostvars": {server.name: {key: value for key, value in variables.items() if _said(value)}}},
        "all": {"children": [GROUP]},
        GROUP: {"hosts": [server.name]},
    }


def _ssh_options(spec: InventorySpec, server: Server) -> tuple[str, ...]:
    """A host key is remembered by the server's id: its address may be another server's tomorrow."""
    return ("-o", f"UserKnownHostsFile={spec.known_hosts}", "-o", f"HostKeyAlias={server.id}", *_SSH_OPTIONS)


def _volume_variables(spec: InventorySpec, volume: Volume | None) -> dict[str, Any]:
    from labctl.cloud import META_BACKUP_KEEP, META_BACKUP_SCHEDULE

    remembered = volume.metadata if volume else {}
    return {
        "backup_schedule": remembered.get(META_BACKUP_SCHEDULE),
        "backup_keep": remembered.get(META_BACKUP_KEEP),
        "block_volume_id": volume.id if volume else None,
        "block_volume_mount_point": spec.volume_mount_point,
        "block_volume_owner": spec.user,
        "block_volume_lab": spec.lab,
        "block_volume_host_keys": True,
    }


def _rclone_variables(spec: InventorySpec, server: Server, store: ObjectStore) -> dict[str, Any]:
    from labctl.cloud import META_CREDENTIAL, META_DIALECT

    dialect = server.metadata.get(META_DIALECT) or "swift"
    identity = spec.credential_id or server.metadata.get(META_CREDENTIAL)
    if dialect == "s3":
        reached = {
            "rclone_s3_provider": store.s3_provider,
            "rclone_s3_endpoint": store.s3_endpoint,
            "rclone_s3_access_key_id": identity,
        }
    else:
        reached = {"rclone_auth_url": store.auth_url, "rclone_application_credential_id": identity}
    return {
        "rclone_remote": spec.rclone_remote,
        "rclone_remote_type": dialect,
        "rclone_region": store.region,
        **reached,
        "rclone_container": spec.container,
        "rclone_mount_point": spec.object_mount_point,
        "rclone_views": [f"{spec.object_view_parent}/{spec.object_view}"],
    }


def _service_variables(spec: InventorySpec, address: str) -> dict[str, Any]:
    return {
        "mlflow_stack_data_dir": spec.volume_mount_point,
        "mlflow_stack_images": _chosen(spec.images, STACK_IMAGES),
        "mlflow_stack_ports": dict(spec.ports),
        "mlflow_stack_bind_address": "0.0.0.0" if spec.services_open else "127.0.0.1",  # noqa: S104 (lab.yaml asks)
        # by its address a user reaches MLflow once lab.yaml opens it; MLflow would answer 403 otherwise
        "mlflow_stack_allowed_hosts": [address, *(host for host in spec.allowed_hosts if host != address)],
        "mlflow_stack_s3_flavour": spec.s3_flavour,
        "mlflow_stack_object_view_parent": spec.object_view_parent,
        "etl_container": spec.container,
        "etl_dataset": dict(spec.dataset) if spec.dataset else None,
        "etl_layout": spec.layout,
    }


def _chosen(images: Mapping[str, str], names: tuple[str, ...]) -> dict[str, str]:
    return {name: images[name] for name in names if name in images}


def _said(value: Any) -> bool:
    """Whether a variable goes to the host: what isn't known is left out, so that a role's default applies."""
    return value is not None and value not in ("", [], {})


def _missing(spec: InventorySpec, server: Server | None) -> CloudRefused:
    return CloudRefused(
        f"the lab {spec.lab} has no server" if server is None else f"server {server.name} has no floating IP",
        expected=f"server {spec.server} with a floating IP",
        found="none of that name" if server is None else f"{server.id}, {server.status}, without one",
        source=f"site {spec.site}",
        next_step="labctl up",
    )
