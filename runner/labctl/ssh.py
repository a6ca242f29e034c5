"""Logging into the lab's server: the key, the known hosts, one command, and waiting until it answers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labctl.errors import ConfigError, ConvergeFailed, HostUnreachable
from labctl.models import Tell

#: A fresh VM's sshd answers within a minute on Chameleon; five cover a slow first boot.
LOGIN_SECONDS = 300
#: Seconds that one try to connect may take.
CONNECT_SECONDS = 10


@dataclass(frozen=True)
class Login:
    """How to reach a server: its address, the user, the private key, and where its host key is remembered.

    `identity` is the name that the host key is remembered by: the server's id, not its address, which the next server
    may get.
    """

    address: str
    user: str
    key: Path
    known_hosts: Path
    identity: str

    @property
    def options(self) -> list[str]:
        """The options of ssh for this server. Its host key is remembered on first sight and must not change after."""
        return [
            *("-i", str(self.key), "-o", "IdentitiesOnly=yes"),
            *("-o", f"UserKnownHostsFile={self.known_hosts}", "-o", f"HostKeyAlias={self.identity}"),
            *("-o", "StrictHostKeyChecking=accept-new"),
            *("-o", f"ConnectTimeout={CONNECT_SECONDS}", "-o", "ServerAliveInterval=5", "-o", "LogLevel=ERROR"),
        ]

    def argv(self, *command: str, batch: bool = True) -> list[str]:
        """The command line of ssh; with `batch`, nothing is ever asked."""
        ask = ["-o", "BatchMode=yes"] if batch else []
        return ["ssh", *self.options, *ask, f"{self.user}@{self.address}", *command]


def ensure_key(path: Path) -> str:
    """The public key of a private key; the pair is made if it isn't there. Returns one line of text."""
    public = path.with_name(path.name + ".pub")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _ssh_keygen("-q", "-t", "ed25519", "-N", "", "-C", "labctl", "-f", str(path))
    if public.exists():
        return public.read_text().strip()
    return _ssh_keygen("-y", "-P", "", "-f", str(path)).strip()


