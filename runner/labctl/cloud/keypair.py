"""The key pair that opens a lab's servers."""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import Any

from labctl.cloud.refusals import refusals, status_of
from labctl.cloud.session import Cloud
from labctl.errors import CloudRefused, ConfigError


def fingerprint(public_key: str) -> str:
    """The first 12 hex digits of SHA-256 over the key itself, whatever its comment.

    Raises ConfigError when the text isn't an OpenSSH public key.
    """
    parts = public_key.split()
    try:
        return hashlib.sha256(base64.b64decode(parts[1], validate=True)).hexdigest()[:12]
    except (IndexError, binascii.Error) as error:
        raise ConfigError(
            "that is not an OpenSSH public key",
            expected="one line: type, base64, comment",
            found=public_key[:40],
            next_step="ssh-keygen -t ed25519",
        ) from error


def ensure(cloud: Cloud, public_key: str, prefix: str) -> str:
    """Registers the key as PREFIX-FINGERPRINT unless it is there; returns that name.

    The fingerprint in the name makes a pair of that name a pair with that key: another person's or an older key is
    never used and never replaced. Raises CloudRefused if somebody gave the name to another key all the same.
    """
    name = f"{prefix}-{fingerprint(public_key)}"
    compute = cloud.compute.compute
    with refusals(f"register the key pair {name}"):
        found = _get(cloud, name)
        if found is None:
            try:
                compute.create_keypair(name=name, public_key=public_key.strip())
                return name
            except Exception as error:
                if status_of(error) != 409:
                    raise
                found = compute.get_keypair(name)
    if fingerprint(str(found.public_key)) != fingerprint(public_key):
        raise CloudRefused(
            f"the key pair {name} holds another key",
            expected=f"a key with fingerprint {fingerprint(public_key)}",
            found=fingerprint(str(found.public_key)),
            next_step=f"rename or delete it: openstack keypair delete {name}",
        )
    return name


def same(one: str, other: str) -> bool:
    """Whether two lines of text are the same OpenSSH public key, whatever their comments."""
    return one.split()[:2] == other.split()[:2] != []


def public_key(cloud: Cloud, name: str) -> str | None:
    """The public key of this user's pair of that name, or None: another user's pairs can't be read."""
    with refusals(f"read the key pair {name}"):
        found = _get(cloud, name)
    return str(found.public_key) if found is not None else None


def _get(cloud: Cloud, name: str) -> Any:
    try:
        return cloud.compute.compute.get_keypair(name)
    except Exception as error:
        if status_of(error) == 404:
            return None
        raise


def made(cloud: Cloud, public_key: str, prefix: str) -> str:
    """The name of the pair that `ensure` made for this key; "" when there is none."""
    name = f"{prefix}-{fingerprint(public_key)}"
    with refusals(f"read the key pair {name}"):
        return name if _get(cloud, name) is not None else ""


def delete(cloud: Cloud, public_key: str, prefix: str) -> bool:
    """Deletes the pair that `ensure` made for this key; False when there is none."""
    name = made(cloud, public_key, prefix)
    if name:
        with refusals(f"delete the key pair {name}"):
            cloud.compute.compute.delete_keypair(name)
    return bool(name)
