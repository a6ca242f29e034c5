#!/usr/bin/env python3
"""Throw-away machines for tests: what the sandbox's Nova driver makes of a server, without the cloud.

A node is a container with systemd, sshd and the user cc, started with the very flags of the Nova driver
(`RUN_FLAGS` there); a volume is a sparse file on a loop device that the node sees as /dev/vdb with by-id
links, as a KVM guest sees a Cinder volume. Needs root and a Docker engine, both on this machine.

Everything it makes carries the label labctl.test=1 or lies in its state directory ($LABCTL_TEST_STATE,
default /tmp/labctl-test), and it removes nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# The Nova driver's RUN_FLAGS; the restart policy makes "sudo reboot" inside a reboot.
RUN_FLAGS = [
    "--cap-add", "ALL", "--cap-drop", "SYS_RESOURCE",
    "--security-opt", "seccomp=unconfined", "--security-opt", "apparmor=unconfined",
    "--cgroupns=private", "-e", "container=docker", "-v", "/var/lib/docker",
    "--device", "/dev/fuse", "--tmpfs", "/run", "--tmpfs", "/run/lock",
    "--restart", "unless-stopped",
    "--device-cgroup-rule", "b 7:* rmw", "--device-cgroup-rule", "b 259:* rmw",
]  # fmt: skip
IMAGES = ("labctl-sandbox-node:CC-Ubuntu24.04", "osaio-node:CC-Ubuntu24.04")
NETWORKS = ("labctl-sandbox", "bridge")
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
LOOP_CTL_GET_FREE = 0x4C82  # linux/loop.h
LETTERS = "abcdefghijklmnopqrstuvwxyz"
DISK_NAMES = [f"vd{a}{b}" for a in ("", *LETTERS) for b in LETTERS][
    1:
]  # as virtio counts: vdb … vdz, vdaa …; vda is root
SSHD_SECONDS = 60
GIB = 1 << 30


class NodeError(Exception):
    """A test node couldn't be made or changed; the message says which step and what the tool answered."""


def state_dir() -> Path:
    """Where nodes' keys and volumes' files are; made on first use, 0700."""
    path = Path(os.environ.get("LABCTL_TEST_STATE", "/tmp/labctl-test"))
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path.resolve()


def container_name(name: str) -> str:
    """The container of node `name`."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,50}", name):
        raise NodeError(
            f"'{name}' can't be a node's name: lower-case letters, digits and dashes, at most 51 characters"
        )
    return f"labctl-test-{name}"


def run(*cmd: str, check: bool = True, data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run a command; NodeError with its last words if it fails and `check` is set."""
    done = subprocess.run(cmd, input=data, capture_output=True, check=False)
    if check and done.returncode:
        raise NodeError(f"{' '.join(cmd[:4])}…: exit {done.returncode}: {done.stderr.decode(errors='replace')[-800:]}")
    return done


def create(
    name: str, volumes: Sequence[float] = (), network: str = "", image: str = "", files: Sequence[str] = ()
) -> dict[str, Any]:
    """Start node `name` and wait until cc can log in.

    `volumes` are sizes in GiB of new blank volumes, `files` existing volume files of a former node (their
    name is `<volume id>.img`). Returns {"name", "address", "user", "ssh_key", "volumes": [{"id", "loop",
    "file", "dev"}]}. What was begun is removed again if it fails.
    """
    home, container = state_dir() / name, container_name(name)
    if run("docker", "container", "inspect", container, check=False).returncode == 0 or home.exists():
        raise NodeError(f"node {name} exists already; `{Path(__file__).name} destroy {name}` removes it")
    image = image or next((i for i in IMAGES if _there("image", i)), IMAGES[0])
    network = network or next((n for n in NETWORKS if _there("network", n)), NETWORKS[-1])
    try:
        home.mkdir(mode=0o700)
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", container, "-f", str(home / "key"))
        run(
            "docker", "create", "--name", container, "--hostname", name, "--network", network,
            "--label", "labctl.test=1", "--label", f"labctl.test.state={state_dir()}", *RUN_FLAGS, image,
        )  # fmt: skip
        run("docker", "cp", "-", f"{container}:/", data=_overlay(home))
        run("docker", "start", container)
        _write(home, {"name": name, "user": "cc", "ssh_key": str(home / "key"), "volumes": []})
        for size in volumes:
            attach(name, gib=size)
        for file in files:
            attach(name, file=file)
        return _wait(name)
    except BaseException:
        destroy(name)
        raise


