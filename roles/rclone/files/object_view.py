#!/usr/bin/python3 -IS
"""Shows the committed version of the dataset at the mount point and its views, whatever its layout in the store.

    object-view refresh     read the manifest anew and show what it says; JSON on stdout
    object-view clear       unmount everything of ours; what anybody holds open stays until it is closed
    object-view status      what is shown and what rclone says of it; JSON on stdout
    object-view prefetch    fill the cache with the set; JSON lines on stdout
    object-view inspect     the manifest and sample images; JSON on stdout

rclone mounts the container at RAW, in two folders: `files` is all of it but .labctl, `labctl` is .labctl. A set of
layout `packed` is squashfs images in there, each on a loop device, merged by overlay into one tree; everything else
is shown as `files` has it, less what loads that are under way, were cut off, or were replaced have put there. Runs as
root; written by labctl (role rclone).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import stat
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CONFIG = Path("/etc/labctl/object-view.json")
HOME = Path("/run/labctl")
RAW = HOME / "object"
VIEWS = HOME / "object-views"
STATE = HOME / "object-view.json"
#: The packed version whose files were compared last. Versions never change, so after a crash that isn't done again.
VERIFIED = HOME / "object-view.verified"
LOCK = HOME / "object-view.lock"
#: The name that a merged tree's mount carries, by which it is known as ours.
SOURCE = "labctl-object"
#: Files whose hash is compared before a packed version is shown. All images' sizes are compared as well.
SAMPLES = 8
#: What overlayfs takes (OVL_MAX_STACK), less the empty layer that a single image needs.
MAX_SHARDS = 499
LOOP_MAJOR, LOOP_CTL_GET_FREE, LOOP_CONFIGURE = 7, 0x4C82, 0x4C0A  # linux/loop.h
LO_FLAGS_READ_ONLY, LO_FLAGS_AUTOCLEAR = 1, 4
LOOP_TRIES = 3  # another program may take the free device first
MS_RDONLY, MS_NOSUID, MS_NODEV, MNT_DETACH = 1, 2, 4, 2  # linux/mount.h
SYS_OPEN_TREE, SYS_MOVE_MOUNT = 428, 429  # the same number on every architecture
OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_BENEATH, AT_FDCWD = 1, 4, 0x200, -100
AT_STATX_FORCE_SYNC, STATX_BASIC_STATS = 0x2000, 0x7FF

libc = ctypes.CDLL(None, use_errno=True)


class Failed(Exception):
    """What is wrong with what the store holds, or with the host; what is shown stays as it was."""


def checked(result: int, what: str) -> int:
    """The result of a call of libc; OSError if it failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


# -- rclone --------------------------------------------------------------------------------------------------------


def ask(config: dict[str, Any], command: str, timeout: float = 120, **parameters: Any) -> dict[str, Any]:
    """rclone's answer to a control command. Raises OSError where it doesn't answer, Failed with its own words."""
    from http.client import HTTPConnection  # slow to import; what heals a mount doesn't need it
    from socket import AF_UNIX, socket

    control = HTTPConnection("rclone", timeout=timeout)
    control.sock = socket(AF_UNIX)
    control.sock.settimeout(timeout)
    try:
        control.sock.connect(config["socket"])
        control.request("POST", f"/{command}", json.dumps(parameters), {"Content-Type": "application/json"})
        response = control.getresponse()
        answer: dict[str, Any] = json.loads(response.read())
    finally:
        control.close()
    if response.status != 200:
        raise Failed(f"rclone {command}: {answer.get('error', response.status)}")
    return answer


# -- mounts --------------------------------------------------------------------------------------------------------


