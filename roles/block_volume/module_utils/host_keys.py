"""The server's SSH identity: its host keys lie on the volume, so that a new server is the same host to who logs in.

The first server that has the volume leaves its keys there; every later one takes them over. What is on the volume is
never overwritten.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

from ansible.module_utils.block_host import ask

#: Below the volume's mount point; 0700, its files 0600.
DIRECTORY = ".labctl/ssh"
ETC = "/etc/ssh"
NAME = re.compile(r"ssh_host_[a-z0-9]+_key")
#: There from before the first key is replaced until sshd has read them all; /run is empty after a boot.
PENDING = "/run/labctl-host-keys.pending"
#: Far more than any private key has: a larger file is something else.
LARGEST = 64 << 10


class Failed(Exception):
    """The keys can't be installed; the host has those that it had."""


@dataclass(frozen=True)
class Plan:
    """Which keys (by file name) go where."""

    to_host: tuple[str, ...] = ()
    to_volume: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kept:
    """What was done (or would be), the host's public keys as `type base64`, and what a person may want to know."""

    changes: tuple[str, ...] = ()
    public: tuple[str, ...] = ()
    note: str = ""


def decide(volume: Mapping[str, bytes], host: Mapping[str, bytes], damaged: frozenset[str]) -> Plan:
    """The volume's keys win; what only the host has is left on the volume. `damaged` ones stay out of it."""
    return Plan(
        to_host=tuple(name for name in sorted(volume) if name not in damaged and host.get(name) != volume[name]),
        to_volume=tuple(name for name in sorted(host) if name not in volume and name not in damaged),
    )


def bring(mount_point: str, check: bool) -> Kept:
    """Make host and volume agree about the keys. Raises Failed."""
    directory = os.path.join(mount_point, DIRECTORY)
    volume, host = _read(directory), _read(ETC)
    # one that can't be read as a key would keep sshd from starting
    damaged = frozenset(name for name in volume if host.get(name) != volume[name] and not _public(directory, name))
    damaged |= _strange(directory)
    plan = decide(volume, host, damaged)
    changes = [f"host key {name} from the volume" for name in plan.to_host]
    changes += [f"host key {name} kept on the volume" for name in plan.to_volume]
    notes = [f"{directory}/{name} isn't a usable key: the host keeps its own" for name in sorted(damaged)]
    if not check:
        if plan.to_host or os.path.exists(PENDING):
            _install(directory, plan.to_host, host)
        try:
            _keep(directory, {name: host[name] for name in plan.to_volume})
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            changes = changes[: len(plan.to_host)]
            notes.append("the volume is full: this host's keys aren't on it, and a new server will have others")
    return Kept(tuple(changes), tuple(_public_keys()), "; ".join(notes))


def leave(mount_point: str) -> str:
    """Before an unmount: a host whose keys never got onto the volume leaves them. "" or why it couldn't."""
    directory = os.path.join(mount_point, DIRECTORY)
    try:
        if not os.path.isdir(directory):
            _keep(directory, _read(ETC))
    except OSError as error:
        return f"the host's keys aren't on the volume, and a new server will have others: {error}"
    return ""


def _read(directory: str) -> dict[str, bytes]:
    """The private keys in a directory, by name; what isn't root's own plain file is none."""
    found = {}
    for name in os.listdir(directory) if os.path.isdir(directory) else ():
        if NAME.fullmatch(name) and _plain(os.path.join(directory, name)):
            with open(os.path.join(directory, name), "rb") as file:
                found[name] = file.read(LARGEST)
    return found


def _plain(path: str) -> bool:
    status = os.lstat(path)
    return stat.S_ISREG(status.st_mode) and status.st_uid == 0 and status.st_size < LARGEST


def _strange(directory: str) -> frozenset[str]:
    """Names of keys at which something else lies: a link, a folder, somebody else's file."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    return frozenset(n for n in names if NAME.fullmatch(n) and not _plain(os.path.join(directory, n)))


def _public(directory: str, name: str) -> str:
    """The public half of a private key, `type base64`; "" if it isn't one."""
    answer = ask("ssh-keygen", "-y", "-P", "", "-f", os.path.join(directory, name))
    words = answer.out.split()
    return " ".join(words[:2]) if answer.rc == 0 and len(words) >= 2 else ""


def _public_keys() -> list[str]:
    """The host's public keys."""
    found = []
    for name in sorted(_read(ETC)):
        with contextlib.suppress(OSError), open(f"{ETC}/{name}.pub", encoding="utf-8") as file:
            words = file.read().split()
            found += [" ".join(words[:2])] if len(words) >= 2 else []
    return found


def _install(directory: str, names: tuple[str, ...], before: Mapping[str, bytes]) -> None:
    """The volume's keys to the host, and sshd told. Connections that are open stay open."""
    with open(PENDING, "w", encoding="utf-8"):
        pass
    for name in names:
        public = _public(directory, name)
        with open(os.path.join(directory, name), "rb") as file:
            _write(ETC, name, file.read(LARGEST), 0o600)
        _write(ETC, f"{name}.pub", f"{public}\n".encode(), 0o644)
    verdict = ask("sshd", "-t")
    if verdict.rc:
        for name in names:
            if name in before:
                _write(ETC, name, before[name], 0o600)
                _write(ETC, f"{name}.pub", f"{_public(ETC, name)}\n".encode(), 0o644)
            else:
                os.unlink(f"{ETC}/{name}")
                os.unlink(f"{ETC}/{name}.pub")
        raise Failed(f"sshd doesn't start with the host keys of the volume: {verdict.words}")
    answers = [ask("systemctl", "try-reload-or-restart", unit) for unit in ("ssh.service", "sshd.service")]
    if all(answer.rc for answer in answers):
        raise Failed(f"sshd can't be told of its new host keys: {answers[0].words}")
    os.unlink(PENDING)


def _keep(directory: str, keys: Mapping[str, bytes]) -> None:
    """Keys to the volume, each in one step."""
    if not keys:
        return
    os.makedirs(directory, mode=0o700, exist_ok=True)
    os.chmod(directory, 0o700)
    for left in (name for name in os.listdir(directory) if name.startswith(".new-")):
        os.unlink(os.path.join(directory, left))  # of a run that was killed here
    for name, content in keys.items():
        _write(directory, name, content, 0o600)
    ask("sync", "--file-system", directory)


def _write(directory: str, name: str, content: bytes, mode: int) -> None:
    """A file replaced in one step."""
    fd, new = tempfile.mkstemp(prefix=".new-", dir=directory)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(new, mode)
        os.replace(new, os.path.join(directory, name))
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise
