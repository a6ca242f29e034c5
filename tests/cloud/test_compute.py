"""Servers, key pairs, groups, addresses: made once, found again, and nobody else's."""

from __future__ import annotations

import secrets
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import FLAVOR, IMAGE, Lab, make_server, public_key
from labctl.cloud import credential, keypair, network, server, session, store, volume
from labctl.errors import CloudRefused, ConfigError
from labctl.inventory import InventorySpec, build
from labctl.models import Rule, SecurityGroup, Server


def ask(lab: Lab, **changes: str) -> Server:
    wanted = {"image": IMAGE, "flavor": FLAVOR, "network": lab.cloud.site.network, "key_name": "", **changes}
    return server.create(lab.cloud, f"{lab.prefix}-never", groups=[], metadata={}, **wanted)


def test_a_key_pair_is_registered_once_and_another_key_gets_another_name(lab: Lab) -> None:
    first = keypair.ensure(lab.cloud, lab.key, lab.prefix)
    before = lab.cloud.requests
    assert keypair.ensure(lab.cloud, lab.key + " another comment", lab.prefix) == first
    assert lab.cloud.requests - before == 1
    assert keypair.ensure(lab.cloud, public_key(), lab.prefix) != first


def test_a_key_pair_of_the_name_with_another_key_is_neither_used_nor_replaced(lab: Lab) -> None:
    key, somebodys = public_key(), public_key()
    name = f"{lab.prefix}-{keypair.fingerprint(key)}"
    lab.cloud.compute.compute.create_keypair(name=name, public_key=somebodys)
    with pytest.raises(CloudRefused, match="another key"):
        keypair.ensure(lab.cloud, key, lab.prefix)
    assert lab.cloud.compute.compute.get_keypair(name).public_key.split()[1] == somebodys.split()[1]


def test_text_that_is_no_key_is_a_mistake_of_the_configuration(lab: Lab) -> None:
    with pytest.raises(ConfigError):
        keypair.ensure(lab.cloud, "-----BEGIN OPENSSH PRIVATE KEY-----", lab.prefix)


def test_a_server_is_found_again_by_name_and_by_id(lab: Lab, node: Server) -> None:
    found = server.find(lab.cloud, node.name)
    assert found is not None
    assert found.id == node.id
    assert found.status == "ACTIVE"
    assert found.metadata["labctl_lab"] == lab.name
    assert server.find(lab.cloud, node.name[:-1]) is None
    assert server.get(lab.cloud, "00000000-0000-0000-0000-000000000000") is None
    assert make_server(lab, node.name).id == node.id


def test_metadata_is_added_and_the_rest_stays(lab: Lab, node: Server) -> None:
    server.set_metadata(lab.cloud, node.id, labctl_credential_id="c1")
    now = server.get(lab.cloud, node.id)
    assert now is not None
    assert now.metadata == {**node.metadata, "labctl_credential_id": "c1"}


def test_two_servers_of_one_name_are_listed_and_neither_is_taken(lab: Lab, node: Server, other_node: Server) -> None:
    compute = lab.cloud.compute.compute
    compute.update_server(other_node.id, name=node.name)
    try:
        with pytest.raises(CloudRefused) as caught:
            server.find(lab.cloud, node.name)
    finally:
        compute.update_server(other_node.id, name=other_node.name)
    assert node.id in caught.value.found
    assert other_node.id in caught.value.found


@pytest.mark.parametrize("kind", ["image", "flavor", "network"])
def test_what_is_gone_is_named_together_with_what_there_is(lab: Lab, kind: str) -> None:
    with pytest.raises(CloudRefused) as caught:
        ask(lab, **{kind: "lct-gone"})
    there_is = {"image": IMAGE, "flavor": FLAVOR, "network": lab.cloud.site.network}[kind]
    assert there_is in caught.value.expected
    assert kind in caught.value.what


def test_a_key_pair_that_is_gone_is_refused_in_the_clouds_words(lab: Lab) -> None:
    with pytest.raises(CloudRefused) as caught:
        ask(lab, key_name="lct-gone")
    assert "key_name" in caught.value.found


def test_a_stopped_server_is_not_waited_for_in_vain(lab: Lab, other_node: Server) -> None:
    lab.cloud.compute.compute.stop_server(other_node.id)
    for _ in range(60):
        now = server.get(lab.cloud, other_node.id)
        if now is not None and now.status == "SHUTOFF":
            break
        time.sleep(1)
    with pytest.raises(CloudRefused) as caught:
        server.wait_active(lab.cloud, other_node.id, lab.told)
    assert "openstack server start" in caught.value.next_step
    server.start(lab.cloud, other_node.id)
    assert server.wait_active(lab.cloud, other_node.id, lab.told).status == "ACTIVE"