def destroy(name: str, keep_volumes: bool = False) -> None:
    """Remove node `name`: container, loop devices, and its volumes' files unless `keep_volumes`.

    A node that doesn't exist, or only half, is no error. Kept files go to `<state>/kept/`.
    """
    container, home = container_name(name), state_dir() / name
    if _label(container) == "1":
        run("docker", "rm", "-f", "-v", container)
    if not home.is_dir():
        return
    for loop, backing in _loops():
        if backing.parent == home:
            _loop_detach(loop)
    for file in home.glob("*.img") if keep_volumes else ():
        (state_dir() / "kept").mkdir(exist_ok=True)
        file.rename(state_dir() / "kept" / file.name)
    shutil.rmtree(home)


def attach(name: str, gib: float = 0, file: str = "") -> dict[str, str]:
    """Hot-plug a volume: a new blank one of `gib` GiB, or the one in `file` (moved into the node's directory)."""
    home, record = state_dir() / name, inspect(name)
    volume = Path(file).stem if file else str(uuid.uuid4())
    target = home / f"{volume}.img"
    if file:
        if state_dir() not in Path(file).resolve().parents:
            raise NodeError(f"{file} isn't a volume of {state_dir()}; only those are moved about")
        Path(file).rename(target)
    else:
        with target.open("wb") as new:
            new.truncate(int(gib * GIB))
    used = {v["dev"] for v in record["volumes"]}
    entry = {"id": volume, "loop": _loop_attach(target), "file": str(target)}
    entry["dev"] = next(name for name in DISK_NAMES if name not in used)
    record["volumes"].append(entry)
    _write(home, record)
    execute(name, "labnode-blockdev", "attach", Path(entry["loop"]).name, entry["dev"], volume)
    return entry


def detach(name: str, volume: str) -> str:
    """Unplug a volume as the Nova driver does (lazily unmounted first); returns its file, which is kept."""
    home, record = state_dir() / name, inspect(name)
    entry = next((v for v in record["volumes"] if v["id"] == volume), None)
    if entry is None:
        raise NodeError(f"node {name} has no volume {volume}")
    if running(name):
        kernel_name = Path(entry["loop"]).name
        mounts = run("docker", "exec", container_name(name), "cat", "/proc/self/mounts").stdout.decode()
        for source, target in (line.split()[:2] for line in mounts.splitlines()):
            if re.fullmatch(rf"/dev/{kernel_name}(p\d+)?", source):
                execute(name, "umount", "-l", target, check=False)
        execute(name, "labnode-blockdev", "detach", volume)
    _loop_detach(entry["loop"])
    record["volumes"].remove(entry)
    _write(home, record)
    return str(entry["file"])


def extend(name: str, volume: str, gib: float) -> None:
    """Make a plugged volume larger, which the node sees at once, as the Nova driver does. Smaller works, too."""
    entry = next(v for v in inspect(name)["volumes"] if v["id"] == volume)
    with Path(entry["file"]).open("ab") as file:
        file.truncate(int(gib * GIB))
    run("losetup", "--set-capacity", entry["loop"])


def reboot(name: str, kill: bool = False) -> dict[str, Any]:
    """Restart the node (`kill`: without a shutdown, as a power cut) with its volumes attached."""
    stop(name, kill)
    return start(name)


def stop(name: str, kill: bool = False) -> None:
    """Power the node off; `kill` gives its processes no time."""
    run("docker", "stop", "-t", "0" if kill else "10", container_name(name))


