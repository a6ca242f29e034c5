"""How much room a project has left, asked before something is made that wouldn't fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from labctl.cloud.refusals import refusals
from labctl.cloud.session import Cloud


@dataclass(frozen=True)
class Room:
    """A limit of the project: what is used of how much; `limit` is None where there is none."""

    what: str
    used: int
    limit: int | None

    def fits(self, more: int) -> bool:
        """Whether that many more are allowed."""
        return self.limit is None or self.used + more <= self.limit

    def __str__(self) -> str:
        return f"{self.used} of {'any number' if self.limit is None else self.limit}"


def room(cloud: Cloud) -> dict[str, Room]:
    """Instances, cores, volumes, gigabytes (GiB of volumes) and floating IPs. Three requests."""
    with refusals("read the project's limits"):
        compute = cloud.compute.compute.get_limits().absolute
        storage = cloud.compute.block_storage.get_limits().absolute
        network = cloud.compute.network.get_quota(cloud.project_id, details=True)
    return {
        one.what: one
        for one in (
            _room("instances", compute.instances_used, compute.instances),
            _room("cores", compute.total_cores_used, compute.total_cores),
            _room("volumes", storage.total_volumes_used, storage.max_total_volumes),
            _room("gigabytes", storage.total_gigabytes_used, storage.max_total_volume_gigabytes),
            _room("floating IPs", *_used_of(network.floating_ips)),
        )
    }


def _used_of(quota: Any) -> tuple[int, int]:
    """Neutron's details: used and reserved count both."""
    return int(quota.get("used") or 0) + int(quota.get("reserved") or 0), int(quota["limit"])


def _room(what: str, used: int | None, limit: int | None) -> Room:
    return Room(what, int(used or 0), None if limit is None or int(limit) < 0 else int(limit))
