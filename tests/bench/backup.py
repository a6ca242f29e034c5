"""What a backup costs: 1,000 objects of 200 MB in all, then the same again unchanged, against plain `rclone copy`.

All of it in one run, in one lab on the sandbox's Swift, from the same server. Prints a table, writes
build/bench-backup.json. Requests are counted in the store's own log.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from story import REPOSITORY, Commands

LAB, OBJECTS, OBJECT_BYTES = "bench-backup", 1000, 200_000
#: What the tutorial loads a container with.
FLAGS = "--transfers=32 --checkers=16 --multi-thread-streams=4 --fast-list"
FILL = f"""set -e; rm -rf /root/tree; mkdir -p /root/tree/bench
for n in $(seq {OBJECTS}); do head -c {OBJECT_BYTES} /dev/urandom > /root/tree/bench/$n.bin; done
cd /mnt/block/.labctl/secrets; umask 077
printf '[s3]\\ntype = s3\\nprovider = Minio\\nendpoint = http://127.0.0.1:9000\\nregion = us-east-1\\n' > /root/s3.conf
printf 'access_key_id = %s\\nsecret_access_key = %s\\n' "$(cat s3_user)" "$(cat s3_password)" >> /root/s3.conf
rclone --config /root/s3.conf copy /root/tree s3:mlflow-artifacts --transfers 16"""
COPY = (
    "started=$(date +%s.%N); rclone --config /etc/rclone/rclone.conf copy /root/tree chi_tacc:{container}-plain"
    f" {FLAGS}; echo $(date +%s.%N) $started"
)


def as_root(lab: Commands, script: str) -> str:
    """Run a script as root on the lab's server."""
    return lab.ssh(f"sudo bash -c '{script.replace(chr(39), chr(39) + chr(92) + chr(39) + chr(39))}'")


def requests(container: str, since: float) -> int:
    """Requests for a container that the sandbox's Swift has answered since then."""
    log = subprocess.run(
        ["docker", "exec", "labctl-sandbox", "journalctl", "-u", "swift-proxy", "--no-pager", "-o", "cat",
         f"--since=@{since:.0f}"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return sum(
        f"/{container}/" in line or f"/{container} " in line or f"/{container}%3F" in line for line in log.splitlines()
    )


def measured(lab: Commands, container: str) -> dict[str, Any]:
    """One backup: its own seconds, the command's, and the store's requests."""
    began, started = time.time(), time.monotonic()
    result = lab.json("backup")
    seconds = time.monotonic() - started
    time.sleep(2)  # the log is written a moment later
    asked = requests(container, began)
    return {
        "seconds": result["seconds"],
        "command_seconds": round(seconds, 1),
        "requests": asked,
        "sent": result["sent"],
    }


def measure(lab: Commands, name: str) -> dict[str, Any]:
    """Fill the lab, back it up twice, and in between copy the same files plainly."""
    container = f"backup-persist-{name}"
    as_root(lab, FILL)
    first = measured(lab, container)
    ended, started = map(float, as_root(lab, COPY.replace("{container}", container)).split())
    again = measured(lab, container)
    plain = ended - started
    assert again["sent"] == 0
    return {
        "first": first,
        "unchanged": again,
        "plain_copy_seconds": round(plain, 1),
        "first_to_plain": round(first["seconds"] / plain, 2),
        "unchanged_to_plain": round(again["seconds"] / plain, 2),
    }


def main() -> int:
    """Run it once, clean up, report."""
    directory = REPOSITORY / "build" / "bench-backup"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "lab.yaml").unlink(missing_ok=True)
    lab = Commands(directory, environment={"LABCTL_STATE": str(directory / "state")})
    lab.run("init", LAB)
    try:
        lab.run("up")
        found = measure(lab, LAB)
    finally:
        as_root(lab, f"rclone --config /etc/rclone/rclone.conf purge chi_tacc:backup-persist-{LAB}-plain || true")
        lab.run("--yes", "backup", "delete", "--all")
        lab.run("--yes", "destroy", "--force")
    (REPOSITORY / "build" / "bench-backup.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
