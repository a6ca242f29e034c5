"""What one command works with: the lab, its site, where progress goes, and the cloud once it is needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labctl import credentials_file, resources, ssh
from labctl.cloud import META_HOST_KEY
from labctl.errors import ConfigError, HostUnreachable
from labctl.inventory import InventorySpec
from labctl.lab import Dataset, Lab
from labctl.models import Rule, SecurityGroup, Server, Site
from labctl.progress import Progress
from labctl.sites import SANDBOX, sandbox_state, site_of
from labctl.ssh import Login

if TYPE_CHECKING:
    from labctl.cloud.session import Cloud
    from labctl.store_access import Plan

SERVICE_IMAGES = ("mlflow", "postgres", "s3", "jupyter")
#: What serves a volume that an older or newer PostgreSQL wrote; `postgres` is for new volumes.
POSTGRES_MAJORS = ("postgres-15", "postgres-16", "postgres-17", "postgres-18")


@dataclass(frozen=True)
class Images:
    """A site's images: full references by name, the registry that its nodes pull from, and the S3 server's kind."""

    references: dict[str, str]
    registry: str = ""
    s3_flavour: str = "minio"


class Context:
    """A lab as one command sees it. `confirm` asks the person at the terminal a yes-or-no question."""

    def __init__(self, lab: Lab, progress: Progress, confirm: Callable[[str], bool], verbosity: int = 0) -> None:
        self.lab = lab
        self.progress = progress
        self.confirm = confirm
        self.verbosity = verbosity
        #: Identities of volumes that are taken over on purpose, as a safety stop printed them.
        self.accept_volumes: tuple[str, ...] = ()
        #: Asks the person at the terminal for a text, hidden or not; None where there is nobody.
        self.prompt: Callable[[str, bool], str] | None = None
        #: How the server gets its credential for the object store, once that is settled (`store_access.check`).
        self.store_plan: Plan | None = None
        #: Whether a server that the cloud couldn't start (no valid host, say) is made once more.
        self.retry = False
        self.site: Site = site_of(lab)

    @cached_property
    def cloud(self) -> Cloud:
        """The site's APIs, logged into on first use."""
        from labctl.cloud import session

        return session.connect(self.site)

    @cached_property
    def state(self) -> Path:
        """This machine's folder for the lab: known hosts and logs, all of which can be lost."""
        return resources.state_directory() / self.site.name / self.lab.lab

    @property
    def ssh_key(self) -> Path:
        """The private key that logs into the server."""
        chosen = self.lab.server.ssh_key
        return Path(chosen).expanduser().absolute() if chosen else resources.state_directory() / "id_ed25519"

    def login(self, server: Server) -> Login:
        """How to reach a server. Raises HostUnreachable for one without an address."""
        if server.address is None:
            raise HostUnreachable(f"server {server.name} has no floating IP.", next_step="labctl up")
        known_hosts = self.state / "known_hosts"
        if key := server.metadata.get(META_HOST_KEY):
            ssh.trust(known_hosts, server.id, [key])
        return Login(server.address, self.lab.server.user, self.ssh_key, known_hosts, server.id)

    @cached_property
    def images(self) -> Images:
        """The site's images, with those that lab.yaml names in place of its own."""
        if self.site.name == SANDBOX:
            made = sandbox_state() / "images.json"
            if not made.is_file():
                raise ConfigError("The sandbox has no images yet.", source=str(made), next_step="labctl sandbox up")
            document = json.loads(made.read_text())
            base = Images(document["images"], document["registry"], document["s3_flavour"])
        else:
            versions = resources.root() / "sandbox" / "images" / "versions.json"
            upstream = json.loads(versions.read_text())
            base = Images(
                {name: one["upstream"] for name, one in upstream.items() if one["upstream"]},
                s3_flavour=upstream["s3"]["upstream_flavour"],
            )
        chosen = {
            name: reference
            for name in SERVICE_IMAGES
            if (reference := getattr(self.lab.images, name) or base.references.get(name))
        }
        if self.lab.images.postgres is None:  # the one that lab.yaml names is meant, and no other
            chosen |= {name: base.references[name] for name in POSTGRES_MAJORS if name in base.references}
        return Images(chosen, base.registry, base.s3_flavour)

    @cached_property
    def volume_credentials(self) -> dict[str, str]:
        """What the volume to adopt was made with, by the role's names; {} where lab.yaml names no file."""
        chosen = self.lab.volume.credentials_file
        if not chosen:
            return {}
        path = Path(chosen).expanduser().absolute()
        return credentials_file.read(path, self.lab.source("volume.credentials_file"))

    @property
    def security_group(self) -> SecurityGroup:
        """The lab's own group: SSH, and the services for the networks that lab.yaml opens them to."""
        access = self.lab.access
        rules = [Rule(22, cidr) for cidr in access.ssh_from]
        rules += [Rule(port, cidr) for cidr in access.services_from for port in self.ports.values()]
        return SecurityGroup(f"labctl-{self.lab.lab}", tuple(rules), f"labctl lab {self.lab.lab}")

    @property
    def ports(self) -> dict[str, int]:
        """The services' ports on the server."""
        services = self.lab.services
        return {
            "mlflow": services.mlflow_port,
            "s3": services.s3_port,
            "s3_console": services.s3_console_port,
            "jupyter": services.jupyter_port,
        }

    @cached_property
    def inventory_spec(self) -> InventorySpec:
        """What the dynamic inventory needs to know of the lab besides what the cloud says."""
        lab, images = self.lab, self.images
        insecure = [*lab.images.insecure_registries, *([images.registry] if images.registry else [])]
        return InventorySpec(
            lab=lab.lab,
            site=self.site.name,
            server=lab.server_name,
            volume=lab.volume_name,
            container=lab.container_name,
            ssh_key=self.ssh_key,
            known_hosts=self.state / "known_hosts",
            user=lab.server.user,
            volume_mount_point=lab.volume.mount_point,
            object_mount_point=lab.object_store.mount_point,
            ports=self.ports,
            services_open=bool(lab.access.services_from),
            allowed_hosts=tuple(lab.services.allowed_hosts),
            images=images.references,
            s3_flavour=images.s3_flavour,
            insecure_registries=tuple(insecure),
            registry_mirrors=tuple(lab.images.registry_mirrors),
            dataset=self.dataset,
            layout=lab.object_store.layout,
        )

    @property
    def dataset(self) -> dict[str, Any] | None:
        """The dataset that lab.yaml describes, or None for the role's built-in one."""
        chosen = self.lab.dataset
        if not isinstance(chosen, Dataset):
            return None
        described = chosen.model_dump(exclude_none=True)
        if chosen.labels and (path := Path(chosen.labels).expanduser()).is_file():
            described["labels_text"] = path.read_text(encoding="utf-8-sig")
        return described
