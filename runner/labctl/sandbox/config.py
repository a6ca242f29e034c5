"""What makes one sandbox this one and not another: its name, addresses and folders."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from labctl.errors import ConfigError

DEFAULT_NAME = "labctl-sandbox"
DEFAULT_PREFIX = "172.29"
_PREFIX = re.compile(r"(10\.\d{1,3}|172\.(1[6-9]|2\d|3[01])|192\.168)")

#: On every Docker object that labctl's sandbox makes, images included.
LABEL = "labctl.sandbox=1"


@dataclass(frozen=True)
class SandboxConfig:
    """Names and addresses of one sandbox; several can run side by side if all three fields differ.

    `prefix` is the first half of its addresses: PREFIX.0.0/24 is the servers' network, PREFIX.1.0/24 has the
    floating IPs. `state` holds volumes, registry, credentials and logs.
    """

    name: str = DEFAULT_NAME
    prefix: str = DEFAULT_PREFIX
    state: Path = Path("/var/lib/labctl-sandbox")

    @classmethod
    def from_environment(cls) -> SandboxConfig:
        """`$LABCTL_SANDBOX_NAME`, `$LABCTL_SANDBOX_SUBNET_PREFIX` and `$LABCTL_SANDBOX_STATE`, each with a default.

        Raises ConfigError if the name isn't usable for containers or the prefix isn't private (RFC 1918).
        """
        name = os.environ.get("LABCTL_SANDBOX_NAME", DEFAULT_NAME)
        prefix = os.environ.get("LABCTL_SANDBOX_SUBNET_PREFIX", DEFAULT_PREFIX)
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,40}", name):
            raise ConfigError(
                "the sandbox's name can't be used for containers",
                expected="a small letter, then at most 40 small letters, digits or dashes",
                found=name,
                source="LABCTL_SANDBOX_NAME",
            )
        if not _PREFIX.fullmatch(prefix) or any(int(part) > 255 for part in prefix.split(".")):
            raise ConfigError(
                "the sandbox's addresses must be private ones",
                expected="the first two numbers of a private network, such as 172.29",
                found=prefix,
                source="LABCTL_SANDBOX_SUBNET_PREFIX",
            )
        default_state = Path("/var/lib") / name
        state = Path(os.environ.get("LABCTL_SANDBOX_STATE") or default_state).expanduser().absolute()
        return cls(name, prefix, state)

    @property
    def own_label(self) -> str:
        """On every container and network of this sandbox, and on no other's."""
        return f"labctl.sandbox.name={self.name}"

    @property
    def labels(self) -> tuple[str, ...]:
        """Both labels as options for `docker create`."""
        return ("--label", LABEL, "--label", self.own_label)

    @property
    def registry_name(self) -> str:
        """The registry's container."""
        return f"{self.name}-registry"

    @property
    def build_name(self) -> str:
        """The container in which the control plane's image is configured."""
        return f"{self.name}-build"

    @property
    def bridge(self) -> str:
        """The bridge's name; the kernel allows 15 characters."""
        if self.name == DEFAULT_NAME:
            return "br-labctl"
        return "br-" + hashlib.sha256(self.name.encode()).hexdigest()[:10]

    @property
    def subnet(self) -> str:
        """The servers' network."""
        return f"{self.prefix}.0.0/24"

    @property
    def gateway(self) -> str:
        """This machine's address there."""
        return f"{self.prefix}.0.1"

    @property
    def address(self) -> str:
        """Where every API answers."""
        return f"{self.prefix}.0.2"

    @property
    def registry_address(self) -> str:
        """Where the servers find the registry, as part of an image reference."""
        return f"{self.prefix}.0.3:5000"

    @property
    def docker_range(self) -> str:
        """What Docker itself may give away; Neutron has .20 to .200."""
        return f"{self.prefix}.0.224/27"

    @property
    def floating_subnet(self) -> str:
        """The floating IPs."""
        return f"{self.prefix}.1.0/24"

    @property
    def volumes(self) -> Path:
        """The volumes' backing files."""
        return self.state / "volumes"

    @property
    def logs(self) -> Path:
        """What builds and the Docker engine wrote."""
        return self.state / "log"

    @property
    def clouds_file(self) -> Path:
        """The student's credentials: entries `sandbox` and `sandbox-objects`."""
        return self.state / "clouds.yaml"

    @property
    def images_file(self) -> Path:
        """Which service images the servers use."""
        return self.state / "images.json"


def resolvers(
    files: tuple[Path, ...] = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf")),
) -> list[str]:
    """The machine's IPv4 name servers that a container can reach too.

    A loopback resolver (systemd-resolved's 127.0.0.53) is this machine's alone: the next file has the real ones.
    """
    for file in files:
        if not file.is_file():
            continue
        words = [line.split() for line in file.read_text().splitlines()]
        found = [w[1] for w in words if len(w) > 1 and w[0] == "nameserver" and ":" not in w[1]]
        if usable := [address for address in found if not address.startswith("127.")]:
            return usable
    return []