def mounts() -> list[tuple[str, str, str]]:
    """(place, type, source) of every mount, in the order in which they were made."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        kind, source = after.split()[:2]
        found.append((before.split()[4].encode().decode("unicode_escape"), kind, source))
    return found


def ours(place: str, kind: str, source: str) -> bool:
    """Whether a mount at a place of ours is one that we (or a `rclone mount` by hand) made."""
    return kind == "fuse.rclone" or source == SOURCE or place.startswith(f"{VIEWS}/")


def detach(place: str | Path) -> None:
    """Unmount, also what is in use: whoever holds a file in it keeps that file until it is closed."""
    checked(libc.umount2(os.fsencode(place), MNT_DETACH), f"umount {place}")


def unmount(place: str | Path) -> bool:
    """Unmount; whether nobody held anything in it."""
    if libc.umount2(os.fsencode(place), 0) == 0:
        return True
    detach(place)
    return False


def mount(source: str, place: Path, kind: str, options: str = "", flags: int = MS_RDONLY) -> None:
    """mount(2), read-only if nothing else is said."""
    flags |= MS_NOSUID | MS_NODEV
    result = libc.mount(os.fsencode(source), os.fsencode(place), kind.encode(), flags, options.encode())
    checked(result, f"mount {source} at {place} ({kind} {options[:80]})")


def loop_devices() -> Iterator[str]:
    """Loop devices that may be free. Where there is no /dev/loop-control (in a container), one after the other."""
    try:
        with open("/dev/loop-control", "rb") as control:
            numbers: Sequence[int] = [fcntl.ioctl(control, LOOP_CTL_GET_FREE)]
    except OSError:
        numbers = range(256)
    for number in numbers:
        device = f"/dev/loop{number}"
        if not os.path.exists(device):
            os.mknod(device, 0o660 | stat.S_IFBLK, os.makedev(LOOP_MAJOR, number))
        yield device


def loop_mount(image: Path, place: Path) -> None:
    """Mount a squashfs image by a loop device that goes with the mount (as `mount -o loop,ro` does)."""
    # struct loop_config: fd, block size, struct loop_info64 (flags at 52), reserved
    info = struct.pack("=52xI176x", LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR)
    with image.open("rb") as file:
        wanted = struct.pack("=II", file.fileno(), 0) + info + bytes(64)
        for _ in range(LOOP_TRIES):
            for device in loop_devices():
                with suppress(OSError), open(device, "rb", buffering=0) as loop:
                    if configured(loop.fileno(), wanted):
                        mount(device, place, "squashfs")
                        return
    raise Failed(f"there is no loop device for {image}; `losetup --list` shows who has them")


def configured(loop: int, wanted: bytes) -> bool:
    """Whether the loop device took the image; False for one that is in use."""
    try:
        fcntl.ioctl(loop, LOOP_CONFIGURE, wanted)
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.ENXIO, errno.EACCES):
            return False
        raise
    return True


def put(source: Path, place: str) -> bool:
    """Show source at place. What was shown there stays until this is: nobody ever looks at an empty folder.

    Whether nobody held a file in what was shown before.
    """
    tree = checked(libc.syscall(SYS_OPEN_TREE, AT_FDCWD, os.fsencode(source), OPEN_TREE_CLONE), f"open_tree {source}")
    former = [at for at, kind, origin in mounts() if at == place and ours(at, kind, origin)]
    try:
        flags = MOVE_MOUNT_F_EMPTY_PATH | (MOVE_MOUNT_BENEATH if former else 0)
        result = libc.syscall(SYS_MOVE_MOUNT, tree, b"", AT_FDCWD, os.fsencode(place), flags)
        beneath = bool(former) and result == 0
        free = all([unmount(place) for _ in former])
        if not former:
            checked(result, f"mount {source} at {place}")
        elif not beneath:  # before Linux 6.5: between the two calls there is nothing for some microseconds
            flags = MOVE_MOUNT_F_EMPTY_PATH
            result = libc.syscall(SYS_MOVE_MOUNT, tree, b"", AT_FDCWD, os.fsencode(place), flags)
            checked(result, f"mount {source} at {place}")
    finally:
        os.close(tree)
    return free


# -- what the store holds ------------------------------------------------------------------------------------------


def manifest() -> dict[str, Any] | None:
    """The committed manifest, or None where the container has none. Raises OSError where that can't be known."""
    path = RAW / "labctl" / "manifest.json"
    forget_size(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        found: dict[str, Any] = json.loads(text)
        known = found["format"] == 1 and found["layout"] in ("files", "packed")
        plain = found["version"].isalnum() and (found["layout"] == "files" or len(found["shards"]) > 0)
    except (ValueError, KeyError, TypeError, AttributeError):
        known = plain = False
    if not known or not plain:
        raise Failed("the container's .labctl/manifest.json isn't one that this labctl can read; `labctl etl` anew")
    return found


def forget_size(path: Path) -> None:
    """Have the kernel ask rclone for the size.

    It believes one for seconds (--attr-timeout): of a file that was just replaced it would read as much as the former
    one had.
    """
    libc.statx(AT_FDCWD, os.fsencode(path), AT_STATX_FORCE_SYNC, STATX_BASIC_STATS, ctypes.create_string_buffer(256))


def in_labctl(name: str) -> Path:
    """Where an object that the manifest names as `.labctl/…` is in the raw mount."""
    folder, _, rest = name.partition("/")
    if folder != ".labctl" or ".." in rest.split("/"):
        raise Failed(f"the manifest names {name}, which isn't below .labctl/")
    return RAW / "labctl" / rest


def table(name: str) -> list[dict[str, Any]]:
    """The files that a table in the container names: path, size and hashes."""
    import gzip

    path = in_labctl(name)
    forget_size(path)
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        for row in rows:
            if row["path"].startswith("/") or ".." in row["path"].split("/"):
                raise ValueError(f"the path {row['path']}")
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, gzip.BadGzipFile) as error:
        raise Failed(f"the container's {name} isn't a table that this labctl can read ({error})") from None
    return rows