def test_groups_are_made_once_and_get_back_a_rule_that_was_lost(lab: Lab) -> None:
    wanted = [SecurityGroup(f"{lab.prefix}-g", (Rule(22), Rule(8000, "10.0.0.0/8")))]
    first = network.ensure_groups(lab.cloud, wanted)
    before = lab.cloud.requests
    assert network.ensure_groups(lab.cloud, wanted) == first
    assert lab.cloud.requests - before == 1
    net = lab.cloud.compute.network
    lost = next(r for r in net.security_group_rules(security_group_id=first[0]) if r.port_range_min == 22)
    net.delete_security_group_rule(lost.id)
    assert network.ensure_groups(lab.cloud, wanted) == first
    assert 22 in [r.port_range_min for r in net.security_group_rules(security_group_id=first[0])]
    assert network.delete_groups(lab.cloud, [wanted[0].name]) == [wanted[0].name]


def test_a_group_of_labctls_loses_the_rule_that_somebody_added(lab: Lab) -> None:
    net, wanted = lab.cloud.compute.network, [SecurityGroup(f"{lab.prefix}-x", (Rule(22), Rule(22)))]
    first = network.ensure_groups(lab.cloud, wanted)
    for wide in ({"protocol": "tcp", "port_range_min": 1, "port_range_max": 65535}, {"remote_group_id": first[0]}):
        net.create_security_group_rule(security_group_id=first[0], direction="ingress", **wide)
    assert network.ensure_groups(lab.cloud, wanted) == first
    rules = list(net.security_group_rules(security_group_id=first[0]))
    assert [(r.port_range_min, r.remote_ip_prefix) for r in rules if r.direction == "ingress"] == [(22, "0.0.0.0/0")]
    assert [r for r in rules if r.direction == "egress"], "the server could reach nothing any more"
    assert network.delete_groups(lab.cloud, [wanted[0].name]) == [wanted[0].name]


def test_somebodys_group_is_used_if_it_is_what_is_needed_and_left_as_it_is_if_not(lab: Lab) -> None:
    net = lab.cloud.compute.network
    theirs = net.create_security_group(name=f"{lab.prefix}-allow-ssh", description="Enable SSH traffic on TCP port 22")
    wanted = [SecurityGroup(theirs.name, (Rule(22),))]
    ours = network.ensure_groups(lab.cloud, wanted)
    assert ours != [theirs.id], "a group that lacks the rule would leave the server unreachable"
    ssh = {"direction": "ingress", "protocol": "tcp", "port_range_min": 22, "port_range_max": 22}
    net.create_security_group_rule(security_group_id=theirs.id, **ssh)
    assert network.ensure_groups(lab.cloud, wanted) == [theirs.id]
    wide = net.create_security_group_rule(security_group_id=theirs.id, **{**ssh, "port_range_max": 9000})
    assert network.ensure_groups(lab.cloud, wanted) == ours, "it would open more than lab.yaml says"
    assert network.delete_groups(lab.cloud, [theirs.name]) == [f"{theirs.name}-labctl"]
    assert wide.id in [r.id for r in net.security_group_rules(security_group_id=theirs.id)]


def test_a_group_in_use_outlives_its_deletion(lab: Lab, node: Server) -> None:
    assert network.delete_groups(lab.cloud, [group.name for group in lab.groups]) == []
    assert network.put_groups_on(lab.cloud, node, network.ensure_groups(lab.cloud, lab.groups)) is False


def test_an_adopted_server_gets_the_groups_it_lacks(lab: Lab, node: Server) -> None:
    more = network.ensure_groups(lab.cloud, [SecurityGroup(f"{lab.prefix}-more", (Rule(9000),))])
    assert network.put_groups_on(lab.cloud, node, more) is True
    assert network.put_groups_on(lab.cloud, node, more) is False


def test_a_server_gets_one_address_that_isnt_somebody_elses_and_keeps_it(lab: Lab, node: Server) -> None:
    net = lab.cloud.compute.network
    pool = server.network_of(lab.cloud, lab.cloud.site.external_network)
    theirs = net.create_ip(floating_network_id=pool, description=f"somebody's {lab.prefix}")
    marked = net.create_ip(floating_network_id=pool, description=f"labctl:{lab.prefix}-their-lab")
    with pytest.raises(CloudRefused, match="can't be used"):
        network.ensure_floating_ip(lab.cloud, node, lab.name, preferred=str(marked.floating_ip_address))
    with pytest.raises(CloudRefused, match="can't be used"):
        network.ensure_floating_ip(lab.cloud, node, lab.name, preferred="203.0.113.9")

    first = network.ensure_floating_ip(lab.cloud, node, lab.name)
    again = network.ensure_floating_ip(lab.cloud, node, lab.name)  # the record is the old one: asked of Neutron
    assert (first.new, again.new, again.address) == (True, False, first.address)
    assert first.address not in (theirs.floating_ip_address, marked.floating_ip_address)
    shown = server.wait_address(lab.cloud, node.id, lab.told)
    assert shown.address == first.address
    before = lab.cloud.requests
    assert network.ensure_floating_ip(lab.cloud, shown, lab.name) == again
    assert lab.cloud.requests == before

    # the server is deleted, say: its address waits for the next one
    ip = next(ip for ip in net.ips() if ip.floating_ip_address == first.address)
    net.update_ip(ip.id, port_id=None)
    bare = replace(shown, address=None)
    assert network.ensure_floating_ip(lab.cloud, bare, lab.name).address == first.address

    # somebody's server may have got it meanwhile: python-chi takes any free address of the project
    assert network.release_floating_ips(lab.cloud, lab.name) == []
    net.update_ip(ip.id, port_id=None)
    assert network.release_floating_ips(lab.cloud, lab.name) == [first.address]
    assert {theirs.id, marked.id} <= {ip.id for ip in net.ips()}
    assert not next(ip for ip in net.ips() if ip.id == theirs.id).port_id


