"""`make bench-data`: a dataset into the store and back, labctl's two layouts against the tutorial's own commands.

All of it on one node, with one generated set, against the sandbox's real Swift, in one run; the order changes from
repetition to repetition, medians count. Times are taken on the node, so neither side pays for logging in. Requests are
counted in Swift's own log. Prints tables, writes build/bench-data.json (ratios) and build/bench-data-all.json (all).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import tutorial_data as tutorial

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "molecule" / "rclone"))
import food11
import nodes
import store

REPOSITORY = Path(__file__).parents[2]

#: A run has a node of its own, so that two may go on side by side.
NODE, GATEWAY = f"bench-data-{os.getpid()}", "172.29.0.1"
SANDBOX = Path(os.environ.get("LABCTL_SANDBOX_STATE", "/var/lib/labctl-sandbox"))
HOME = REPOSITORY / "build" / "bench-data"
ETL, VIEW = "/usr/local/lib/labctl/labctl_etl", "/usr/local/lib/labctl/object-view"
CACHE, TREE, PROGRAM = "/var/cache/rclone-object", "/srv/bench/tree", "/srv/bench/on_node.py"
MOUNT, UNMOUNT = "systemctl start rclone-object", f"systemctl stop rclone-object; rm -rf {CACHE}/vfs {CACHE}/vfsMeta"
WATCHED = ("/var/lib/docker/volumes", "/var/lib/labctl", CACHE)
RELAY_PORT, RELAY_USER = 7999, "nobody"
#: Milliseconds on the way to the store, and as many on the way back.
READERS, DELAY_MS = 4, 10
#: Passes after the first one and the second: each takes a tenth of a second, and the machine is never quite still.
AGAIN = 12
PLAY = """
- hosts: all
  become: true
  gather_facts: true
  gather_subset: ["!all", "!min", distribution, pkg_mgr, architecture]
  vars: {variables}
  roles: [docker, rclone]
  tasks:
    - ansible.builtin.include_role: {{name: etl, tasks_from: install}}
"""


def on_node(script: str, check: bool = True) -> str:
    """Run a script on the node as root; its output."""
    return nodes.execute(NODE, "bash", "-c", script, check=check)


def timed(script: str) -> float:
    """Seconds that a script takes on the node, by the node's clock."""
    out = on_node(f"began=$(date +%s.%N); set -e; {{ {script} ; }} >/tmp/out 2>&1; echo $(date +%s.%N) $began")
    ended, began = map(float, out.split()[-2:])
    return ended - began


@contextmanager
def watched(container: str, measured: dict[str, Any], folders: Sequence[str] = ()) -> Iterator[None]:
    """Requests to Swift; peak memory (bytes, both sides' programs) and disk of the folders (bytes over the start)."""
    program = ["docker", "exec", "-i", nodes.container_name(NODE), "python3", PROGRAM, "watch", *folders]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout
        watcher.stdout.readline()  # ready
        began = time.time()
        try:
            yield
        finally:
            measured |= json.loads(watcher.communicate()[0])
            time.sleep(1)  # the log is written a moment later
            measured["requests"] = requests(container, began)