def relist(config: dict[str, Any], **what: Any) -> None:
    """Have rclone list folders anew, in place: forgotten ones would be taken from under who reads in them."""
    answer = ask(config, "vfs/refresh", recursive="true", **what).get("result", {})
    wrong = [f"{folder or 'the container'}: {word}" for folder, word in answer.items() if word != "OK"]
    if wrong:
        raise Failed(f"the store can't be listed: {wrong[0]}")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


# -- packed sets ---------------------------------------------------------------------------------------------------


def packed(found: dict[str, Any]) -> Path:
    """The merged tree of a packed set, mounted below VIEWS and verified; Failed if it isn't as it should be."""
    shards = found["shards"]
    home = VIEWS / view_name(found)
    tree = home / "tree"
    if os.path.ismount(tree) and alive(tree):
        return tree
    if len(shards) > MAX_SHARDS:
        raise Failed(f"{len(shards)} shards: overlayfs merges at most {MAX_SHARDS}; load the set anew in larger ones")
    release(home)
    names = [f"{number:03}" for number in range(len(shards))]
    try:
        for name, shard in zip(names, shards, strict=True):
            image = in_labctl(shard["object"])
            forget_size(image)
            if image.stat().st_size != shard["bytes"]:
                raise Failed(f"{shard['object']}: {image.stat().st_size} bytes, the manifest says {shard['bytes']}")
            (home / name).mkdir(mode=0o755, parents=True, exist_ok=True)
            loop_mount(image, home / name)
        for name in ("none", "tree"):
            (home / name).mkdir(mode=0o755, exist_ok=True)
        os.chdir(home)  # so that the layers' names are short: all of them have to fit into a page
        mount(SOURCE, tree, "overlay", "lowerdir=" + ":".join([*names, "none"]))
        verify(tree, found)
    except BaseException:
        release(home)
        raise
    finally:
        os.chdir("/")
    return tree


def view_name(found: dict[str, Any]) -> str:
    """A name for these very images: the same files may come in others."""
    images = [[shard["object"], shard["sha256"]] for shard in found["shards"]]
    return found["version"] + "-" + hashlib.sha256(json.dumps(images).encode()).hexdigest()[:8]


