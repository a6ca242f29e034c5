"""No disk that isn't blank is ever written to, and every filesystem is mounted as it is."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(os.environ.get("MOLECULE_PROJECT_DIRECTORY", Path(__file__).parents[3]))
sys.path[:0] = [str(PROJECT / "tests"), str(Path(__file__).parent)]

import nodes  # noqa: E402
from zoo import ZOO, Animal  # noqa: E402

NODE = "volume-new"
# Puts a file (or a foreign marker) on the first filesystem of $D, so that "as it is" can be told from "as new".
KEEP = """
mkdir -p /tmp/keep; T=$D; [ ! -b $P ] || T=$P; mount $T /tmp/keep
if [ $1 = foreign ]; then
  mkdir -m 700 /tmp/keep/.labctl
  echo '{"lab": "somebody-else", "volume_id": "other", "layout_version": 1}' > /tmp/keep/.labctl/volume.json
fi
echo precious > /tmp/keep/precious; chown 4242 /tmp/keep/precious /tmp/keep; sync; umount /tmp/keep
"""


CAGES = 8  # volumes at a time: the node's udevadm looks at each of them whenever it is asked to settle
# What there is to see afterwards, without a word if nothing is mounted.
LOOK = (
    "[ ! -e /tmp/holder ] || { kill $(cat /tmp/holder); rm /tmp/holder; }; "
    "(cd $M && { cat precious; stat -c %u . ; cat .labctl/volume.json; }) 2>&1 || true; umount $M 2>/dev/null || true"
)


class Seen:
    """What the role said of an animal, the disk's digest before and after, and what is mounted then."""

    def __init__(self, before: str, after: str, said: dict[str, Any], mounted: str) -> None:
        self.before, self.after, self.said, self.mounted = before, after, said, mounted


def each(batch: list[Animal], cages: dict[str, dict[str, str]], script: Callable[[Animal], str]) -> dict[str, str]:
    """Run a script of each animal in the node, in one go; its output by name. A script that fails is an error."""
    parts = []
    for animal in batch:
        cage = cages[animal.name]
        names = f"D={cage['loop']} P={cage['loop']}p1 ID={cage['id']} M=/zoo/{animal.name}"
        parts.append(
            f'({names}\nset -eu\n{script(animal)}\n) >/tmp/said 2>&1; rc=$?; base64 -w0 /tmp/said; echo " $rc"\n'
        )
    lines = nodes.execute(NODE, "bash", "-s", data="".join(parts).encode()).splitlines()
    result = {}
    for animal, line in zip(batch, lines, strict=True):
        words, code = line.rsplit(" ", 1)
        result[animal.name] = base64.b64decode(words).decode()
        assert code == "0", (animal.name, result[animal.name])
    return result


def digests(batch: list[Animal], cages: dict[str, dict[str, str]]) -> dict[str, str]:
    nodes.execute(NODE, "sh", "-c", "sleep 1.5; udevadm settle; sync")  # what the last close set off is over then
    return each(batch, cages, lambda _animal: "sha256sum <$D")


def show(batch: list[Animal], cages: dict[str, dict[str, str]], work: Path) -> dict[str, dict[str, Any]]:
    """Lead the role past the animals; what it said of each."""
    rows = [{"name": a.name, "id": cages[a.name]["id"], "format": a.format, "check": a.check} for a in batch]
    said, record = work / f"{batch[0].name}.json", nodes.inspect(NODE)
    (work / "vars.json").write_text(json.dumps({"zoo": rows, "zoo_results": str(said)}))
    (work / "hosts").write_text(
        f"{NODE} ansible_host={record['address']} ansible_user=cc ansible_ssh_private_key_file={record['ssh_key']} "
        "ansible_ssh_common_args='-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null'\n"
    )
    book = Path(__file__).parents[1] / "zoo.yml"
    run = subprocess.run(
        ["ansible-playbook", "-i", work / "hosts", "-e", f"@{work / 'vars.json'}", book],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "ANSIBLE_ROLES_PATH": str(PROJECT / "roles"), "ANSIBLE_PIPELINING": "1"},
    )
    assert said.exists(), run.stdout[-3000:] + run.stderr[-3000:]
    result: dict[str, dict[str, Any]] = json.loads(said.read_text())
    return result


@pytest.fixture(scope="module")
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """Makes the animals of the tests that were chosen, shows them to the role, and looks at them again."""
    work, result = tmp_path_factory.mktemp("zoo"), {}
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    chosen = [p["animal"] for p in params if "animal" in p]
    for batch in (chosen[at : at + CAGES] for at in range(0, len(chosen), CAGES)):
        cages = {a.name: nodes.attach(NODE, gib=a.mib / 1024) for a in batch}
        try:
            each(batch, cages, lambda a: a.make + (f"\nset -- {a.keep}\n{KEEP}" if a.keep else ""))
            before = digests(batch, cages)
            said = show(batch, cages, work)
            after = digests(batch, cages)
            mounted = each(batch, cages, lambda _animal: LOOK)
        finally:
            for cage in cages.values():
                Path(nodes.detach(NODE, cage["id"])).unlink()
        result.update({n: Seen(before[n], after[n], said[n], mounted[n]) for n in cages})
    return result


def animals(*expect: str) -> list[Any]:
    return [pytest.param(a, id=a.name) for a in ZOO if a.expect in expect]


@pytest.mark.parametrize("animal", animals("stop"))
def test_a_disk_that_might_hold_data_is_byte_identical_afterwards(seen: dict[str, Seen], animal: Animal) -> None:
    it = seen[animal.name]
    assert it.after == it.before
    assert it.said.get("failed") and it.said.get("safety_stop"), it.said
    assert it.said["changed"] is False
    assert animal.words in it.said["msg"]
    assert it.said["next_step"]


@pytest.mark.parametrize("animal", animals("use"))
def test_a_filesystem_is_mounted_as_it_is(seen: dict[str, Seen], animal: Animal) -> None:
    it = seen[animal.name]
    assert not it.said.get("failed"), it.said
    assert it.said["plan"] == "use"
    precious, owner, marker = it.mounted.split("\n", 2)
    assert (precious, owner) == ("precious", "4242")
    assert json.loads(marker)["origin"] == "adopted"


@pytest.mark.parametrize("animal", animals("initialise"))
def test_a_blank_disk_is_initialised_in_the_same_run(seen: dict[str, Seen], animal: Animal) -> None:
    it = seen[animal.name]
    assert not it.said.get("failed"), it.said
    assert it.said["changed"] and it.said["plan"] == "initialise"
    if animal.check:
        assert it.after == it.before
        return
    _missing, owner, marker = it.mounted.split("\n", 2)
    assert owner == "1000"
    assert json.loads(marker)["origin"] == "initialised"