def _ssh_keygen(*arguments: str) -> str:
    try:
        done = subprocess.run(["ssh-keygen", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError("ssh-keygen is missing.", next_step="install the package openssh-client") from None
    if done.returncode:
        raise ConfigError(
            "The SSH key can't be used.",
            found=done.stderr.strip(),
            source=arguments[-1],
            next_step="name another key in lab.yaml (server.ssh_key), or put its .pub file beside it",
        )
    return done.stdout


def trust(known_hosts: Path, identity: str, keys: Sequence[str], *, no_others: bool = False) -> None:
    """Have these host keys (`type base64`) accepted for an identity; with `no_others`, only these."""
    lines = [f"{identity} {key}" for key in keys]
    text = known_hosts.read_text() if known_hosts.exists() else ""
    if set(lines) <= set(text.splitlines()) and not no_others:
        return
    known = known_keys(known_hosts, identity) if text else []
    if no_others and set(known) != set(keys):
        if known:
            _ssh_keygen("-R", identity, "-f", str(known_hosts))
        known = []
    missing = [line for line, key in zip(lines, keys, strict=True) if key not in known]
    if missing:
        known_hosts.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(known_hosts, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "a") as file:
            file.write("".join(f"{line}\n" for line in missing))


def known_keys(known_hosts: Path, identity: str) -> list[str]:
    """The host keys (`type base64`) on record for an identity, also where the names are hashed."""
    done = subprocess.run(
        ["ssh-keygen", "-F", identity, "-f", str(known_hosts)], capture_output=True, text=True, check=False
    )
    words = [line.split() for line in done.stdout.splitlines() if line and not line.startswith("#")]
    return [" ".join(line[1:3]) for line in words if len(line) >= 3]


def wait_for_login(login: Login, tell: Tell, timeout: float = LOGIN_SECONDS) -> None:
    """Wait until the server can be logged into. Raises HostUnreachable with ssh's own words after `timeout` seconds."""
    login.known_hosts.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    deadline = time.monotonic() + timeout
    while True:
        words = ""
        try:
            done = subprocess.run(
                login.argv("true"), capture_output=True, text=True, check=False, timeout=CONNECT_SECONDS + 5
            )
            if done.returncode == 0:
                return
            words = done.stderr.strip()
        except subprocess.TimeoutExpired:
            words = f"no answer within {CONNECT_SECONDS} s"
        changed_key = "REMOTE HOST IDENTIFICATION HAS CHANGED" in words or "Host key verification failed" in words
        if changed_key or time.monotonic() > deadline:
            raise _unreachable(login, words, changed_key)
        tell(f"waiting for sshd on {login.address} ({words.splitlines()[-1] if words else 'no answer'})")
        time.sleep(1)


def _unreachable(login: Login, words: str, changed_key: bool) -> HostUnreachable:
    next_step = "check that a security group lets port 22 in from here, and `labctl status`; then run the command again"
    if changed_key:
        next_step = (
            "if its system was installed anew, labctl rebuild --force replaces it and brings the lab's own key back; if"
            " nobody did that, don't log in: somebody may stand between"
        )
    return HostUnreachable(
        f"{login.user}@{login.address} can't be logged into.",
        expected="a login with the lab's key",
        found=words or "no answer",
        source=f"key {login.key}",
        next_step=next_step,
    )


def run_python(login: Login, script: Path, *arguments: str, timeout: float = 60) -> Any:
    """Run a Python script as root on the server, sent over standard input; it prints JSON, which is returned."""
    try:
        done = subprocess.run(
            login.argv("sudo", "-n", "python3", "-", *arguments),
            input=script.read_text(),
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise _unreachable(login, f"no answer within {timeout:.0f} s", changed_key=False) from None
    if done.returncode == os.EX_OK:
        return json.loads(done.stdout)
    if done.returncode == 255:  # ssh's own failures
        raise _unreachable(login, done.stderr.strip(), changed_key=False)
    raise ConvergeFailed(f"{script.name} failed on {login.address}.", detail=done.stderr.strip())


def lines(login: Login, *command: str) -> Iterator[str]:
    """Run a command on the server and give its output line by line, as it comes.

    Raises ConvergeFailed with what it said when it fails, HostUnreachable when the connection breaks.
    """
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(login.argv(*command), stdout=subprocess.PIPE, stderr=errors, text=True) as running:
            yield from running.stdout or ()
        errors.seek(0)
        said = errors.read().strip()
    if running.returncode == 255:  # ssh's own failures
        raise _unreachable(login, said, changed_key=False)
    if running.returncode:
        raise ConvergeFailed(f"{' '.join(command)} failed on {login.address}.", detail=said)


def replace_process(login: Login, command: list[str]) -> None:
    """Become ssh, logged into the server or running a command there; does not return."""
    os.execvp("ssh", login.argv(*command, batch=False))  # noqa: S606 (no shell is what is wanted)


def wait_for_port(port: int, seconds: float = 30) -> bool:
    """Whether something listens on this machine's 127.0.0.1:port by then."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return True
        time.sleep(0.2)
    return False


def forward_ports(login: Login, ports: list[int]) -> None:
    """Forward ports of this machine's 127.0.0.1 to the same ones on the server's, until interrupted."""
    forwards = [part for port in ports for part in ("-L", f"127.0.0.1:{port}:127.0.0.1:{port}")]
    options = ["-N", "-o", "ExitOnForwardFailure=yes", *forwards]
    command = login.argv()
    done = subprocess.run([*command[:1], *options, *command[1:]], check=False)
    if done.returncode:
        raise HostUnreachable(
            "The tunnel broke.",
            found=f"ssh ended with {done.returncode}",
            next_step="check that none of the ports is taken on this machine, and labctl status",
        )
