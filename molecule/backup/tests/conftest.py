"""The scenario's node: running the program on it, putting data into the lab, and saying all that the lab holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

SCENARIO = Path(__file__).parents[1]
PROJECT = SCENARIO.parents[1]
sys.path.insert(0, str(PROJECT / "tests"))

import nodes  # noqa: E402

NODE = "backup"
PROGRAM = "/usr/local/lib/labctl/labctl_backup"
WORK = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"])
PROBE = PROJECT / "roles" / "mlflow_stack" / "files" / "probe.py"
#: Ends the process and all that it started, as a power cut would, at the first word of progress in which it wasn't
#: ended before; so that repeating a command goes through all of its steps. What is larger than a batch goes alone, past
#: the staging folder: with batches of 1 MiB that is some of the objects here.
KILLER = """
import os, re, signal, sys
sys.path.insert(0, "/usr/local/lib/labctl")
from labctl_backup import job, send
send.BATCH_BYTES = 1 << 20
with open("/root/killed", "a+") as handle:
    handle.seek(0)
    known = handle.read().splitlines()
put = job.Job._put
def counting(self, **facts):
    put(self, **facts)
    word = re.sub("[0-9]+", "#", f"{self._state['step']}: {self._state['text']}")
    if self._state["state"] == "running" and word not in known:
        with open("/root/killed", "a") as handle:
            handle.write(word + "\\n")
        os.killpg(0, signal.SIGKILL)
job.Job._put = counting
from labctl_backup.__main__ import main
sys.exit(main())
"""
#: Rows of every table, as the program counts them; here by a road of its own.
COUNT = """DO $$ DECLARE t text; n bigint; BEGIN
FOR t IN SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1 LOOP
EXECUTE format('SELECT count(*) FROM public.%I', t) INTO n; RAISE NOTICE '% %', t, n; END LOOP; END $$;"""


WORKSPACE, MINE = "/mnt/block/workspace", "-path './restored-*' -prune -o"


@dataclass
class Ended:
    """How a run of the program ended."""

    code: int
    result: dict[str, Any] = field(default_factory=dict)
    error: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Lab:
    """The lab on the node."""

    def shell(self, script: str, check: bool = True, data: bytes | None = None) -> str:
        """Run a script as root on the node."""
        return nodes.execute(NODE, "bash", "-o", "pipefail", "-c", script, check=check, data=data)

    def killed_at(self) -> list[str]:
        """The steps in which the command was killed since `forget_kills`."""
        return self.shell("cat /root/killed", check=False).splitlines()

    def run(self, *arguments: str, kill: bool = False) -> Ended:
        """One of the program's commands; with `kill`, it is killed in the first step in which it wasn't before."""
        job = "/run/labctl-backup/job-test.json"
        program = "/root/killer.py" if kill else PROGRAM
        command = (
            f"rm -f {job}; setsid --wait python3 {program} {' '.join(arguments)} --job test 2>/root/words; echo $?"
        )
        code = int(self.shell(command).split()[-1])
        said = json.loads(self.shell(f"cat {job}", check=False) or "{}")
        return Ended(code, said.get("result", {}), said.get("error", {}), said.get("notes", []))

    def play(self, playbook: str, **variables: Any) -> str:
        """Run a playbook of the scenario on a lab whose new volumes get the newest PostgreSQL; its output."""
        variables["postgres_of_new_volumes"] = "postgres"
        done = subprocess.run(
            ["ansible-playbook", "-i", str(WORK / "inventory"), "-e", json.dumps(variables), str(SCENARIO / playbook)],
            capture_output=True,
            text=True,
            check=False,
            env={
                **os.environ,
                "ANSIBLE_ROLES_PATH": str(PROJECT / "roles"),
                "ANSIBLE_PIPELINING": "1",
                "ANSIBLE_NOCOLOR": "1",
            },
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        return done.stdout

    def complete(self) -> list[str]:
        """Ids of the complete sets, newest first."""
        return [one["id"] for one in self.run("list").result["sets"] if one["complete"]]

    def secrets(self) -> dict[str, str]:
        """The lab's secrets."""
        values: dict[str, str] = json.loads(self.shell("cat /mnt/block/.labctl/secrets/secrets.json"))
        return values

    def marker(self) -> dict[str, Any]:
        """The volume's marker."""
        found: dict[str, Any] = json.loads(self.shell("cat /mnt/block/.labctl/volume.json"))
        return found

    def s3(self, command: str) -> str:
        """Run rclone with the remote `s3:`, the lab's own server, and `store:`, the container of the backups."""
        return self.shell(f"rclone --config /root/test.conf {command}")

    def configure_rclone(self) -> None:
        """Write that configuration for the lab's present keys."""
        secrets = self.secrets()
        container = json.loads((WORK / "store.json").read_text())["container"]
        text = (
            f"[s3]\ntype = s3\nprovider = Minio\nendpoint = http://127.0.0.1:9000\nregion = us-east-1\n"
            f"access_key_id = {secrets['s3_user']}\nsecret_access_key = {secrets['s3_password']}\n"
            f"[store]\ntype = alias\nremote = chi_tacc:{container}\n"
        )
        self.shell(
            "umask 077; cat > /root/test.conf; cat /etc/rclone/rclone.conf >> /root/test.conf", data=text.encode()
        )

    def log_run(self) -> None:
        """A run with a metric and an artifact, as a notebook logs it."""
        nodes.execute(
            NODE, "docker", "exec", "-i", "jupyter", "python3", "-", "http://mlflow:8000", "write",
            data=PROBE.read_bytes(),
        )  # fmt: skip

    def probe(self) -> dict[str, Any]:
        """Every logged run, read back by hash through MLflow."""
        found: dict[str, Any] = json.loads(
            nodes.execute(NODE, "python3", "-", "http://127.0.0.1:8000", "read", data=PROBE.read_bytes())
        )
        return found

    def held(self) -> dict[str, str]:
        """All that the lab holds: rows by table, objects by hash, files by hash, owner and mode."""
        secrets = self.secrets()
        psql = f"docker exec -i postgres psql -q -U {secrets['postgres_user']} -d {secrets['postgres_database']}"
        return {
            "rows": self.shell(f"{psql} 2>&1", data=COUNT.encode()),
            "objects": "\n".join(sorted(self.s3("hashsum sha256 --download s3:").splitlines())),
            "files": self.shell(f"cd {WORKSPACE} && find . {MINE} -type f -print0 | sort -z | xargs -0 sha256sum"),
            "modes": self.shell(f"cd {WORKSPACE} && find . {MINE} ! -type p -printf '%P %y %m %U:%G %l\\n' | sort"),
        }