def alive(place: Path) -> bool:
    """Whether what is mounted there answers."""
    try:
        return len(os.listdir(place)) > 0
    except OSError:
        return False


def verify(tree: Path, found: dict[str, Any]) -> None:
    """Compare the hashes of a few files, spread over the set. (Each image was proven as a whole when it was loaded.)"""
    with suppress(FileNotFoundError):
        if VERIFIED.read_text() == view_name(found):
            return
    rows = table(found["table"])
    for row in rows[:: max(1, len(rows) // SAMPLES)][:SAMPLES]:
        path = tree / row["path"]
        if not path.is_file() or sha256(path) != row["sha256"]:
            raise Failed(f"{row['path']} in the packed images isn't what the manifest's table says; `labctl etl` anew")
    VERIFIED.write_text(view_name(found))


def release(home: Path) -> bool:
    """Unmount what is below home, whatever the order; whether nobody held any of it open."""
    return all([unmount(place) for place, _, _ in reversed(mounts()) if place.startswith(f"{home}/")])


# -- sets of files -------------------------------------------------------------------------------------------------


def unfinished(found: dict[str, Any] | None) -> list[str]:
    """Tables of what is in the container beside the committed set: of a load that is under way or was cut off (it
    announces there what it is about to send), and of loads that the committed one replaced."""
    with suppress(FileNotFoundError):
        names = os.listdir(RAW / "labctl" / "tables")
        announced = [name for name in names if name.startswith("pending-") and name.endswith(".jsonl.gz")]
        replaced = [name for name in (found or {}).get("replaced", []) if in_labctl(name).exists()]
        return [*(f".labctl/tables/{name}" for name in announced), *replaced]
    return []


def plain(config: dict[str, Any], found: dict[str, Any] | None, listed: bool) -> Path:
    """The tree of a set of files, or of a container that labctl didn't load: all of it but what isn't committed.
    `listed`: the container was listed just now."""
    files = RAW / "files"
    if not unfinished(found) and not (RAW / "labctl" / "pending.json").exists():
        if not listed:
            ask(config, "vfs/refresh", recursive="true", _async=True)  # warms the tree
        return files
    if not listed:
        relist(config)
    # Announced before it is sent: whatever the listing has of an unfinished load is in the tables that come after it.
    relist(config, dir="labctl")
    rows = [row for name in unfinished(found) for row in table(name)]
    shown = {row["path"] for row in table(found["table"])} if found and rows else set()
    hidden = {row["path"] for row in rows if not row.get("kept")} - shown
    return without(files, hidden) if hidden else files


def without(files: Path, hidden: set[str]) -> Path:
    """The tree without some of its files, by an overlay of whiteouts that lies in memory."""
    home = VIEWS / f"files-{time.time_ns()}"
    cover, tree = home / "cover", home / "tree"
    for place in (cover, tree):
        place.mkdir(mode=0o755, parents=True)
    try:
        mount(SOURCE, cover, "tmpfs", "mode=0755", flags=0)
        for path in sorted(covering(files, hidden)):
            (cover / path).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            os.mknod(cover / path, stat.S_IFCHR, os.makedev(0, 0))
        mount(SOURCE, tree, "overlay", f"lowerdir={cover}:{files}")
    except BaseException:
        release(home)
        raise
    return tree


def covering(files: Path, hidden: set[str]) -> set[str]:
    """What has to be covered for that: folders with nothing else in them as a whole, so that none is shown empty."""
    gone = set(hidden)
    parents = {str(parent) for path in hidden for parent in Path(path).parents} - {"."}
    for folder in sorted(parents, key=lambda path: -path.count("/")):
        try:
            entries = os.listdir(files / folder)
        except FileNotFoundError:
            entries = []
        if all(f"{folder}/{entry}" in gone for entry in entries):
            gone.add(folder)
    return {path for path in gone if not any(str(parent) in gone for parent in Path(path).parents)}


# -- commands ------------------------------------------------------------------------------------------------------


def state() -> dict[str, Any]:
    """What is shown; empty for nothing."""
    try:
        shown: dict[str, Any] = json.loads(STATE.read_text())
    except (OSError, ValueError):
        shown = {}
    return shown


def remember(shown: dict[str, Any]) -> None:
    """Keep on record what is shown."""
    draft = STATE.with_suffix(".new")
    draft.write_text(json.dumps(shown))
    draft.replace(STATE)


def require_raw(config: dict[str, Any]) -> None:
    """Raises Failed where rclone's mount isn't there."""
    if str(RAW) not in [place for place, kind, _ in mounts() if kind == "fuse.rclone"]:
        raise Failed(f"the object store isn't mounted at {RAW}: systemctl start {config['unit']}")


def start(config: dict[str, Any]) -> dict[str, Any]:
    """Show what there is when rclone has just started. A set that is damaged is told and not shown: nothing else
    on this host needs to wait for it. A store that doesn't answer raises OSError; systemd tries again."""
    try:
        return show(config, listed=False)
    except Failed as error:
        remember({"error": str(error)})
        print(f"object-view: {error}", file=sys.stderr)
        return state()


def refresh(config: dict[str, Any]) -> dict[str, Any]:
    """Show the committed version. Raises Failed or OSError, and then what was shown before is still there."""
    require_raw(config)
    relist(config)
    return show(config, listed=True)


def show(config: dict[str, Any], listed: bool) -> dict[str, Any]:
    """Show what the manifest says. `listed`: rclone's listings are of just now."""
    found = manifest()
    layout, version = (found["layout"], found["version"]) if found else ("files", "")
    source = packed(found) if found and layout == "packed" else plain(config, found, listed)
    before, shown = state(), {"layout": layout, "version": version, "source": str(source)}
    shown["objects"] = [shard["object"] for shard in found["shards"]] if found and layout == "packed" else []
    free = True
    for place in config["places"]:
        at = [origin for where, kind, origin in mounts() if where == place and ours(where, kind, origin)]
        if len(at) != 1 or before.get("source") != str(source):
            if not at:
                os.makedirs(place, mode=0o755, exist_ok=True)
            free &= put(source, place)
    changed = before != shown
    remember(shown)
    stale = [home for home in VIEWS.glob("*") if home / "tree" != source]
    free &= all([release(home) for home in stale])
    former = [name for name in before.get("objects", []) if name not in shown["objects"]]
    return {**shown, "changed": changed, "in_use": [] if free else former}


def clear(config: dict[str, Any]) -> None:
    """Unmount all of ours: what is shown first, then what it is made of. A dead mount can't be resolved, so by name."""
    STATE.unlink(missing_ok=True)
    for place in config["places"]:
        for _ in [1 for at, kind, source in mounts() if at == place and ours(at, kind, source)]:
            detach(place)
    for place, kind, source in reversed(mounts()):
        if place.startswith(f"{VIEWS}/") or (place == str(RAW) and ours(place, kind, source)):
            detach(place)
    for place in [*config["places"], str(RAW)]:
        os.makedirs(place, mode=0o755, exist_ok=True)


@contextmanager
def locked() -> Iterator[None]:
    """One refresh or clear at a time."""
    HOME.mkdir(mode=0o755, exist_ok=True)
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main(words: Sequence[str]) -> int:
    """The command line."""
    command, options = (words[0], words[1:]) if words else ("", [])
    try:
        config = json.loads(CONFIG.read_text())
        if command in ("refresh", "clear"):
            with locked():
                if command == "clear":
                    clear(config)
                else:
                    print(json.dumps(start(config) if "--starting" in options else refresh(config)))
            return 0
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(Path(__file__).parent))
        import object_reads

        return object_reads.main(command, options, config)
    except (Failed, OSError) as error:
        print(f"object-view {command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
