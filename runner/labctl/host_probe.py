"""Run on the server by `labctl status`: what is mounted and which services are healthy, as JSON on stdout.

Arguments: the mount point of the volume, that of the object store. Stands alone: it is sent over SSH.
"""

from __future__ import annotations

import json
import subprocess
import sys


def output(*command: str) -> str:
    """The output of a command, or nothing where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def mount(path: str) -> dict[str, str] | None:
    """What is mounted at path, or None."""
    found = output("findmnt", "--json", "--output", "SOURCE,FSTYPE,UUID,SIZE,AVAIL", "--mountpoint", path)
    return json.loads(found)["filesystems"][-1] if found else None


def services() -> dict[str, dict[str, object]]:
    """The services that the mlflow_stack role put on record, each with what Docker says of its health."""
    try:
        with open("/etc/labctl/services.json") as handle:
            known = json.load(handle)
    except (OSError, ValueError):
        return {}
    names = [service["health"] for service in known.values()]
    form = "{{.Name}} {{if .State.Health}}{{.State.Health.Status}}{{else}}{{.State.Status}}{{end}}"
    said = output("docker", "inspect", "--format", form, *names) if names else ""
    health = dict(line.lstrip("/").split(maxsplit=1) for line in said.splitlines() if " " in line)
    return {
        name: {
            "url": service["url"],
            "version": service["version"],
            "healthy": health.get(service["health"]) == "healthy",
            **({"note": service["note"]} if service.get("note") else {}),
        }
        for name, service in known.items()
    }


def backups() -> dict[str, object]:
    """The timer of backups, if there is one, and how the last backup from this host ended."""
    shown = output("systemctl", "show", "labctl-backup.timer", "--property=ActiveState,NextElapseUSecRealtime")
    timer = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    active = timer.get("ActiveState") == "active"
    try:
        with open("/var/lib/labctl/backup-last.json") as handle:
            last = json.load(handle)
    except (OSError, ValueError):
        last = None
    return {"scheduled": active, "next": timer.get("NextElapseUSecRealtime", "") if active else "", "last": last}


def object_view() -> dict[str, object]:
    """Which set the object mount shows, and what rclone says of its work."""
    found: dict[str, object] = json.loads(output("/usr/local/lib/labctl/object-view", "status") or "{}")
    return found


if __name__ == "__main__":
    found = {
        "volume": mount(sys.argv[1]),
        "object_store": mount(sys.argv[2]),
        "object_view": object_view(),
        "services": services(),
        "backup": backups(),
    }
    print(json.dumps(found))
