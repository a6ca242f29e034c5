"""The tutorial's notebook cells that make a server and a volume, with python-chi as it is; nothing of labctl.

Run with OS_* in the environment: tutorial_cells.py NAME KEYPAIR GROUP ADDRESS. Prints what was made, as JSON. It
differs from the notebook in three places: no choose_site() (it asks a host elsewhere), a key pair by name (the
default replaces the user's), and a floating IP of one's own (the default takes any unused one of the project, a
neighbour's too).
"""

from __future__ import annotations

import contextlib
import json
import sys
import time


def main(name: str, keypair: str, group: str, address: str) -> dict[str, str]:
    """The cells, from top to bottom."""
    from chi import network, server, storage
    from chi.clients import nova

    # cell: a server
    instance = server.Server(
        f"node-persist-{name}", image_name="CC-Ubuntu24.04", flavor_name="m1.large", key_name=keypair
    )
    instance.submit(idempotent=True, show=None)
    instance.refresh()

    # cell: a floating IP
    instance.associate_floating_ip(address)

    # cell: security groups, created if they aren't there
    allow = network.SecurityGroup({"name": group, "description": "Enable SSH traffic on TCP port 22"})
    allow.add_rule("ingress", "tcp", 22)
    allow.submit(idempotent=True)
    nova().servers.add_security_group(instance.id, group)

    # cell: a volume, attached
    volume = storage.Volume(name=f"block-persist-{name}", size=2, volume_type=None)
    volume.submit(idempotent=True)
    while volume.get().status == "creating":
        time.sleep(1)
    instance.attach_volume(volume.id)
    while volume.get().status != "in-use":
        time.sleep(1)
    return {"server": str(instance.id), "volume": str(volume.id), "group": str(allow.id)}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # python-chi prints
        made = main(*sys.argv[1:])
    print(json.dumps(made))
