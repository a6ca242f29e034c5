"""A real cloud to test against: an entry of a clouds.yaml, the sandbox's unless the environment says otherwise.

LABCTL_TEST_CLOUDS_FILE  default /var/lib/labctl-sandbox/clouds.yaml
LABCTL_TEST_CLOUD        default sandbox; its object store: that entry with -objects, if there is one, else the same
LABCTL_TEST_IMAGE, _FLAVOR, _NETWORK, _EXTERNAL_NETWORK  defaults CC-Ubuntu24.04, m1.small, sharednet1, public

Everything made carries the prefix of this run and is removed at its end, also after a failure. The login must be
a password or token: an application credential may not make others.
"""

from __future__ import annotations

import base64
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from labctl.cloud import credential, network, server, session, store, volume
from labctl.cloud.session import Cloud
from labctl.errors import LabctlError
from labctl.models import Rule, SecurityGroup, Server, Site, Volume

CLOUDS_FILE = Path(os.environ.get("LABCTL_TEST_CLOUDS_FILE", "/var/lib/labctl-sandbox/clouds.yaml"))
CLOUD = os.environ.get("LABCTL_TEST_CLOUD", "sandbox")
IMAGE = os.environ.get("LABCTL_TEST_IMAGE", "CC-Ubuntu24.04")
FLAVOR = os.environ.get("LABCTL_TEST_FLAVOR", "m1.small")


def object_entry() -> str:
    entries = yaml.safe_load(CLOUDS_FILE.read_text())["clouds"] if CLOUDS_FILE.is_file() else {}
    return f"{CLOUD}-objects" if f"{CLOUD}-objects" in entries else CLOUD


def site(**changes: Any) -> Site:
    values: dict[str, Any] = {
        "name": "test",
        "cloud": CLOUD,
        "object_cloud": object_entry(),
        "clouds_file": CLOUDS_FILE,
        "network": os.environ.get("LABCTL_TEST_NETWORK", "sharednet1"),
        "external_network": os.environ.get("LABCTL_TEST_EXTERNAL_NETWORK", "public"),
    }
    return Site(**{**values, **changes})


def public_key() -> str:
    """An Ed25519 public key that nobody has the private half of: enough to register."""
    blob = b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + secrets.token_bytes(32)
    return f"ssh-ed25519 {base64.b64encode(blob).decode()} labctl-test"


@dataclass
class Told:
    """A `tell` that remembers."""

    words: list[str] = field(default_factory=list)

    def __call__(self, text: str) -> None:
        self.words.append(text)


@dataclass
class Lab:
    """What the tests of one run share: the cloud, the prefix of all names, the lab's name, a key."""

    cloud: Cloud
    prefix: str
    key: str
    told: Told = field(default_factory=Told)

    @property
    def name(self) -> str:
        return self.prefix

    @property
    def groups(self) -> list[SecurityGroup]:
        return [SecurityGroup(f"{self.prefix}-ssh", (Rule(22),)), SecurityGroup(f"{self.prefix}-web", (Rule(8000),))]


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    made = Lab(session.connect(site()), f"lct-{secrets.token_hex(3)}", public_key())
    yield made
    sweep(made)


def sweep(lab: Lab) -> None:
    """Removes all that carries the prefix; goes on after an error, and says at the end what stayed."""
    stayed: list[str] = []
    for remove in (_sweep_compute, _sweep_network, _sweep_store):
        for attempt in remove(lab):
            try:
                attempt()
            except LabctlError as error:
                stayed.append(f"{error} {error.found}")
    assert not stayed, f"left behind in the cloud: {stayed}"


def _sweep_compute(lab: Lab) -> Iterator[Callable[[], object]]:
    cloud, told = lab.cloud, Told()
    servers = [s for s in cloud.compute.compute.servers() if lab.prefix in str(s.name)]
    for wait in (False, True):  # all go at the same time
        for each in servers:
            yield partial(server.delete, cloud, each.id, told, wait=wait)
    for left in [v for v in volume.list_volumes(cloud) if lab.prefix in v.name]:
        yield partial(volume.wait_status, cloud, left.id, "available", told, 60)
        yield partial(volume.delete, cloud, left, told)
    for each in [k for k in cloud.compute.compute.keypairs() if str(k.name).startswith(lab.prefix)]:
        yield partial(cloud.compute.compute.delete_keypair, each)


def _sweep_network(lab: Lab) -> Iterator[Callable[[], object]]:
    net, project = lab.cloud.compute.network, lab.cloud.project_id
    for each in [ip for ip in net.ips(project_id=project) if lab.prefix in str(ip.description or "")]:
        yield partial(net.delete_ip, each.id)
    for each in [g for g in net.security_groups(project_id=project) if lab.prefix in str(g.name)]:
        yield partial(net.delete_security_group, each.id)


def _sweep_store(lab: Lab) -> Iterator[Callable[[], object]]:
    for container in store.list_containers(lab.cloud):
        if lab.prefix in container.name:
            yield partial(store.delete_container, lab.cloud, container.name, Told())
    for ours in credential.list_ours(lab.cloud, lab.name):
        yield partial(credential.delete, lab.cloud, ours.id)


def make_server(lab: Lab, name: str) -> Server:
    from labctl.cloud import keypair

    cloud = lab.cloud
    found = server.find(cloud, name)
    if found is None:
        found = server.create(
            cloud,
            name,
            image=IMAGE,
            flavor=FLAVOR,
            network=cloud.site.network,
            key_name=keypair.ensure(cloud, lab.key, lab.prefix),
            groups=network.ensure_groups(cloud, lab.groups),
            metadata={"labctl_lab": lab.name},
        )
    return server.wait_active(cloud, found.id, lab.told)


@pytest.fixture(scope="session")
def node(lab: Lab) -> Server:
    """A server that is ACTIVE."""
    return make_server(lab, f"{lab.prefix}-node")


@pytest.fixture(scope="session")
def other_node(lab: Lab) -> Server:
    """Another one."""
    return make_server(lab, f"{lab.prefix}-other")


@pytest.fixture
def free_volume(lab: Lab) -> Iterator[Volume]:
    """A new volume of 1 GiB, deleted after the test."""
    made = volume.create(
        lab.cloud, f"{lab.prefix}-v{secrets.token_hex(2)}", 1, metadata={"labctl_lab": lab.name}, tell=lab.told
    )
    yield made
    now = volume.get(lab.cloud, made.id)
    if now and now.attached_to:
        volume.detach(lab.cloud, now.attached_to, now, lab.told)
    if now:
        volume.delete(lab.cloud, now, lab.told)
