"""From what is there to what should be there: the steps of the module mlflow_stack, in their order."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import time
from typing import Any

from ansible.module_utils import stack_docker as docker
from ansible.module_utils import stack_secrets as keys
from ansible.module_utils import stack_volume as volume
from ansible.module_utils.stack_plan import Plan, Stop, VolumeState, Wanted, decide

UNIT = "labctl-stack.service"
GUARD = "/usr/local/lib/labctl/stack-guard"
UNIT_FILE = f"/etc/systemd/system/{UNIT}"
SERVICES_FILE = "/etc/labctl/services.json"
NOTEBOOK = "food11_demo.ipynb"
STOP_SECONDS = 180
#: Seconds on top of compose's own limit before the call itself is given up.
GRACE_SECONDS = 60


class Failed(Exception):
    """The services don't run as they should; no data is at risk."""

    def __init__(self, msg: str, **facts: str) -> None:
        super().__init__(msg)
        self.facts = {"msg": msg, **facts}


class Converge:
    """One run of the module with state=started."""

    def __init__(self, params: dict[str, Any], check: bool) -> None:
        self.params, self.check = params, check
        self.data_dir = os.path.normpath(params["data_dir"])
        self.project_dir = params["project_dir"]
        self.secrets_dir = os.path.join(self.data_dir, volume.SECRETS)
        self.changes: list[str] = []
        self.secrets: dict[str, str] | None = None
        self.secrets_rewritten = False

    def run(self) -> dict[str, Any]:
        """The module's result; Stop, Failed or DockerFailed otherwise."""
        state = self._read_volume()
        if self.check and not state.mounted:
            return self._result("the volume isn't mounted yet", "services started on the volume")
        images = self._images()
        if images is None:
            return self._result("images are missing", "images pulled, services started")
        plan = decide(state, Wanted(self.data_dir, self._postgres_major(images), self.params["s3_flavour"]))
        self._prepare(plan)
        jupyter = self._jupyter_image(images)
        self._write(os.path.join(self.project_dir, ".env"), self._environment(plan, jupyter))
        if not self._up_to_date(images):
            self._up()
        services = self._describe(plan)
        self._guard()
        return {**self._result("", ""), "services": services}

    # -- reading ---------------------------------------------------------------------------------------------------

    def _read_volume(self) -> VolumeState:
        try:
            return volume.read_volume(self.data_dir)
        except OSError as error:
            raise Stop(
                f"The volume at {self.data_dir} can't be read; nothing is started on it.",
                expected="a filesystem that answers",
                found=str(error),
                next_step="look at `dmesg` on the server, then at the volume's state in the cloud",
            ) from None

    def _images(self) -> dict[str, dict[str, Any]] | None:
        """The images by reference, pulled if they were missing; None in check mode if one is missing."""
        wanted = [ref for ref in self.params["images"].values() if ref]
        found: dict[str, dict[str, Any]] = docker.inspect("image", wanted)
        missing = [ref for ref in dict.fromkeys(wanted) if ref not in found]
        if not missing:
            return found
        if self.check:
            return None
        try:
            docker.pull(missing, self.params["pull_timeout"])
        except docker.DockerFailed as failure:
            raise Failed(
                str(failure),
                next_step="check the reference in mlflow_stack_images, and that the server reaches the registry",
            ) from None
        self.changes += [f"image {ref} pulled" for ref in missing]
        found = docker.inspect("image", wanted)
        return found

    def _postgres_major(self, images: dict[str, dict[str, Any]]) -> str:
        environment = images[self.params["images"]["postgres"]].get("Config", {}).get("Env") or []
        return next((line.partition("=")[2] for line in environment if line.startswith("PG_MAJOR=")), "")

    def _jupyter_image(self, images: dict[str, dict[str, Any]]) -> str:
        """The given image, or the tag of one built on the MLflow image from what lies beside the compose file."""
        given = str(self.params["images"].get("jupyter") or "")
        if given:
            return given
        base = self.params["images"]["mlflow"]
        source = os.path.join(self.project_dir, "jupyter")
        digest = hashlib.sha256(images[base]["Id"].encode())
        for name in ("Dockerfile", "requirements.txt"):
            try:
                with open(os.path.join(source, name), "rb") as handle:
                    digest.update(handle.read())
            except FileNotFoundError:
                if not self.check:
                    raise
        tag = f"labctl/jupyter:{digest.hexdigest()[:16]}"
        if tag not in docker.inspect("image", [tag]):
            self.changes.append(f"image {tag} built on {base}")
            if not self.check:
                docker.build(tag, source, base, self.params["pull_timeout"])
        return tag

    # -- writing ---------------------------------------------------------------------------------------------------

    def _write(self, path: str, content: str) -> None:
        if self.check:
            try:
                with open(path, encoding="utf-8") as handle:
                    differs = handle.read() != content
            except FileNotFoundError:
                differs = True
        else:
            differs = docker.write_atomically(path, content)
        if differs:
            self.changes.append(f"{path} written")

    def _prepare(self, plan: Plan) -> None:
        """Folders, secrets and the demo notebook: only what the volume lacks."""
        self.secrets = keys.load(self.secrets_dir)
        if self.check:
            if self.secrets is None:
                self.changes.append("secrets generated, folders made")
                self.secrets = {**keys.generate(), "postgres_password": "", "s3_password": "", "jupyter_token": ""}
            return
        if volume.make_folder(self.secrets_dir, 0, 0o700):
            self.changes.append(f"{self.secrets_dir} made")
        if self.secrets is None:
            self.secrets = keys.generate()
            keys.write(self.secrets_dir, keys.FILE, json.dumps(self.secrets, indent=1) + "\n", 0, 0o600)
            self.changes.append("secrets generated")
        owners = (plan.postgres_owner[0], plan.s3_owner[0], self.params["mlflow_uid"])
        for name, (content, uid) in keys.files(self.secrets, *owners).items():
            if keys.write(self.secrets_dir, name, content, uid):
                self.changes.append(f"secret file {name} written")
                self.secrets_rewritten = True
        for name, uid, mode in (*plan.create, (volume.WORKSPACE, volume.WORKSPACE_UID, 0o755)):
            path = os.path.join(self.data_dir, name)
            if name == volume.WORKSPACE and os.path.isdir(path):
                continue
            if volume.make_folder(path, uid, mode):
                self.changes.append(f"{path} made")
        self._notebook()

    def _notebook(self) -> None:
        """The demo, unless a notebook of that name is there: what a user wrote is never overwritten."""
        path = os.path.join(self.data_dir, volume.WORKSPACE, NOTEBOOK)
        if os.path.lexists(path):
            return
        with open(os.path.join(self.project_dir, NOTEBOOK), encoding="utf-8") as source:
            content = source.read()
        with open(f"{path}.new", "w", encoding="utf-8") as handle:
            os.fchown(handle.fileno(), volume.WORKSPACE_UID, volume.WORKSPACE_UID)
            handle.write(content)
        os.rename(f"{path}.new", path)
        self.changes.append(f"{path} copied")

    def _environment(self, plan: Plan, jupyter: str) -> str:
        """The values that compose.yml takes from the volume and the engine; no secret among them."""
        assert self.secrets is not None
        programs = hashlib.sha256()
        folder = os.path.join(self.project_dir, "containers")
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            with open(os.path.join(folder, name), "rb") as handle:
                programs.update(name.encode() + b"\0" + handle.read())
        files = ["compose.yml"] + (["compose.fast-start.yml"] if docker.supports_start_interval() else [])
        values = {
            "COMPOSE_FILE": ":".join(os.path.join(self.project_dir, name) for name in files),
            "POSTGRES_OWNER": "{}:{}".format(*plan.postgres_owner),
            "POSTGRES_USER": self.secrets["postgres_user"],
            "POSTGRES_DB": self.secrets["postgres_database"],
            "POSTGRES_DIR": plan.postgres_dir,
            "S3_OWNER": "{}:{}".format(*plan.s3_owner),
            "S3_DIR": plan.s3_dir,
            "JUPYTER_IMAGE": jupyter,
            "PROGRAMS": programs.hexdigest()[:16],
        }
        return "# Written by labctl at each converge.\n" + "".join(f"{key}={value}\n" for key, value in values.items())

    # -- containers ------------------------------------------------------------------------------------------------

    def _inputs(self) -> str:
        """A hash of everything that compose reads."""
        digest = hashlib.sha256()
        for name in ("compose.yml", "compose.fast-start.yml", ".env"):
            try:
                with open(os.path.join(self.project_dir, name), "rb") as handle:
                    digest.update(name.encode() + b"\0" + handle.read())
            except FileNotFoundError:
                digest.update(b"absent")
        return digest.hexdigest()

    def _up_to_date(self, images: dict[str, dict[str, Any]]) -> bool:
        """Whether the containers are those that the present files asked for, of the present images, and healthy."""
        try:
            with open(os.path.join(self.project_dir, "applied.json"), encoding="utf-8") as handle:
                applied = json.load(handle)
        except (FileNotFoundError, ValueError):
            applied = {}
        containers = docker.inspect("container", list(docker.SERVICES))
        reasons = [] if applied.get("inputs") == self._inputs() else ["the compose project changed"]
        reasons += ["a secret's file was written"] if self.secrets_rewritten else []
        for name in docker.SERVICES:
            container = containers.get(name)
            reference = self.params["images"].get(name)
            if container is None:
                reasons.append(f"{name} has no container")
            elif container["Id"] != applied.get("containers", {}).get(name):
                reasons.append(f"{name} is another container than the last converge left")
            elif not docker.is_healthy(container):
                reasons.append(f"{name} isn't healthy")
            elif reference and images[reference]["Id"] != container["Image"]:
                reasons.append(f"{name} runs another image")
        if reasons and self.check:
            self.changes.append("docker compose up: " + ", ".join(reasons))
        return not reasons or self.check

    def _up(self) -> None:
        found = docker.inspect("container", list(docker.SERVICES))
        before, seconds = docker.identity(found), self.params["start_timeout"]
        # A running container keeps the file that was at a path when it started.
        anew = ["--force-recreate"] if self.secrets_rewritten else []
        try:
            with docker.locked():
                # One in a restart loop would wait for Docker's growing pause, or make compose give up at once.
                if ailing := [name for name, container in found.items() if docker.is_ailing(container)]:
                    docker.compose(self.project_dir, "rm", "--stop", "--force", *ailing, seconds=STOP_SECONDS)
                done = docker.compose(
                    self.project_dir, "up", "-d", "--no-build", *anew, "--wait", "--wait-timeout", str(seconds),
                    seconds=seconds + GRACE_SECONDS,
                )  # fmt: skip
            words = done.stderr.strip() if done.returncode else ""
        except docker.DockerFailed as failure:
            words = str(failure)
        containers = docker.inspect("container", list(docker.SERVICES))
        unhealthy = [name for name in docker.SERVICES if not docker.is_healthy(containers.get(name))]
        if words or unhealthy:
            last = words.splitlines()[-1] if words else f"not healthy: {', '.join(unhealthy)}"
            raise Failed(
                keys.scrub(f"The services didn't come up: {last}\n{docker.complaints(containers)}", self.secrets),
                expected="postgres, s3, mlflow and jupyter running and healthy",
                found=f"not healthy: {', '.join(unhealthy) or 'none'}",
                next_step="mend what the log above says, then `labctl converge --only mlflow_stack`",
            )
        if docker.identity(containers) != before:
            self.changes.append("services started")
            docker.write_atomically(volume.MOUNT_RECORD, volume.mount_at(self.data_dir) or "")
        applied = {"inputs": self._inputs(), "containers": {name: c["Id"] for name, c in containers.items()}}
        docker.write_atomically(os.path.join(self.project_dir, "applied.json"), json.dumps(applied, indent=1) + "\n")

    def _describe(self, plan: Plan) -> dict[str, Any]:
        """Write down what runs, for `labctl status` (on the host) and for the next machine (on the volume)."""
        try:
            with open(SERVICES_FILE, encoding="utf-8") as handle:
                known = json.load(handle)
        except (FileNotFoundError, ValueError):
            known = {}
        if self.check or (known and not self.changes):
            return dict(known)
        flavour, ports = self.params["s3_flavour"], self.params["ports"]
        versions = docker.versions(list(docker.SERVICES))
        url = "http://127.0.0.1:{}"
        s3: dict[str, Any] = {"url": url.format(ports["s3"]), "version": docker.s3_version(flavour), "health": "s3"}
        s3 |= {"flavour": flavour, "data": plan.s3_dir}
        if flavour == "rclone":
            s3["note"] = "rclone serve s3: plain files in a folder of their own, not MinIO's format"
        else:
            s3["console_url"] = url.format(ports["s3_console"])
        jupyter = {"url": url.format(ports["jupyter"]), "version": versions["jupyter"], "health": "jupyter"}
        jupyter["token_file"] = os.path.join(self.secrets_dir, "jupyter_token")
        services = {
            "mlflow": {"url": url.format(ports["mlflow"]), "version": versions["mlflow"], "health": "mlflow"},
            "postgres": {"url": "", "version": versions["postgres"], "health": "postgres", "data": plan.postgres_dir},
            "s3": s3,
            "jupyter": jupyter,
        }
        self._write(SERVICES_FILE, json.dumps(services, indent=1) + "\n")
        record = {
            "layout": 1,
            "postgres_major": versions["postgres"].split(".")[0],
            "s3_flavour": flavour,
            "mlflow_version": versions["mlflow"],
            "images": self.params["images"],
        }
        self._write(os.path.join(self.data_dir, ".labctl", "stack.json"), json.dumps(record, indent=1) + "\n")
        return services

    # -- the guard -------------------------------------------------------------------------------------------------

    def _guard(self) -> None:
        """Enable and start the guard; restart one that runs a former version of itself."""
        shown = systemctl("show", "--property=ActiveState,UnitFileState,ExecMainStartTimestampMonotonic", UNIT)
        now = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
        active = now.get("ActiveState") == "active"
        verbs = [] if now.get("UnitFileState") == "enabled" else ["enable"]
        if not active:
            verbs.append("start")
        elif self._newer_than(int(now.get("ExecMainStartTimestampMonotonic") or 0) / 1e6):
            verbs.append("restart")
        for verb in verbs:
            self.changes.append(f"{UNIT}: {verb}")
            if not self.check:
                systemctl(verb, UNIT, check=True)

    @staticmethod
    def _newer_than(started: float) -> bool:
        """Whether the guard's files were written after `started` (seconds of the monotonic clock)."""
        boot = time.time() - time.monotonic()
        return any(os.path.exists(path) and os.stat(path).st_mtime - boot > started for path in (GUARD, UNIT_FILE))

    def _result(self, before: str, after: str) -> dict[str, Any]:
        if after:
            self.changes.append(after)
        lines = "".join(f"{line}\n" for line in self.changes)
        return {"changed": bool(self.changes), "changes": self.changes, "diff": {"before": before, "after": lines}}


