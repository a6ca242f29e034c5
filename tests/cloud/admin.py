"""The operator's side of the test cloud: quotas, states, flavors and networks that a user can't make.

LABCTL_TEST_ADMIN_CLOUD names an entry of the same clouds.yaml with the role admin; the sandbox has one by itself.
Where nobody is an operator, the tests that need one are skipped. All of it is done to a project of the run's own.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CLOUD, CLOUDS_FILE, FLAVOR, Lab, object_entry, public_key, site, sweep
from labctl.cloud import session
from labctl.cloud.session import VOLUME_API
from labctl.cloud.traffic import Traffic

#: Where a service keeps a project's quotas, and the key of the document.
_QUOTAS = {
    "compute": ("/os-quota-sets/{}", "quota_set"),
    "block_storage": ("/os-quota-sets/{}", "quota_set"),
    "network": ("/quotas/{}", "quota"),
}


@dataclass
class Operator:
    """The operator of the cloud, and the project that the tests may do anything to."""

    cloud: Any
    project: str
    prefix: str

    @contextmanager
    def quota(self, service: str, **limits: int) -> Iterator[None]:
        """Other limits for the project, until the block ends."""
        path, key = _QUOTAS[service]
        proxy, url = getattr(self.cloud, service), path.format(self.project)
        _done(proxy.put(url, json={key: limits}))
        try:
            yield
        finally:
            _done(proxy.delete(url))

    @contextmanager
    def volume_status(self, volume_id: str, status: str) -> Iterator[None]:
        """A volume in a state that it got by no doing of its own, until the block ends."""
        self.reset(volume_id, status)
        try:
            yield
        finally:
            self.reset(volume_id, "available")

    def reset(self, volume_id: str, status: str) -> None:
        """What `openstack volume set --state` does: only the record changes."""
        # the admin's own project is in the catalogue's address; the volume is of another
        body = {"os-reset_status": {"status": status}}
        _done(self.cloud.block_storage.post(f"/volumes/{volume_id}/action", json=body, microversion=VOLUME_API))

    @contextmanager
    def flavor(self, **extra_specs: str) -> Iterator[Any]:
        """A small flavor that only the project sees."""
        like = self.cloud.compute.find_flavor(FLAVOR)
        made = self.cloud.compute.create_flavor(
            name=f"{self.prefix}-{secrets.token_hex(2)}",
            ram=like.ram,
            vcpus=like.vcpus,
            disk=like.disk,
            is_public=False,
        )
        try:
            self.cloud.compute.flavor_add_tenant_access(made.id, self.project)
            self.cloud.compute.create_flavor_extra_specs(made, extra_specs)
            yield made
        finally:
            self.cloud.compute.delete_flavor(made.id)

    @contextmanager
    def full_network(self, *, external: bool) -> Iterator[str]:
        """The name of a network that has no address left."""
        net = self.cloud.network
        made = net.create_network(
            name=f"{self.prefix}-{secrets.token_hex(2)}",
            project_id=self.project,
            is_router_external=external,
        )
        try:
            net.create_subnet(
                network_id=made.id,
                project_id=self.project,
                ip_version=4,
                cidr="198.18.7.0/29",
                is_dhcp_enabled=False,
                allocation_pools=[{"start": "198.18.7.2", "end": "198.18.7.2"}],
            )
            taken = net.create_port(network_id=made.id, project_id=self.project)
            try:
                yield str(made.name)
            finally:
                net.delete_port(taken.id)
        finally:
            for port in net.ports(network_id=made.id):
                net.delete_port(port.id)
            net.delete_network(made.id)


def _done(response: Any) -> None:
    assert response.status_code < 300, response.text


def connection() -> Any:
    """The operator's connection, made by openstacksdk alone. Skips the test where there is none."""
    import openstack

    entries = yaml.safe_load(CLOUDS_FILE.read_text())["clouds"] if CLOUDS_FILE.is_file() else {}
    passwords = CLOUDS_FILE.with_name("passwords.json")
    if named := os.environ.get("LABCTL_TEST_ADMIN_CLOUD"):
        entry = entries[named]
    elif CLOUD == "sandbox" and passwords.is_file():
        login = {"username": "admin", "password": json.loads(passwords.read_text())["admin"], "project_name": "admin"}
        entry = {**entries[CLOUD], "auth": {**entries[CLOUD]["auth"], **login}}
    else:
        pytest.skip("needs an operator of the cloud: LABCTL_TEST_ADMIN_CLOUD")
    made = openstack.connect(load_yaml_config=False, load_envvars=False, **entry)
    Traffic().watch(made.session.session)  # API servers reset requests now and then: those are sent again
    return made


@contextmanager
def project_of_its_own(folder: Path) -> Iterator[tuple[Operator, Lab]]:
    """A project with a user, and what labctl sees of it; with all that is in it gone at the end."""
    cloud = connection()
    identity, prefix = cloud.identity, f"lct-{secrets.token_hex(3)}"
    entry = yaml.safe_load(CLOUDS_FILE.read_text())["clouds"]
    domain = identity.find_domain(entry[CLOUD]["auth"].get("project_domain_name") or "Default").id
    with ExitStack() as undo:
        project = identity.create_project(name=prefix, domain_id=domain)
        undo.callback(identity.delete_project, project.id)
        password = secrets.token_hex(16)
        user = identity.create_user(
            name=prefix, domain_id=domain, password=password, default_project_id=project.id, is_enabled=True
        )
        undo.callback(identity.delete_user, user.id)
        undo.callback(_delete_groups, cloud, project.id)
        for role in ("member", "reader"):
            if found := identity.find_role(role):
                identity.assign_project_role_to_user(project, user, found)
        for name in {CLOUD, object_entry()}:
            auth = {"auth_url": entry[name]["auth"]["auth_url"], "username": prefix, "password": password}
            auth |= {"project_id": project.id, "user_domain_id": domain}
            entry[name]["auth"] = auth
            entry[name].pop("auth_type", None)
        path = folder / "clouds.yaml"
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump({"clouds": entry}))
        lab = Lab(session.connect(site(clouds_file=path)), prefix, public_key())
        undo.callback(sweep, lab)
        yield Operator(cloud, str(project.id), prefix), lab


def _delete_groups(cloud: Any, project: str) -> None:
    """The default security group, which outlives its project otherwise."""
    for group in cloud.network.security_groups(project_id=project):
        cloud.network.delete_security_group(group.id)
