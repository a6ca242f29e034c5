"""The server's SSH identity: whose key wins, and what this machine accepts afterwards."""

from __future__ import annotations

import subprocess
from pathlib import Path

import ansible.module_utils
import pytest
from labctl import ssh

ansible.module_utils.__path__.append(str(Path(__file__).parents[2] / "roles/block_volume/module_utils"))

from ansible.module_utils.host_keys import decide  # noqa: E402

ED, RSA = "ssh_host_ed25519_key", "ssh_host_rsa_key"


@pytest.mark.parametrize(
    ("volume", "host", "damaged", "to_host", "to_volume"),
    [
        ({}, {ED: b"h", RSA: b"r"}, set(), (), (ED, RSA)),  # the first server leaves its keys
        ({ED: b"v", RSA: b"w"}, {ED: b"h", RSA: b"r"}, set(), (ED, RSA), ()),  # a later one takes them over
        ({ED: b"v"}, {ED: b"v"}, set(), (), ()),  # and then nothing happens any more
        ({ED: b"v"}, {ED: b"h", RSA: b"r"}, set(), (ED,), (RSA,)),  # a run that was cut off while it left them
        ({ED: b"v", RSA: b"w"}, {ED: b"v"}, set(), (RSA,), ()),  # an image without that kind
        ({ED: b""}, {ED: b"h"}, {ED}, (), ()),  # damaged: neither installed nor overwritten
        ({}, {ED: b"h"}, {ED}, (), ()),  # a link lies in its place: not written through
    ],
)
def test_the_volumes_keys_win_and_are_never_overwritten(
    volume: dict[str, bytes], host: dict[str, bytes], damaged: set[str], to_host: object, to_volume: object
) -> None:
    plan = decide(volume, host, frozenset(damaged))
    assert (plan.to_host, plan.to_volume) == (to_host, to_volume)


def key(folder: Path, name: str) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    return " ".join((folder / f"{name}.pub").read_text().split()[:2])


def test_both_keys_are_accepted_until_the_new_one_is_certain(tmp_path: Path) -> None:
    known = tmp_path / "state" / "known_hosts"
    first, labs, others = (key(tmp_path, name) for name in ("first", "labs", "others"))
    ssh.trust(known, "server-1", [first])
    ssh.trust(known, "server-2", [others])
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", known], check=True)  # as Debian's ssh_config has names written
    ssh.trust(known, "server-1", [labs])
    ssh.trust(known, "server-1", [labs])
    assert sorted(ssh.known_keys(known, "server-1")) == sorted([first, labs])
    ssh.trust(known, "server-1", [labs], no_others=True)
    assert ssh.known_keys(known, "server-1") == [labs]
    assert ssh.known_keys(known, "server-2") == [others]
    assert known.stat().st_mode & 0o777 == 0o600
