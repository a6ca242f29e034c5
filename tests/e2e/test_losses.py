"""What is refused before anything is made, and what a lab survives."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from story import Commands, Evidence, logging, sandbox_cloud

VOLUMES = Path(os.environ.get("LABCTL_SANDBOX_STATE", "/var/lib/labctl-sandbox"), "volumes")


def test_a_lab_whose_volume_another_server_has_is_refused_before_anything_is_made(
    lab: Commands, tmp_path: Path
) -> None:
    lab.run("up")
    other = tmp_path / "lab.yaml"
    other.write_text("lab: e2e-other\nsite: sandbox\nvolume:\n  name: block-persist-e2e\n")
    refused = lab.json("--lab", str(other), "up", expect=3)["error"]
    assert "block-persist-e2e" in refused["what"] and "belongs to the lab e2e" in refused["found"], refused
    cloud = sandbox_cloud()
    assert cloud.get_server("node-persist-e2e-other") is None
    assert cloud.get_security_group("labctl-e2e-other") is None
    assert lab.json("--lab", str(other), "status")["object_store"]["objects"] is None
    assert lab.json("status")["volume"]["mounted"] is True


def test_a_volume_with_unknown_content_is_exit_6_and_byte_identical(lab: Commands, tmp_path: Path) -> None:
    cloud = sandbox_cloud()
    volume = cloud.create_volume(1, name="block-persist-e2e-unknown", wait=True)
    backing = VOLUMES / f"volume-{volume.id}"
    with backing.open("r+b") as handle:
        handle.seek(512 * 1024 * 1024 + 4096)
        handle.write(b"the only copy of somebody's thesis")
    before = hashlib.sha256(backing.read_bytes()).hexdigest()
    other = tmp_path / "lab.yaml"
    other.write_text("lab: e2e-unknown\nsite: sandbox\n")
    try:
        refused = lab.json("--lab", str(other), "up", expect=6)["error"]
        assert "data of an unknown kind" in refused["what"] and str(512 * 1024 * 1024 + 4096) in refused["found"]
        lab.run("--lab", str(other), "ssh", "--", "sync; findmnt /mnt/block && exit 1; exit 0")
        lab.run("--lab", str(other), "down", "--force")
        assert hashlib.sha256(backing.read_bytes()).hexdigest() == before
    finally:
        lab.run("--lab", str(other), "--yes", "destroy", "--force")


def test_the_volume_torn_away_while_postgresql_writes_comes_back_with_all_that_was_acknowledged(lab: Commands) -> None:
    lab.run("verify")
    before = Evidence.collect(lab)
    cloud = sandbox_cloud()
    server, volume = cloud.get_server("node-persist-e2e"), cloud.get_volume("block-persist-e2e")
    with logging(lab, "torn") as acknowledged:
        cloud.compute.delete_volume_attachment(server.id, volume.id)
        cloud.block_storage.wait_for_status(volume, "available", failures=["error"], wait=60)
    assert lab.json("status")["volume"]["attached"] is False
    assert lab.json("reattach-volume")["earlier_runs"] >= 1
    after = Evidence.collect(lab)
    assert not before.lost(after)
    assert not [run for run, value in acknowledged.items() if after.runs.get(run, {}).get("number") != value]