def systemctl(*arguments: str, check: bool = False) -> str:
    """Run systemctl; Failed with its words if `check` is set and it fails."""
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, timeout=60, check=False)
    if check and done.returncode:
        raise Failed(f"systemctl {' '.join(arguments)}: {done.stderr.strip()}", next_step=f"journalctl -u {UNIT}")
    return done.stdout


def stop_services(data_dir: str, project_dir: str, check: bool) -> dict[str, Any]:
    """Guard off, PostgreSQL stopped cleanly, containers removed; the data stays. Failed if something still runs."""
    shown = systemctl("show", "--property=ActiveState,UnitFileState", UNIT)
    guarded = "ActiveState=active" in shown or "UnitFileState=enabled" in shown
    containers = docker.inspect("container", list(docker.SERVICES))
    changed = guarded or bool(containers)
    diff = {"before": "".join(f"{name}\n" for name in containers), "after": ""}
    pid_file = os.path.join(data_dir, "postgres_data", "postmaster.pid")
    if not changed or check:
        return {"changed": changed, "diff": diff, "clean_shutdown": not os.path.exists(pid_file)}
    if guarded:
        systemctl("disable", "--now", UNIT, check=True)
    with docker.locked():
        done = docker.compose(project_dir, "down", "--timeout", str(STOP_SECONDS // 2), seconds=STOP_SECONDS)
    left = docker.inspect("container", list(docker.SERVICES))
    if done.returncode or left:
        raise Failed(
            f"The services can't be stopped: {done.stderr.strip()[-800:]}",
            found=f"still there: {', '.join(left) or 'none'}",
            next_step="look at `docker ps -a` on the server, then run the command again",
        )
    with contextlib.suppress(FileNotFoundError):
        os.unlink(volume.MOUNT_RECORD)
    return {"changed": True, "diff": diff, "clean_shutdown": not os.path.exists(pid_file)}
