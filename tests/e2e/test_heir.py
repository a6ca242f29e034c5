"""A lab whose volume is lost altogether comes back from its backups under another name, on another machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from story import Commands, Evidence, Mlflow

HEIR = "e2e-heir"


@pytest.mark.slow
@pytest.mark.parametrize("road", ["--key-file", "--new-secrets"])
def test_another_lab_takes_over_from_a_backup(lab: Commands, road: str, tmp_path: Path) -> None:
    lab.run("up")
    with lab.tunnel():
        Mlflow().log_run(f"heir{road}", {"loss": 0.5}, road.encode() * 4096)
    before = Evidence.collect(lab)
    key = lab.json("backup")["key_file"]
    heir = Commands(tmp_path, quiet=True, environment={"LABCTL_STATE": str(tmp_path / "state")})
    heir.run("init", HEIR)
    try:
        chosen = [road, key] if road == "--key-file" else [road]
        with pytest.raises(AssertionError, match=re.escape("--key-file")):
            heir.run("restore", "--from-lab", "e2e")  # the key isn't on this machine
        heir.run("restore", "--from-lab", "e2e", *chosen)
        after = Evidence.collect(heir)
        assert before.runs and before.artifacts
        lost = before.lost(after)
        if road == "--key-file":
            assert not lost
        else:
            assert lost and all(path.startswith(".labctl/secrets/") for path in lost), "passwords alone are others"
        assert heir.json("converge")["changed"] == 0
    finally:
        heir.run("--yes", "destroy", "--force")
