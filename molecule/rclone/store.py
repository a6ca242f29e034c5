#!/usr/bin/env python3
"""A container with objects and an application credential in a real cloud, for the scenario; and their removal.

The cloud is the entry $LABCTL_TEST_OBJECT_CLOUD (default sandbox-objects) of the clouds.yaml at
$LABCTL_TEST_CLOUDS_FILE (default that of the sandbox). It must be a password login: an application credential may
not make another.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import sys
import uuid
from pathlib import Path
from typing import Any

import openstack

CLOUDS_FILE = os.environ.get("LABCTL_TEST_CLOUDS_FILE", "/var/lib/labctl-sandbox/clouds.yaml")
CLOUD = os.environ.get("LABCTL_TEST_OBJECT_CLOUD", "sandbox-objects")


def connect() -> Any:
    """A session of the cloud, for the object store's region."""
    config = openstack.config.OpenStackConfig(config_files=[CLOUDS_FILE])
    return openstack.connection.Connection(config=config.get_one(cloud=CLOUD))


def objects() -> dict[str, bytes]:
    """What the container holds: small files in folders as a dataset has them, and one that takes several reads."""
    dice = random.Random(7)
    small = {f"training/class_{n:02d}/{n}_{m}.bin": dice.randbytes(20_000) for n in range(3) for m in range(4)}
    return {**small, "big.bin": dice.randbytes(9_000_000), "with space/naïve.txt": b"hello\n"}


def make(state: Path) -> None:
    """Make all of it and write what the role and the tests need to know to `state` (0600)."""
    cloud = connect()
    name = f"labctl-test-{uuid.uuid4().hex[:8]}"
    record: dict[str, Any] = {"container": name, "application_credential_id": None}
    state.touch(mode=0o600)
    state.write_text(json.dumps(record))
    cloud.object_store.create_container(name=name)
    for key, data in objects().items():
        cloud.object_store.upload_object(container=name, name=key, data=data)
    user = cloud.current_user_id
    credential = cloud.identity.create_application_credential(user=user, name=name)
    record |= {
        "application_credential_id": credential.id,
        "application_credential_secret": credential.secret,
        "auth_url": cloud.auth["auth_url"],
        "region": cloud.config.get_region_name(),
        "sha256": {key: hashlib.sha256(data).hexdigest() for key, data in objects().items()},
    }
    state.write_text(json.dumps(record))


def renew(state: Path) -> None:
    """Another application credential in place of the one that `state` names, which ends at once."""
    record, cloud = json.loads(state.read_text()), connect()
    user, former = cloud.current_user_id, record["application_credential_id"]
    made = cloud.identity.create_application_credential(user=user, name=f"{record['container']}-{uuid.uuid4().hex[:4]}")
    record |= {"application_credential_id": made.id, "application_credential_secret": made.secret}
    state.write_text(json.dumps(record))
    cloud.identity.delete_application_credential(user, former)


def remove(state: Path) -> None:
    """Remove what `state` names, and `state`; nothing to remove is no error."""
    if not state.exists():
        return
    record = json.loads(state.read_text())
    cloud = connect()
    if record["application_credential_id"]:
        cloud.identity.delete_application_credential(cloud.current_user_id, record["application_credential_id"])
    with contextlib.suppress(openstack.exceptions.NotFoundException):
        for found in list(cloud.object_store.objects(record["container"])):
            cloud.object_store.delete_object(found.name, container=record["container"])
        cloud.object_store.delete_container(record["container"])
    state.unlink()


if __name__ == "__main__":
    {"make": make, "remove": remove}[sys.argv[1]](Path(sys.argv[2]))