def test_an_adopted_address_keeps_its_description_and_is_the_labs(lab: Lab) -> None:
    net, pool = lab.cloud.compute.network, server.network_of(lab.cloud, lab.cloud.site.external_network)
    made = net.create_ip(floating_network_id=pool, description=f"mine {lab.prefix}")
    assert network.claim_floating_ip(lab.cloud, made.floating_ip_address, lab.name) == ""
    assert net.get_ip(made.id).description == f"labctl:{lab.name} mine {lab.prefix}"
    said = network.claim_floating_ip(lab.cloud, made.floating_ip_address, f"{lab.name}-other")
    assert said and net.get_ip(made.id).description == said
    assert network.release_floating_ips(lab.cloud, f"{lab.name}-other") == []
    assert network.release_floating_ips(lab.cloud, lab.name) == [made.floating_ip_address]


def test_the_inventory_is_a_constant_number_of_requests(lab: Lab, node: Server, tmp_path: Path) -> None:
    network.ensure_floating_ip(lab.cloud, node, lab.name)
    server.wait_address(lab.cloud, node.id, lab.told)
    spec = InventorySpec(lab.name, "test", node.name, f"{lab.prefix}-none", "c", tmp_path / "key", tmp_path / "known")
    cloud = session.connect(lab.cloud.site)
    document = build(cloud, spec)
    assert document["_meta"]["hostvars"][node.name]["ansible_host"]
    assert cloud.requests <= 8
    with pytest.raises(CloudRefused, match="no server"):
        build(cloud, replace(spec, server="lct-absent"))
    assert build(cloud, replace(spec, server="lct-absent"), allow_missing=True)["labctl"]["hosts"] == []
    # an API that refuses is an error, also where a missing server would be fine
    cloud.compute.session.invalidate()
    cloud.compute.session.auth.auth_methods[0].password = secrets.token_hex(4)
    with pytest.raises(CloudRefused):
        build(cloud, spec, allow_missing=True)


def test_the_steps_of_a_finished_lab_are_few_requests(lab: Lab, node: Server) -> None:
    network.ensure_floating_ip(lab.cloud, node, lab.name)
    server.wait_address(lab.cloud, node.id, lab.told)
    store.ensure_container(lab.cloud, f"{lab.prefix}-few", {})
    cloud = session.connect(lab.cloud.site)
    keypair.ensure(cloud, lab.key, lab.prefix)
    groups = network.ensure_groups(cloud, lab.groups)
    found = server.find(cloud, node.name, lab.told)
    assert found is not None
    volume.find(cloud, f"{lab.prefix}-none")
    store.ensure_container(cloud, f"{lab.prefix}-few", {})
    active = server.wait_active(cloud, found.id, lab.told)
    network.put_groups_on(cloud, active, groups)
    network.ensure_floating_ip(cloud, active, lab.name)
    credential.list_ours(cloud, lab.name)
    assert cloud.requests <= 15, cloud.traffic.log


def test_a_deleted_server_is_gone_and_can_be_deleted_again(lab: Lab) -> None:
    made = make_server(lab, f"{lab.prefix}-brief")
    lab.told.words.clear()
    assert server.delete(lab.cloud, made.id, lab.told, wait=False) is True
    # an interrupted `down`, then `up`: the server that goes is not taken for one that stays
    seen = server.find(lab.cloud, made.name)
    assert seen is None or seen.status == "DELETING"
    assert server.find(lab.cloud, made.name, lab.told) is None
    assert lab.told.words
    server.delete(lab.cloud, made.id, lab.told)  # a second time: no error
    assert server.delete(lab.cloud, "00000000-0000-0000-0000-000000000000", lab.told) is False
    with pytest.raises(CloudRefused, match="vanished"):
        server.wait_active(lab.cloud, made.id, lab.told)