def start(name: str) -> dict[str, Any]:
    """Power the node on and wait until cc can log in."""
    home, record = state_dir() / name, inspect(name)
    rows = []
    for entry in record["volumes"]:
        entry["loop"] = _loop_attach(Path(entry["file"]))
        rows.append({"loop": Path(entry["loop"]).name, "dev": entry["dev"], "serial": entry["id"]})
    _write(home, record)
    overlay = _tar({"volumes.json": (json.dumps(rows).encode(), 0o644, 0)})
    run("docker", "cp", "-", f"{container_name(name)}:/var/lib/labnode", data=overlay)
    run("docker", "start", container_name(name))
    return _wait(name)


def inspect(name: str) -> dict[str, Any]:
    """What `create` returned, as of now."""
    try:
        record: dict[str, Any] = json.loads((state_dir() / name / "node.json").read_text())
    except FileNotFoundError:
        raise NodeError(f"there is no node {name} in {state_dir()}") from None
    return record


def execute(name: str, *cmd: str, check: bool = True, data: bytes | None = None) -> str:
    """Run a command in the node as root, by the engine (works without network); its standard output."""
    return run("docker", "exec", "-i", container_name(name), *cmd, check=check, data=data).stdout.decode()


def running(name: str) -> bool:
    """Whether the node is powered on."""
    out = run("docker", "inspect", "-f", "{{.State.Running}}", container_name(name), check=False)
    return out.stdout.strip() == b"true"


def ssh_options(record: dict[str, Any]) -> list[str]:
    """Options and target for ssh to a node that `create` returned."""
    return [
        "-i", str(record["ssh_key"]), "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=no",
        "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5",
        f"{record['user']}@{record['address']}",
    ]  # fmt: skip


def _there(kind: str, name: str) -> bool:
    return run("docker", kind, "inspect", name, check=False).returncode == 0


def _label(container: str) -> str:
    out = run("docker", "inspect", "-f", '{{index .Config.Labels "labctl.test"}}', container, check=False)
    return out.stdout.decode().strip()


def _write(home: Path, record: dict[str, Any]) -> None:
    (home / "node.json").write_text(json.dumps(record, indent=1))


def _overlay(home: Path) -> bytes:
    """What cloud-init would have put on the machine, and what packages need to come through a TLS proxy."""
    resolvers = [ln for ln in Path("/etc/resolv.conf").read_text().splitlines() if ln.startswith("nameserver")]
    files: dict[str, tuple[bytes | None, int, int]] = {
        "/home/cc/.ssh/": (None, 0o700, 1000),
        "/home/cc/.ssh/authorized_keys": ((home / "key.pub").read_bytes(), 0o600, 1000),
        "/var/lib/labnode/": (None, 0o755, 0),
        "/var/lib/labnode/resolv.conf": ("\n".join([*resolvers, ""]).encode(), 0o644, 0),
    }
    if CA_BUNDLE.exists():
        files[str(CA_BUNDLE)] = (CA_BUNDLE.read_bytes(), 0o644, 0)
        files["/etc/pip.conf"] = (f"[global]\ncert = {CA_BUNDLE}\n".encode(), 0o644, 0)
    return _tar(files)


