"""Runs the role's module in a node without Ansible's connection: the same code, a second sooner, and under strace.

`strace` kills a run at a chosen write to the disk, which is how the sweep over all its steps works.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import ansible.module_utils

PROJECT = Path(os.environ.get("MOLECULE_PROJECT_DIRECTORY", Path(__file__).parents[3]))
sys.path[:0] = [str(PROJECT / "tests")]

import nodes  # noqa: E402

ROLE = PROJECT / "roles/block_volume"
HOME = "/opt/direct"


def install(node: str) -> None:
    """Puts Ansible's module library and the role's module into a node."""
    library = Path(ansible.module_utils.__file__).parent
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(library.parent / "release.py", "ansible/release.py")
        tar.add(library, "ansible/module_utils", filter=lambda info: None if "__pycache__" in info.name else info)
        for file in (ROLE / "module_utils").glob("*.py"):
            tar.add(file, f"ansible/module_utils/{file.name}")
        tar.add(ROLE / "library/block_volume.py", "block_volume.py")
        for name in ("ansible/__init__.py",):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    nodes.execute(node, "mkdir", "-p", HOME)
    nodes.execute(node, "tar", "-x", "-C", HOME, data=buffer.getvalue())


def run(node: str, *prefix: str, check: bool = False, **params: Any) -> dict[str, Any]:
    """What the module said; "killed" if it said nothing. `prefix` is a command that runs it."""
    args = {"mount_point": "/mnt/direct", "lab": "molecule", "owner": "cc", "wait": 10, **params}
    document = {"ANSIBLE_MODULE_ARGS": {**args, "_ansible_check_mode": check, "_ansible_diff": True}}
    nodes.execute(node, "sh", "-c", f"cat > {HOME}/args.json", data=json.dumps(document).encode())
    done = subprocess.run(
        ["docker", "exec", "-e", f"PYTHONPATH={HOME}", nodes.container_name(node), *prefix,
         "python3", "-W", "ignore", f"{HOME}/block_volume.py", f"{HOME}/args.json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    try:
        said: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return {"killed": True, "rc": done.returncode, "words": done.stdout + done.stderr}
    return said
