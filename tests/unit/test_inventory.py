"""The inventory from records: what a role would miss, or get wrong, if a variable were."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from labctl.errors import CloudRefused
from labctl.inventory import GROUP, InventorySpec, ObjectStore, document, empty, store_secret
from labctl.models import Credential, Server, Volume

SPEC = InventorySpec(
    lab="ada",
    site="sandbox",
    server="node-persist-ada",
    volume="block-persist-ada",
    container="object-persist-ada",
    ssh_key=Path("/home/ada/.ssh/id_ed25519"),
    known_hosts=Path("/home/ada/my state/known_hosts"),
    ports={"mlflow": 8000, "s3": 9000, "s3_console": 9001, "jupyter": 8888},
    images={"mlflow": "r/mlflow@sha256:1", "rclone": "r/rclone@sha256:2", "postgres": "r/pg:15"},
    s3_flavour="minio",
    insecure_registries=("172.29.0.3:5000",),
)
SERVER = Server(
    id="5b1f0d7e-0000-0000-0000-000000000000",
    name="node-persist-ada",
    status="ACTIVE",
    address="172.29.1.7",
    fixed_address="172.29.0.21",
    key_name="labctl-1",
    metadata={"labctl_lab": "ada", "labctl_credential_id": "cred-1"},
)
VOLUME = Volume("a942e4df-29bc", "block-persist-ada", 2, "in-use", SERVER.id, "/dev/vdb")
STORE = ObjectStore("http://172.29.0.2:5000/v3", "CHI@TACC")


def variables(spec: InventorySpec = SPEC, server: Server = SERVER, volume: Volume | None = VOLUME) -> dict[str, object]:
    host = document(spec, server, volume, STORE)["_meta"]["hostvars"][server.name]
    assert isinstance(host, dict)
    return host


def test_the_host_gets_exactly_the_variables_of_the_contract() -> None:
    assert set(variables()) == {
        *("ansible_host", "ansible_user", "ansible_ssh_private_key_file", "ansible_ssh_common_args"),
        "ansible_control_path",
        *("labctl_lab", "labctl_site", "docker_user", "docker_data_mount", "docker_insecure_registries"),
        *("block_volume_id", "block_volume_mount_point", "block_volume_owner", "block_volume_lab"),
        "block_volume_host_keys",
        *("rclone_remote", "rclone_remote_type", "rclone_auth_url", "rclone_region", "rclone_container"),
        *("rclone_mount_point", "rclone_views", "rclone_application_credential_id"),
        *("mlflow_stack_data_dir", "mlflow_stack_images", "mlflow_stack_ports", "mlflow_stack_bind_address"),
        *("mlflow_stack_s3_flavour", "mlflow_stack_object_view_parent", "etl_container"),
        *("mlflow_stack_allowed_hosts", "lease_guard_data_dir"),
    }


def test_the_disk_is_named_by_the_volumes_whole_id_and_never_by_a_device() -> None:
    host = variables()
    assert host["block_volume_id"] == "a942e4df-29bc"
    assert "/dev/" not in json.dumps(host)


def test_an_unknown_volume_leaves_its_id_out_so_that_the_role_stops_rather_than_guesses() -> None:
    assert "block_volume_id" not in variables(volume=None)


def test_the_object_store_is_the_one_of_its_own_region() -> None:
    host = variables()
    assert (host["rclone_auth_url"], host["rclone_region"]) == ("http://172.29.0.2:5000/v3", "CHI@TACC")
    assert host["rclone_application_credential_id"] == "cred-1"
    assert variables(replace(SPEC, credential_id="mine"))["rclone_application_credential_id"] == "mine"


def test_a_server_that_speaks_s3_gets_an_endpoint_and_a_region_that_s3_clients_accept() -> None:
    s3 = replace(SERVER, metadata={"labctl_credential_id": "key-1", "labctl_object_dialect": "s3"})
    store = ObjectStore("http://172.29.0.2:5000/v3", "us-east-1", "http://172.29.0.2:8080", "Other")
    host = document(SPEC, s3, VOLUME, store)["_meta"]["hostvars"][s3.name]
    assert {key: value for key, value in host.items() if key.startswith("rclone_")} == {
        "rclone_remote": "chi_tacc",
        "rclone_remote_type": "s3",
        "rclone_region": "us-east-1",
        "rclone_s3_provider": "Other",
        "rclone_s3_endpoint": "http://172.29.0.2:8080",
        "rclone_s3_access_key_id": "key-1",
        "rclone_container": "object-persist-ada",
        "rclone_mount_point": "/mnt/object",
        "rclone_views": ["/srv/labctl/mnt/Food-11"],
    }


def test_the_secret_goes_by_the_name_that_its_dialect_has_for_it() -> None:
    assert store_secret(Credential("a", "n", None, "x")) == {"rclone_application_credential_secret": "x"}
    assert store_secret(Credential("k", "n", None, "y", "s3")) == {"rclone_s3_secret_access_key": "y"}


def test_no_secret_can_get_into_the_inventory() -> None:
    assert "secret" not in json.dumps(variables())


def test_services_listen_on_the_loopback_unless_opened() -> None:
    assert variables()["mlflow_stack_bind_address"] == "127.0.0.1"
    assert variables(replace(SPEC, services_open=True))["mlflow_stack_bind_address"] == "0.0.0.0"


def test_mlflow_may_be_addressed_by_the_servers_address() -> None:
    assert variables()["mlflow_stack_allowed_hosts"] == [SERVER.address]
    both = variables(replace(SPEC, allowed_hosts=("lab.example.org",)))["mlflow_stack_allowed_hosts"]
    assert both == [SERVER.address, "lab.example.org"]


def test_images_go_to_the_role_that_runs_them() -> None:
    host = variables()
    assert host["mlflow_stack_images"] == {"mlflow": "r/mlflow@sha256:1", "postgres": "r/pg:15"}


def test_containers_see_the_object_mount_below_the_view_parent() -> None:
    host = variables()
    assert host["rclone_views"] == ["/srv/labctl/mnt/Food-11"]
    assert host["mlflow_stack_object_view_parent"] == "/srv/labctl/mnt"


def test_the_host_key_is_remembered_in_the_labs_own_file_even_with_a_space_in_its_path() -> None:
    arguments = shlex.split(str(variables()["ansible_ssh_common_args"]))
    assert arguments[:2] == ["-o", "UserKnownHostsFile=/home/ada/my state/known_hosts"]
    assert "StrictHostKeyChecking=accept-new" in arguments


def test_a_host_key_and_a_connection_belong_to_the_server_and_not_to_its_address() -> None:
    second = replace(SERVER, id="9e2c51aa-0000-0000-0000-000000000000")
    arguments = shlex.split(str(variables(server=second)["ansible_ssh_common_args"]))
    assert f"HostKeyAlias={second.id}" in arguments
    assert variables(server=second)["ansible_control_path"] != variables()["ansible_control_path"]


def test_what_isnt_known_is_left_out_for_the_roles_defaults() -> None:
    host = variables(replace(SPEC, images={}, ports={}, s3_flavour="", insecure_registries=()))
    for name in ("mlflow_stack_images", "mlflow_stack_ports", "mlflow_stack_s3_flavour", "docker_insecure_registries"):
        assert name not in host


def test_extra_variables_win() -> None:
    host = variables(replace(SPEC, extra={"docker_source": "docker", "docker_user": "ada"}))
    assert (host["docker_source"], host["docker_user"]) == ("docker", "ada")


def test_a_server_without_an_address_is_an_error_and_no_empty_inventory() -> None:
    with pytest.raises(CloudRefused) as caught:
        document(SPEC, replace(SERVER, address=None), VOLUME, STORE)
    assert caught.value.next_step == "labctl up"


def test_a_lab_without_a_server_still_has_the_group() -> None:
    assert empty()[GROUP] == {"hosts": []}


def test_plain_ansible_reads_the_document(tmp_path: Path) -> None:
    script = tmp_path / "inventory.sh"
    (tmp_path / "document.json").write_text(json.dumps(document(SPEC, SERVER, VOLUME, STORE)))
    script.write_text(f"#!/bin/sh\nexec cat '{tmp_path}/document.json'\n")
    script.chmod(0o755)
    command = [str(Path(sys.executable).parent / "ansible-inventory"), "-i", str(script), "--host", "node-persist-ada"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["block_volume_id"] == "a942e4df-29bc"
