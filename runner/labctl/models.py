"""What a cloud holds, as plain records: the words that `cloud`, `lifecycle` and `status` share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

#: Called with a short sentence while something is waited for ("server node-persist-ada is BUILD, 4 s").
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Site:
    """How to reach a cloud. What differs between clouds is here, and nowhere else.

    `clouds_file` and `cloud`/`object_cloud` name entries of a clouds.yaml; where `clouds_file` is None the
    usual search path applies, and where `cloud` is None the `OS_*` environment does. `credentials_file` and
    `object_credentials_file` win over them. The auth URLs are those of a site that is known by name. `needs_lease` and
    `lease_extendable` are None where only the cloud itself can tell.
    """

    name: str
    cloud: str | None
    object_cloud: str | None
    clouds_file: Path | None = None
    region: str | None = None
    object_region: str | None = None
    network: str = "sharednet1"
    external_network: str = "public"
    needs_lease: bool | None = False
    lease_extendable: bool | None = None
    volume_type: str | None = None
    credentials_file: Path | None = None
    object_credentials_file: Path | None = None
    auth_url: str | None = None
    object_auth_url: str | None = None


@dataclass(frozen=True)
class Server:
    """A server as the compute API shows it; `address` is its floating IP, `flavor` its flavor's name.

    `ran`: whether it was ever started; one in ERROR that wasn't found no host, say, and holds nothing. `zone` is its
    availability zone.
    `user_id` made it, at `created` (the API's own text); `image_id` is None for one that boots from a volume.
    """

    id: str
    name: str
    status: str
    address: str | None
    fixed_address: str | None
    key_name: str | None
    metadata: dict[str, str] = field(default_factory=dict)
    fault: str = ""
    flavor: str = ""
    ran: bool = True
    zone: str = ""
    user_id: str = ""
    image_id: str | None = None
    created: str = ""


@dataclass(frozen=True)
class Volume:
    """A block volume; `attached_to` is a server's id, `device` the cloud's idea of its path, `zone` where it lies.

    `user_id` made it, at `created` (the API's own text).
    """

    id: str
    name: str
    size_gib: int
    status: str
    attached_to: str | None
    device: str | None
    metadata: dict[str, str] = field(default_factory=dict)
    zone: str = ""
    user_id: str = ""
    created: str = ""


@dataclass(frozen=True)
class Container:
    """A container of the object store; `bytes` is its content's size."""

    name: str
    objects: int
    bytes: int
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Reservation:
    """What a lease reserves: `amount` servers of a flavor, whose name and id are those that were asked for."""

    id: str
    status: str
    kind: str
    flavor: str
    flavor_id: str
    amount: int

    @property
    def launch_flavor(self) -> str:
        """The private flavor that Blazar makes: a server launched with it is within the lease."""
        return f"reservation:{self.id}"


@dataclass(frozen=True)
class Lease:
    """A lease of Blazar's. `starts` and `ends` are aware and in UTC."""

    id: str
    name: str
    status: str
    starts: datetime
    ends: datetime
    user_id: str
    project_id: str
    reservations: tuple[Reservation, ...] = ()


@dataclass(frozen=True)
class Credential:
    """What opens the object store: an application credential (`swift`), or an EC2 key pair (`s3`), whose id is its
    access key. `expires_at` is ISO 8601 in UTC, None for never; `secret` is known only to whoever made it."""

    id: str
    name: str
    expires_at: str | None
    secret: str | None = field(default=None, repr=False)
    dialect: str = "swift"


@dataclass(frozen=True)
class Rule:
    """An ingress rule of a security group: TCP, one port (1-65535), one source network."""

    port: int
    cidr: str = "0.0.0.0/0"


@dataclass(frozen=True)
class SecurityGroup:
    """A security group that a lab wants to exist with at least these rules."""

    name: str
    rules: tuple[Rule, ...]
    description: str = ""
