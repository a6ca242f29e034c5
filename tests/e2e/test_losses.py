"""What is refused before anything is made, and what a lab survives."""

from __future__ import annotations

from pathlib import Path

from story import Commands, sandbox_cloud


def test_a_lab_whose_volume_another_server_has_is_refused_before_anything_is_made(
    lab: Commands, tmp_path: Path
) -> None:
    lab.run("up")
    other = tmp_path / "lab.yaml"
    other.write_text("lab: e2e-other\nsite: sandbox\nvolume:\n  name: block-persist-e2e\n")
    refused = lab.json("--lab", str(other), "up", expect=3)["error"]
    assert "block-persist-e2e" in refused["what"] and "node-persist-e2e" in refused["found"], refused
    cloud = sandbox_cloud()
    assert cloud.get_server("node-persist-e2e-other") is None
    assert cloud.get_security_group("labctl-e2e-other") is None
    assert not cloud.search_containers("object-persist-e2e-other")
    assert lab.json("status")["volume"]["mounted"] is True