def requests(container: str, since: float) -> int:
    """Requests for a container that the sandbox's Swift began to answer since then."""
    log = subprocess.run(
        ["docker", "exec", "labctl-sandbox", "journalctl", "-u", "swift-proxy", "--no-pager", "-o", "cat",
         f"--since=@{since - 1:.0f}"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    ours = [line for line in log.splitlines() if re.search(rf"/{re.escape(container)}[/ ?%]", line)]
    # a request's line ends in its begin, its end and the policy; others tell of a reader that went away
    begun = [float(found[1]) for line in ours if (found := re.search(r" (\d+\.\d+) \d+\.\d+ \S+$", line))]
    return sum(1 for at in begun if at >= since)


# -- the two sides -------------------------------------------------------------------------------------------------


class Bench:
    """The node, its container, and the set on an HTTP server."""

    def __init__(self, url: str, container: str, images: dict[str, str], store_address: str) -> None:
        self.url, self.container, self.images, self.store = url, container, images, store_address
        self.rclone = "rclone --config /etc/rclone/rclone.conf"
        self.settings = json.loads(on_node("cat /etc/labctl/etl.json"))

    def emptied(self) -> None:
        """An empty container, and a mount that knows it; the sets of other runs are no run's business."""
        on_node(
            f"{UNMOUNT}; {self.rclone} delete --rmdirs chi_tacc:{self.container} --transfers 32 --checkers 32; {MOUNT}"
        )

    def describe(self, **source: str) -> None:
        """What labctl's program loads next: a folder or a URL."""
        dataset = {**self.settings["dataset"], "url": "", "folder": "", **source}
        dataset["rule"] = "folder" if source.get("folder") else "prefix"
        nodes.execute(NODE, "tee", "/etc/labctl/etl.json",
                      data=json.dumps({**self.settings, "dataset": dataset}).encode())  # fmt: skip

    def labctl(self, layout: str) -> str:
        """The command that loads what is described."""
        return f"python3 {ETL} load --layout {layout}"

    def load(self, side: str) -> float:
        """Seconds that the finished tree on the node's disk takes into the container."""
        self.emptied()
        if side == "tutorial":
            return timed(tutorial.load(self.images["rclone"], TREE, self.container))
        self.describe(folder=TREE)
        return timed(self.labctl(side))

    def etl(self, side: str) -> dict[str, float]:
        """From the archive's URL to a set in the container: seconds, peaks, requests."""
        self.emptied()
        measured: dict[str, float] = {}
        with watched(self.container, measured, WATCHED):
            if side == "tutorial":
                measured["seconds"] = timed("cd /srv/bench && " + tutorial.etl())
            else:
                self.describe(url=self.url)
                measured["seconds"] = timed(self.labctl(side))
        return measured

    def passes(self, side: str, seed: int) -> dict[str, Any]:
        """A first and second passes over what is in the container. The first begins with the mount, nothing cached.

        A second pass of labctl's takes so little that what else the machine does shows: so AGAIN of them, each beside
        one over the tree on the node's own disk, either of them first in turn.
        """
        place = tutorial.MOUNT if side == "tutorial" else "/mnt/object"
        first: dict[str, Any] = {}
        self.uncached()
        try:
            with watched(self.container, first):
                mounting = timed(tutorial.mount(self.container) if side == "tutorial" else MOUNT)
                first |= epoch(place, seed)
                first["seconds"] += mounting
            second, disk = [epoch(place, seed + 1)], []
            for number in range(0 if side == "tutorial" else AGAIN):
                turns = [(disk, TREE), (second, place)]
                for passes, root in turns[:: 1 if number % 2 else -1]:
                    passes.append(epoch(root, number))
        finally:
            if side == "tutorial":
                on_node(tutorial.unmount())
        return {"first": first, "second": second, "disk": disk}

    def prefetched(self, seed: int) -> dict[str, Any]:
        """As `first`, with `labctl prefetch` ahead of it, which is part of the time."""
        self.uncached()
        seconds = timed(f"{MOUNT}; {VIEW} prefetch")
        found = epoch("/mnt/object", seed)
        return {**found, "seconds": found["seconds"] + seconds}

    def uncached(self) -> None:
        """Nothing mounted, and nothing of the set in rclone's cache; the kernel's pages of it go with both."""
        on_node(UNMOUNT)

    def round_trips(self) -> float:
        """Seconds that the store takes for a small answer on a new connection: two round trips and its own time."""
        ask = f"curl -s -o /dev/null -w '%{{time_total}}\\n' http://{self.store}:5000/v3"
        return statistics.median(float(on_node(ask)) for _ in range(5))

    def unchanged(self, side: str) -> float:
        """Requests of a second load of the same."""
        measured: dict[str, float] = {}
        with watched(self.container, measured):
            timed(tutorial.load(self.images["rclone"], TREE, self.container, keep=True)
                  if side == "tutorial" else self.labctl(side))  # fmt: skip
        return measured["requests"]


def epoch(place: str, seed: int) -> dict[str, Any]:
    """Every file once, in random order: seconds, files, digest of all contents."""
    found: dict[str, Any] = json.loads(on_node(f"python3 {PROGRAM} epoch {place} {seed} {READERS}"))
    return found


# -- the run -------------------------------------------------------------------------------------------------------


def measure(bench: Bench, repetitions: int) -> dict[str, Any]:
    """All of it, side by side. {measure: {side: [values]}}."""
    found: dict[str, dict[str, list[Any]]] = {}

    def note(measure_: str, side: str, value: Any) -> None:
        found.setdefault(measure_, {}).setdefault(side, []).append(value)
        shown = {key: one for key, one in value.items() if key != "digest"} if isinstance(value, dict) else value
        print(f"  {measure_:<12} {side:<9} {json.dumps(shown)}", flush=True)

    digests = {epoch(TREE, 0)["digest"]}
    for number in range(repetitions):
        sides = ["tutorial", "files", "packed"]
        for side in sides[number % 3 :] + sides[: number % 3]:
            note("load", side, round(bench.load(side), 3))
            both = bench.passes(side, number)
            digests |= {one["digest"] for one in (both["first"], *both["second"], *both["disk"])}
            note("first", side, both["first"])
            for one in both["second"]:
                note("second", side, one)
            for one, again in zip(both["disk"], both["second"][1:], strict=True):
                note("second", "disk", one)
                note("vs_disk", side, round(one["seconds"] / again["seconds"], 3))
            if side != "tutorial":
                ahead = bench.prefetched(number)
                digests.add(ahead["digest"])
                note("prefetched", side, ahead)
            note("etl", side, bench.etl(side))
            note("unchanged", side, bench.unchanged(side))
    if len(digests) != 1:
        raise SystemExit(f"the contents differ between layouts: {digests}")
    print("every file read through every mount has the hash that it has on the disk")
    return found


def delayed(bench: Bench) -> dict[str, Any]:
    """Load, first and second pass with DELAY_MS in each direction between node and store; and how that was made."""
    found: dict[str, Any] = {}
    near = bench.round_trips()
    with delay(bench.store) as found["by"]:
        far = bench.round_trips()
        if far - near < 2 * DELAY_MS / 1000:
            raise SystemExit(f"there is no delay: an answer of the store takes {far:.3f} s, {near:.3f} s without it")
        for side in ("tutorial", "files", "packed"):
            seconds = bench.load(side)
            both = bench.passes(side, 7)
            second = middle(both["second"], "seconds")
            found[side] = {"load": seconds, "first": both["first"]["seconds"], "second": second}
            if side != "tutorial":
                found[side]["prefetched"] = bench.prefetched(9)["seconds"]
            print(f"  {DELAY_MS} ms delay  {side:<9} {json.dumps(found[side])}", flush=True)
    return found


@contextmanager
def delay(store_address: str) -> Iterator[str]:
    """A round trip to the store takes 2 * DELAY_MS longer. Yields how: by the kernel (netem), or else by a relay."""
    netem = f"tc qdisc add dev eth0 root netem delay {2 * DELAY_MS}ms"  # all of it on the way out
    if subprocess.run(
        ["docker", "exec", nodes.container_name(NODE), "sh", "-c", netem], check=False, capture_output=True
    ).returncode == 0:  # fmt: skip
        try:
            yield "tc netem on the node's eth0"
        finally:
            on_node("tc qdisc del dev eth0 root")
        return
    # What the node, and containers on it, send to the store goes to the relay; what the relay sends doesn't.
    rules = f"""
add table ip bench
add chain ip bench out {{ type nat hook output priority -100; }}
add chain ip bench pre {{ type nat hook prerouting priority -100; }}
add rule ip bench out ip daddr {store_address} meta skuid != {RELAY_USER} meta l4proto tcp redirect to :{RELAY_PORT}
add rule ip bench pre ip daddr {store_address} meta l4proto tcp redirect to :{RELAY_PORT}
"""
    command = ["docker", "exec", "-u", RELAY_USER, nodes.container_name(NODE), "python3", PROGRAM, "relay",
               str(RELAY_PORT), str(DELAY_MS)]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as relay:
        assert relay.stdout
        number = int(relay.stdout.readline())  # its process; it listens now
        try:
            nodes.execute(NODE, "nft", "-f", "-", data=rules.encode())
            yield "a TCP relay on the node, as this kernel has no netem"
        finally:
            on_node(f"nft delete table ip bench; kill {number}", check=False)


def middle(values: list[Any], key: str = "") -> float:
    """The median, of a key of each."""
    return statistics.median(float(value[key] if key else value) for value in values)


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """What issue 5 asks for: labctl against the tutorial, higher is better but for the last two."""

    def times(measure_: str, side: str, key: str = "") -> float:
        return middle(found[measure_]["tutorial"], key) / middle(found[measure_][side], key)

    document = {
        "load_packed_x": times("load", "packed"),
        "load_files_x": times("load", "files"),
        "first_pass_packed_x": times("first", "packed", "seconds"),
        "first_pass_files_x": times("first", "files", "seconds"),
        "second_pass_vs_disk": middle(found["vs_disk"]["packed"]),
        "etl_files_x": times("etl", "files", "seconds"),
        "etl_packed_x": times("etl", "packed", "seconds"),
        "peak_disk_ratio": middle(found["etl"]["files"], "disk") / middle(found["etl"]["tutorial"], "disk"),
        "unchanged_requests": max(middle(found["unchanged"][side]) for side in ("files", "packed")),
    }
    return {key: round(value, 3) for key, value in document.items()}


def table(found: dict[str, Any], slow: dict[str, Any]) -> str:
    """Medians, a measure a row; below, one measurement with a delay on the way to the store."""
    rows = [("load", "", "s"), ("first", "seconds", "s"), ("first", "requests", ""), ("first", "memory", "MB"),
            ("prefetched", "seconds", "s"), ("second", "seconds", "s"), ("etl", "seconds", "s"), ("etl", "disk", "MB"),
            ("etl", "memory", "MB"), ("etl", "requests", ""), ("unchanged", "", "requests")]  # fmt: skip
    sides = ("tutorial", "files", "packed", "disk")
    lines = [f"{'':<22}" + "".join(f"{side:>12}" for side in sides)]

    def line(name: str, values: list[float | None]) -> None:
        lines.append(f"{name:<22}" + "".join(f"{'':>12}" if one is None else f"{one:12.2f}" for one in values))

    for measure_, key, unit in rows:
        each = [found[measure_].get(side) for side in sides]
        scale = 1e6 if unit == "MB" else 1
        line(f"{measure_} {key} {unit}", [middle(values, key) / scale if values else None for values in each])
    lines.append(f"with {DELAY_MS} ms in each direction, once, by {slow['by']}:")
    for measure_ in ("load", "first", "prefetched", "second"):
        line(f"{measure_} s", [slow[side].get(measure_) for side in sides[:3]])
    for measure_ in ("load", "first", "second"):
        line(f"{measure_} tutorial/this", [slow["tutorial"][measure_] / slow[side][measure_] for side in sides[:3]])
    return "\n".join(lines)


def image(name: str) -> str:
    """What the nodes pull an image of the tutorial's by; made if the sandbox doesn't have it."""
    done = subprocess.run([Path(sys.executable).parent / "labctl", "--json", "sandbox", "image", name],
                          stdout=subprocess.PIPE, text=True, check=True)  # fmt: skip
    return str(json.loads(done.stdout)["reference"])


def prepared(archive: Path, url: str, roles: str) -> Bench:
    """The node with everything installed on it, the set's tree on its disk, the images pulled."""
    record = nodes.create(NODE)
    made = HOME / "store.json"
    store.make(made)
    known = json.loads(made.read_text())
    sandbox = json.loads((SANDBOX / "images.json").read_text())
    images = {name: image(name) for name in ("python", "rclone")}
    variables = {
        "docker_insecure_registries": [one for one in [sandbox["registry"]] if one],
        "rclone_auth_url": known["auth_url"], "rclone_region": known["region"], "rclone_container": known["container"],
        "rclone_application_credential_id": known["application_credential_id"], "etl_container": known["container"],
        "etl_dataset": {"name": "food11", "url": url},
    }  # fmt: skip
    (HOME / "play.yml").write_text(PLAY.format(variables=json.dumps(variables)))
    (HOME / "inventory").write_text(
        f"{NODE} ansible_host={record['address']} ansible_user=cc ansible_ssh_private_key_file={record['ssh_key']}"
        " ansible_ssh_common_args='-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null'\n"
    )
    secret = HOME / "secret.json"
    secret.touch(mode=0o600)
    secret.write_text(json.dumps({"rclone_application_credential_secret": known["application_credential_secret"]}))
    command = ["ansible-playbook", "-i", HOME / "inventory", HOME / "play.yml", "-e", f"@{secret}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False,
                          env={**os.environ, "ANSIBLE_ROLES_PATH": roles, "ANSIBLE_PIPELINING": "1"})  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stdout[-4000:])
    on_node(f"mkdir -p /srv/bench; apt-get install -y -q unzip >/dev/null; docker pull -q {images['python']};"
            f" docker pull -q {images['rclone']}; cp /home/cc/.config/rclone/rclone.conf /srv/bench/")  # fmt: skip
    nodes.execute(NODE, "tee", PROGRAM, data=(Path(__file__).parent / "on_node.py").read_bytes())
    compose = tutorial.compose(url, archive.name, known["container"], images)
    nodes.execute(NODE, "tee", "/srv/bench/docker-compose-etl.yaml", data=compose.encode())
    nodes.execute(NODE, "python3", "-", url, TREE, data=tutorial.UNPACK.encode())
    return Bench(url, known["container"], images, str(urlsplit(known["auth_url"]).hostname))


def main() -> int:
    """Run everything, clean up, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--pixels", type=int, default=300, help="width and height; the real set's are about 512")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--roles", default=str(REPOSITORY / "roles"))
    chosen = parser.parse_args()
    HOME.mkdir(parents=True, exist_ok=True)
    archive = HOME / "Food-11.zip"
    print(food11.make(archive, chosen.images, chosen.pixels), flush=True)
    server = food11.server(archive, GATEWAY, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        bench = prepared(archive, f"http://{GATEWAY}:{server.server_address[1]}/{archive.name}", chosen.roles)
        found = measure(bench, chosen.repetitions)
        slow = delayed(bench)
    finally:
        nodes.destroy(NODE)
        store.remove(HOME / "store.json")
        for name in ("secret.json", "Food-11.zip"):
            (HOME / name).unlink(missing_ok=True)
        server.shutdown()
    document = ratios(found)
    build = REPOSITORY / "build"
    (build / "bench-data.json").write_text(json.dumps(document, indent=2) + "\n")
    (build / "bench-data-all.json").write_text(json.dumps({**found, "delayed": slow}, indent=1) + "\n")
    print(table(found, slow))
    print("\n".join(f"{key:<22} {value:10.2f}" for key, value in document.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
