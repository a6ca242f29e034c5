"""Security groups and floating IPs, in a project that others share: theirs are never changed and never taken."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from labctl.cloud.refusals import refusals, status_of
from labctl.cloud.server import network_of
from labctl.cloud.session import Cloud
from labctl.errors import CloudRefused
from labctl.models import Rule, SecurityGroup, Server

#: A security group whose description begins so was made by labctl: its rules are labctl's to mend.
GROUP_MARK = "labctl: "
#: The description of a lab's floating IP: `labctl:LAB`, and what an adopted one said before. It is set by
#: the request that makes the address, so an interrupted command leaves none that nobody owns.
ADDRESS_MARK = "labctl:"


@dataclass(frozen=True)
class Address:
    """A floating IP on a server. `new` tells that this call associated it: the server's record shows it 1-2 s later."""

    address: str
    new: bool


def ensure_groups(cloud: Cloud, groups: Sequence[SecurityGroup]) -> list[str]:
    """Makes sure that each group exists with its ingress rules and no others; returns their ids in the same order.

    One that labctl made is brought to that. Somebody else's of that name is used if its rules are those, and never
    changed: else NAME-labctl is used instead. What a group lets out is left as it is. One request when all is there.
    """
    with refusals("list the security groups"):
        listed = list(cloud.compute.network.security_groups(project_id=cloud.project_id))
    by_name: dict[str, list[Any]] = {}
    for group in listed:
        by_name.setdefault(str(group.name), []).append(group)
    return [_ensure_group(cloud, wanted, by_name) for wanted in groups]


def _ensure_group(cloud: Cloud, wanted: SecurityGroup, by_name: dict[str, list[Any]]) -> str:
    for name in (wanted.name, f"{wanted.name}-labctl"):
        # Sorted, so that two runs choose the same one of several.
        there = sorted(by_name.get(name, []), key=lambda group: str(group.id))
        for group in there:
            rules = group.security_group_rules or []
            if not missing_rules(wanted.rules, rules) and not extra_rules(wanted.rules, rules):
                return str(group.id)
        for group in there:
            if str(group.description or "").startswith(GROUP_MARK):
                rules = group.security_group_rules or []
                # what is needed first: a login that is under way must not lose its rule for a moment
                _add_rules(cloud, str(group.id), name, missing_rules(wanted.rules, rules))
                _remove_rules(cloud, name, extra_rules(wanted.rules, rules))
                return str(group.id)
        if not there:
            description = f"{GROUP_MARK}{wanted.description or 'ingress to ' + name}"
            with refusals(f"create security group {name}"):
                group = cloud.compute.network.create_security_group(name=name, description=description)
            _add_rules(cloud, str(group.id), name, list(wanted.rules))
            return str(group.id)
    raise CloudRefused(
        f"no security group {wanted.name} with the rules that are needed, and no others",
        expected=f"TCP {', '.join(f'{r.port} from {r.cidr}' for r in wanted.rules)}",
        found=f"{wanted.name} and {wanted.name}-labctl, both made by somebody else and with other rules",
        next_step=f"rename one of them: openstack security group set --name NEW {wanted.name}-labctl",
    )


def missing_rules(wanted: Sequence[Rule], existing: Sequence[Any]) -> list[Rule]:
    """The wanted rules that are not among the existing ones (Neutron's dicts), each once."""
    there = {_rule(one) for one in existing}
    return [rule for rule in dict.fromkeys(wanted) if _key(rule) not in there]


def extra_rules(wanted: Sequence[Rule], existing: Sequence[Any]) -> list[Any]:
    """The existing ingress rules (Neutron's dicts) that let more in than is wanted."""
    keys = {_key(rule) for rule in wanted}
    return [one for one in existing if one.get("direction") == "ingress" and _rule(one) not in keys]


def _key(rule: Rule) -> tuple[Any, ...]:
    net = ipaddress.ip_network(rule.cidr, strict=False)
    return ("tcp", rule.port, rule.port, str(net), None, None)


