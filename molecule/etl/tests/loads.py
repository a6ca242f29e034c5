"""What the tests of a load share: the node's program, the container seen from outside, small sets."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SCENARIO = Path(__file__).parents[1]
PROJECT = SCENARIO.parents[1]
sys.path[:0] = [str(PROJECT / "tests"), str(SCENARIO.parent / "rclone")]

import food11  # noqa: E402
import nodes  # noqa: E402
import store  # noqa: E402

NODE = "etl"
PROGRAM = "/usr/local/lib/labctl/labctl_etl"
SETTINGS = "/etc/labctl/etl.json"
WORK = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"])
GATEWAY = os.environ.get("LABCTL_TEST_GATEWAY", "172.29.0.1")
#: A load, with a progress file that is always new. It is killed by what that says, while it stands still: it can't be
#: further then.
KILLED = '''
import json, os, signal, subprocess, sys, time
program, layout, step, images = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
path = "/run/labctl-etl/job-killed.json"
if os.path.exists(path):
    os.unlink(path)
main = f"""
import runpy, sys
sys.path.insert(0, {os.path.dirname(program)!r})
from labctl_etl import job
job.WRITE_SECONDS = 0.01
runpy.run_module("labctl_etl", run_name="__main__")
"""
load = subprocess.Popen(["python3", "-c", main, "load", "--job", "killed", "--layout", layout],
                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
while load.poll() is None:
    load.send_signal(signal.SIGSTOP)
    try:
        found = json.load(open(path))
        if found["step"].startswith(step) and found["stages"]["load"]["images"] >= images:
            load.send_signal(signal.SIGKILL)
            break
    except (OSError, ValueError):
        pass
    load.send_signal(signal.SIGCONT)
    time.sleep(0.002)
print(load.wait())
'''


def load(*arguments: str, check: bool = True) -> dict[str, Any]:
    """The program with the settings of the last run; its last word."""
    nodes.execute(NODE, "python3", PROGRAM, "load", "--job", "test", *arguments, check=check)
    found: dict[str, Any] = json.loads(nodes.execute(NODE, "cat", "/run/labctl-etl/job-test.json"))
    return found


def killed(layout: str, step: str, images: int = 0) -> bool:
    """A load that is killed in a step, once so many images were sent. False if it was over before."""
    return nodes.execute(NODE, "python3", "-", PROGRAM, layout, step, str(images), data=KILLED.encode()).strip() == "-9"


def small_set(path: Path, prefix: str, count: int, shared: str = "", size: int = 3200) -> dict[str, str]:
    """A zip of `count` images; with `shared`, ten more that every such set has under the same names. {path: MD5}."""
    contents = {f"training/10_{prefix}{n}.jpg": f"{prefix}{n}" for n in range(count)}
    contents |= {f"training/9_{shared}{n}.jpg": f"{prefix}{shared}{n}" for n in range(10 if shared else 0)}
    made = {}
    with zipfile.ZipFile(path, "w") as archive:
        for name, seed in contents.items():
            data = hashlib.sha256(seed.encode()).digest() * (size // 32)
            archive.writestr(zipfile.ZipInfo(name, food11.TIMESTAMP), data)
            split, file = name.split("/")
            made[f"{split}/class_{int(file.split('_')[0]):02d}/{file}"] = hashlib.md5(data).hexdigest()
    return made


class Container:
    """The scenario's container by another login than the node's."""

    def __init__(self) -> None:
        self.cloud = store.connect()
        self.name = json.loads((WORK / "store.json").read_text())["container"]

    def objects(self) -> dict[str, str]:
        """{name: MD5}."""
        return {item.name: item.etag for item in self.cloud.object_store.objects(self.name)}

    def get(self, name: str) -> bytes:
        """An object's content."""
        return bytes(self.cloud.object_store.download_object(name, container=self.name))

    def shown(self) -> dict[str, str]:
        """What readers see by the manifest, {path: MD5}, once all of it was found to be there."""
        manifest, there = json.loads(self.get(".labctl/manifest.json")), self.objects()
        rows = [json.loads(line) for line in gzip.decompress(self.get(manifest["table"])).splitlines()]
        table = {row["path"]: row["md5"] for row in rows}
        if manifest["layout"] == "files":
            missing = {path: md5 for path, md5 in table.items() if there.get(path) != md5}
        else:
            missing = {
                one["object"]: one["md5"] for one in manifest["shards"] if there.get(one["object"]) != one["md5"]
            }
        assert not missing, f"readers miss {len(missing)} objects of the committed set: {sorted(missing)[:3]}"
        return table


def until(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """Wait for it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.2)
    return found


def progress(job: str) -> Mapping[str, Any]:
    """What a job on the node says, {} where it hasn't yet."""
    said = nodes.execute(NODE, "cat", f"/run/labctl-etl/job-{job}.json", check=False)
    return dict(json.loads(said)) if said.strip() else {}