@pytest.fixture(scope="session")
def lab() -> Lab:
    """The lab with data in it that a backup could get wrong."""
    lab = Lab()
    lab.play("job.yml", entry="main")
    lab.shell("cat > /root/killer.py", data=KILLER.encode())
    lab.configure_rclone()
    for _ in range(2):
        lab.log_run()
    lab.shell("""rm -rf /root/tree; mkdir -p '/root/tree/9/a b/ü ñ' /root/tree/9/deep/er && cd /root/tree/9
        for n in $(seq 30); do head -c $((n * 997)) /dev/urandom > deep/er/$n.bin; done
        head -c 9000000 /dev/urandom > model.bin; head -c 5000 /dev/urandom > 'a b/ü ñ/x+y=z & "q".bin'
        cp deep/er/30.bin 'same again.bin'; : > empty""")
    lab.s3("copy /root/tree s3:mlflow-artifacts")
    lab.s3("mkdir s3:second-bucket")
    lab.s3("copyto /root/tree/9/deep/er/7.bin s3:second-bucket/seven")
    lab.shell("""cd /mnt/block/workspace && mkdir -p 'my work/sub' empty && echo 'print(1)' > 'my work/sub/naïve.py'
        head -c 300000 /dev/urandom > data.npy && chmod 600 data.npy && ln -sfn ../../secret 'my work/link'
        [ -p pipe ] || mkfifo pipe; chown -R 1000:1000 'my work' data.npy; chown 0:0 'my work/sub/naïve.py'""")
    return lab
