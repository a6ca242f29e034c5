"""Runs on the server, as root: prints as JSON where the disk of a volume is mounted, partitions included.

The argument is the volume's id; a disk shows at least its first 20 characters as its serial number.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def mount_points(device: dict[str, Any]) -> list[str]:
    """Of a device as lsblk describes it, and of all that is in it."""
    below = [place for child in device.get("children", []) for place in mount_points(child)]
    return [place for place in device.get("mountpoints", []) if place] + below


def main(volume_id: str) -> None:
    """Print the mount points."""
    answer = subprocess.run(
        ["lsblk", "--json", "--output", "SERIAL,MOUNTPOINTS"], capture_output=True, text=True, check=True
    )
    disks = json.loads(answer.stdout)["blockdevices"]
    found = [place for disk in disks if volume_id[:20] in (disk["serial"] or "") for place in mount_points(disk)]
    print(json.dumps(found))


main(sys.argv[1])