def _tar(files: dict[str, tuple[bytes | None, int, int]]) -> bytes:
    """{path: (content, mode, uid)} as a tar stream; content None means a directory."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, (content, mode, uid) in files.items():
            info = tarfile.TarInfo(path.strip("/"))
            info.mode, info.uid, info.gid, info.mtime = mode, uid, uid, int(time.time())
            if content is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(content)
            tar.addfile(info, None if content is None else io.BytesIO(content))
    return buffer.getvalue()


def _wait(name: str) -> dict[str, Any]:
    home, record, container = state_dir() / name, inspect(name), container_name(name)
    template = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    record["address"] = run("docker", "inspect", "-f", template, container).stdout.decode().strip()
    _write(home, record)
    deadline, words = time.monotonic() + SSHD_SECONDS, "no answer on port 22"
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((record["address"], 22), timeout=2):
            done = run("ssh", *ssh_options(record), "true", check=False)
            if done.returncode == 0:
                return record
            words = done.stderr.decode(errors="replace").strip()
        time.sleep(0.2)
    raise NodeError(f"{container} at {record['address']}: no login within {SSHD_SECONDS} s: {words}")


def _loops() -> Iterator[tuple[str, Path]]:
    """Loop devices in use, with their backing files (the kernel adds a word to a deleted one's name)."""
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            yield f"/dev/{path.parts[3]}", Path(path.read_text().strip().removesuffix(" (deleted)"))


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    with (state_dir() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _loop_attach(file: Path) -> str:
    """The loop device of a volume's file, set up if there is none."""
    with _locked():
        for loop, backing in _loops():
            if backing == file:
                return loop
        for _ in range(50):  # another program may take the free device first
            with Path("/dev/loop-control").open() as control:
                number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
            device = Path(f"/dev/loop{number}")
            if not device.exists():
                os.mknod(device, 0o660 | stat.S_IFBLK, os.makedev(7, number))
            done = run("losetup", "--partscan", str(device), str(file), check=False)
            if done.returncode == 0:
                return str(device)
            time.sleep(0.1)
    raise NodeError(f"no loop device for {file}: {done.stderr.decode(errors='replace').strip()}")


def _loop_detach(loop: str) -> None:
    for _ in range(50):  # a mount in a container that is just ending still holds it
        backing = dict(_loops()).get(loop)
        if backing is None or state_dir() not in backing.parents:
            return
        run("losetup", "--detach", loop, check=False)
        time.sleep(0.1)
    raise NodeError(f"{loop} is still in use (`losetup --list {loop}` names its file)")


def clean() -> list[str]:
    """Destroy every node of this state directory; returns their names."""
    containers = run(
        "docker", "ps", "-a", "--filter", f"label=labctl.test.state={state_dir()}", "--format", "{{.Names}}"
    ).stdout.decode()
    names = {c.removeprefix("labctl-test-") for c in containers.split()}
    names |= {path.parent.name for path in state_dir().glob("*/key")}
    for name in sorted(names):
        destroy(name)
    for loop, backing in _loops():
        if state_dir() in backing.parents:
            _loop_detach(loop)
    shutil.rmtree(state_dir() / "kept", ignore_errors=True)
    return sorted(names)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("create", "destroy", "reboot", "start", "stop", "show", "attach", "detach"):
        verbs.add_parser(verb).add_argument("name")
    new = verbs.choices["create"]
    new.add_argument("--volume", type=float, action="append", default=[], metavar="GIB")
    new.add_argument("--volume-file", action="append", default=[], metavar="FILE", help="an existing volume's file")
    new.add_argument("--network", default="")
    new.add_argument("--image", default="")
    verbs.choices["destroy"].add_argument("--keep-volumes", action="store_true")
    for verb in ("reboot", "stop"):
        verbs.choices[verb].add_argument("--kill", action="store_true", help="a power cut")
    verbs.choices["attach"].add_argument("--volume", type=float, default=0, metavar="GIB")
    verbs.choices["attach"].add_argument("--file", default="")
    verbs.choices["detach"].add_argument("volume", metavar="VOLUME_ID")
    verbs.add_parser("clean", help="destroy all nodes of this state directory")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; results are JSON on standard output."""
    args = _parser().parse_args(argv)
    actions: dict[str, Any] = {
        "create": lambda: create(args.name, args.volume, args.network, args.image, args.volume_file),
        "destroy": lambda: destroy(args.name, args.keep_volumes),
        "reboot": lambda: reboot(args.name, args.kill),
        "start": lambda: start(args.name),
        "stop": lambda: stop(args.name, args.kill),
        "show": lambda: inspect(args.name),
        "attach": lambda: attach(args.name, args.volume, args.file),
        "detach": lambda: {"file": detach(args.name, args.volume)},
        "clean": clean,
    }
    try:
        result = actions[args.verb]()
    except NodeError as error:
        print(error, file=sys.stderr)
        return 1
    if result is not None:
        print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