def _rule(one: Any) -> tuple[Any, ...]:
    """What a rule of Neutron's lets in, in the form of `_key`; without a source it is any of its IP version."""
    if one.get("direction") != "ingress":
        return ()
    protocol = {"6": "tcp"}.get(str(one.get("protocol")), one.get("protocol"))
    anywhere = "::/0" if one.get("ethertype") == "IPv6" else "0.0.0.0/0"
    source = None if one.get("remote_group_id") or one.get("remote_address_group_id") else anywhere
    if one.get("remote_ip_prefix"):
        source = str(ipaddress.ip_network(one["remote_ip_prefix"], strict=False))
    return (
        protocol,
        one.get("port_range_min"),
        one.get("port_range_max"),
        source,
        one.get("remote_group_id"),
        one.get("remote_address_group_id"),
    )


def _add_rules(cloud: Cloud, group_id: str, name: str, rules: Sequence[Rule]) -> None:
    for rule in rules:
        version = ipaddress.ip_network(rule.cidr, strict=False).version
        with refusals(f"add TCP {rule.port} from {rule.cidr} to security group {name}"):
            try:
                cloud.compute.network.create_security_group_rule(
                    security_group_id=group_id,
                    direction="ingress",
                    ethertype=f"IPv{version}",
                    protocol="tcp",
                    port_range_min=rule.port,
                    port_range_max=rule.port,
                    remote_ip_prefix=rule.cidr,
                )
            except Exception as error:
                # Another run of the same lab may have added it since the list was read.
                if status_of(error) != 409 or "quota" in str(error).lower():
                    raise


def _remove_rules(cloud: Cloud, name: str, rules: Sequence[Any]) -> None:
    for rule in rules:
        with refusals(f"remove a rule that isn't wanted from security group {name}"):
            cloud.compute.network.delete_security_group_rule(rule["id"], ignore_missing=True)


def put_groups_on(cloud: Cloud, server: Server, group_ids: Sequence[str]) -> bool:
    """Adds the groups that the server's port lacks (an adopted server's, say); True if any. One request if none."""
    with refusals(f"put the security groups on server {server.name}"):
        ports = list(cloud.compute.network.ports(device_id=server.id))
        port = _port(ports, server)
        has = list(port.security_group_ids or [])
        missing = [group for group in group_ids if group not in has]
        if missing:
            cloud.compute.network.update_port(port.id, security_group_ids=has + missing)
    return bool(missing)


def groups_made(cloud: Cloud, names: Sequence[str]) -> list[Any]:
    """The groups of these names (also NAME-labctl) that labctl made. One request."""
    wanted = {*names, *(f"{name}-labctl" for name in names)}
    with refusals("list the security groups"):
        listed = list(cloud.compute.network.security_groups(project_id=cloud.project_id))
    return [one for one in listed if one.name in wanted and str(one.description or "").startswith(GROUP_MARK)]


def delete_groups(cloud: Cloud, names: Sequence[str]) -> list[str]:
    """Deletes the groups (also NAME-labctl) that labctl made and nothing uses; returns their names."""
    deleted = []
    for group in groups_made(cloud, names):
        with refusals(f"delete security group {group.name}"):
            try:
                cloud.compute.network.delete_security_group(group.id, ignore_missing=True)
                deleted.append(str(group.name))
            except Exception as error:
                if status_of(error) != 409:
                    raise
    return deleted


