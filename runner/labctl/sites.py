"""Clouds that labctl knows by name. A site is configuration only: every one of them is driven by the same code."""

from __future__ import annotations

import json
from pathlib import Path

from labctl.lab import Lab
from labctl.models import Site

SANDBOX = "sandbox"
CHAMELEON = "chameleon"
#: Keystone of each of Chameleon's sites: they know nothing of each other's application credentials.
KEYSTONES = {
    "KVM@TACC": "https://kvm.tacc.chameleoncloud.org:5000/v3",
    "CHI@TACC": "https://chi.tacc.chameleoncloud.org:5000/v3",
    "CHI@UC": "https://chi.uc.chameleoncloud.org:5000/v3",
}


def sandbox_state() -> Path:
    """The sandbox's state directory; `$LABCTL_SANDBOX_STATE` or another sandbox's name moves it."""
    from labctl.sandbox import SandboxConfig

    return SandboxConfig.from_environment().state


def _sandbox_needs_lease() -> bool:
    """Whether the sandbox was brought up with --require-lease."""
    try:
        return bool(json.loads((sandbox_state() / "settings.json").read_text()).get("require_lease"))
    except (OSError, ValueError):
        return False


def _file(named: str | None) -> Path | None:
    return Path(named).expanduser().absolute() if named else None


def site_of(lab: Lab) -> Site:
    """The site of a lab: its preset, changed by the `cloud` section of lab.yaml.

    chameleon: KVM@TACC has compute, network and volumes and demands leases; CHI@TACC has the object store.
    Entries of these names are looked up in clouds.yaml; without them the `OS_*` environment of an openrc is used.
    Any other name is an entry of clouds.yaml; whether it has leases is asked of its catalogue.
    """
    cloud = lab.cloud
    if lab.site == SANDBOX:
        preset = Site(
            name=SANDBOX,
            cloud="sandbox",
            object_cloud="sandbox-objects",
            clouds_file=sandbox_state() / "clouds.yaml",
            region="KVM@TACC",
            object_region="CHI@TACC",
            needs_lease=_sandbox_needs_lease(),
        )
    elif lab.site == CHAMELEON:
        preset = Site(
            name=CHAMELEON,
            cloud=None,
            object_cloud=None,
            region="KVM@TACC",
            object_region="CHI@TACC",
            needs_lease=True,
            volume_type="ceph-ssd",
        )
    else:
        preset = Site(name=lab.site, cloud=lab.site, object_cloud=lab.site, needs_lease=None)
    region, object_region = cloud.region or preset.region, cloud.object_region or preset.object_region
    known = KEYSTONES if lab.site == CHAMELEON else {}
    return Site(
        name=preset.name,
        cloud=cloud.compute_cloud or preset.cloud,
        object_cloud=cloud.object_cloud or preset.object_cloud,
        clouds_file=preset.clouds_file,
        region=region,
        object_region=object_region,
        network=cloud.network or preset.network,
        external_network=cloud.external_network or preset.external_network,
        needs_lease=preset.needs_lease if lab.lease.required is None else lab.lease.required,
        lease_extendable=lab.lease.extendable,
        volume_type=cloud.volume_type or preset.volume_type,
        credentials_file=_file(cloud.credentials),
        object_credentials_file=_file(cloud.object_credentials),
        auth_url=known.get(region or ""),
        object_auth_url=known.get(object_region or ""),
    )