def ensure_floating_ip(cloud: Cloud, server: Server, lab: str, preferred: str | None = None) -> Address:
    """A floating IP on the server: the one it has, else `preferred`, else a free one of this lab, else a new one.

    A free address that isn't marked as this lab's belongs to somebody, and is taken only when `preferred` names it.
    Raises CloudRefused when `preferred` isn't there or is in use, and with the quota's words.
    """
    if server.address is not None:
        return Address(server.address, new=False)
    network = cloud.compute.network
    with refusals("list the floating IPs"):
        ports = list(network.ports(device_id=server.id))
        addresses = list(network.ips(project_id=cloud.project_id))
    port_ids = {port.id for port in ports}
    mark = ADDRESS_MARK + lab
    for ip in addresses:
        if ip.port_id in port_ids:
            return Address(str(ip.floating_ip_address), new=False)
    port = str(_port(ports, server).id)
    if preferred is not None:
        ip = _preferred(addresses, preferred, lab)
    else:
        ip = next((ip for ip in addresses if not ip.port_id and _is_labs(ip, lab)), None)
    if ip is not None:
        with refusals(f"give {ip.floating_ip_address} to server {server.name}"):
            network.update_ip(ip.id, port_id=port)
        return Address(str(ip.floating_ip_address), new=True)
    pool = network_of(cloud, cloud.site.external_network)
    with refusals(f"get a floating IP of {cloud.site.external_network} for server {server.name}"):
        made = network.create_ip(floating_network_id=pool, port_id=port, description=mark)
    return Address(str(made.floating_ip_address), new=True)


def _port(ports: list[Any], server: Server) -> Any:
    """The port that the address and the groups are for: the one with the server's first fixed address."""
    for port in ports:
        if any(entry.get("ip_address") == server.fixed_address for entry in port.fixed_ips or []):
            return port
    if ports:
        return ports[0]
    raise CloudRefused(
        f"server {server.name} has no network port",
        expected="a port on the lab's network",
        found="none",
        next_step="labctl down, then labctl up",
    )


def _preferred(addresses: list[Any], preferred: str, lab: str) -> Any:
    ip = next((ip for ip in addresses if ip.floating_ip_address == preferred), None)
    owner = str(ip.description or "") if ip is not None else ""
    if ip is None:
        found = f"not among the project's: {', '.join(str(a.floating_ip_address) for a in addresses) or 'none'}"
    elif ip.port_id:
        found = f"in use (port {ip.port_id}, {ip.fixed_ip_address})"
    elif owner.startswith(ADDRESS_MARK) and not _is_labs(ip, lab):
        found = f"it belongs to the lab {owner.removeprefix(ADDRESS_MARK)}"
    else:
        return ip
    raise CloudRefused(
        f"the floating IP {preferred} can't be used",
        expected="a free address of the project",
        found=found,
        source="lab.yaml",
        next_step="leave it out of lab.yaml to get another one, or free it: openstack floating ip unset --port ADDRESS",
    )


def _is_labs(ip: Any, lab: str) -> bool:
    return str(ip.description or "").partition(" ")[0] == ADDRESS_MARK + lab


def floating_ips(cloud: Cloud, lab: str) -> list[Any]:
    """The floating IPs that are marked as the lab's. One request."""
    with refusals("list the floating IPs"):
        return [ip for ip in cloud.compute.network.ips(project_id=cloud.project_id) if _is_labs(ip, lab)]


def claim_floating_ip(cloud: Cloud, address: str, lab: str) -> str:
    """Marks an address as the lab's, keeping what its description says; returns "" or whose it is already."""
    with refusals(f"mark the floating IP {address} as the lab's"):
        for ip in cloud.compute.network.ips(project_id=cloud.project_id, floating_ip_address=address):
            said = str(ip.description or "")
            if said.startswith(ADDRESS_MARK):
                return "" if _is_labs(ip, lab) else said
            cloud.compute.network.update_ip(ip.id, description=f"{ADDRESS_MARK}{lab} {said}".strip())
    return ""


def release_floating_ips(cloud: Cloud, lab: str) -> list[str]:
    """Gives the lab's addresses back; returns them. Others' stay, and so does one that something still uses.

    python-chi gives any unused address of the project to the next server: somebody may have got this one meanwhile.
    """
    released = []
    for ip in floating_ips(cloud, lab):
        if ip.port_id:
            continue
        with refusals(f"give the floating IP {ip.floating_ip_address} back"):
            cloud.compute.network.delete_ip(ip.id, ignore_missing=True)
            released.append(str(ip.floating_ip_address))
    return released
