"""From what is there to what should be there: the steps of the module mlflow_stack, in their order."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import time
from typing import Any

from ansible.module_utils import stack_adopt as adopt
from ansible.module_utils import stack_docker as docker
from ansible.module_utils import stack_first as first
from ansible.module_utils import stack_marker as marker
from ansible.module_utils import stack_schema as schema
from ansible.module_utils import stack_secrets as keys
from ansible.module_utils import stack_volume as volume
from ansible.module_utils.stack_plan import (
    LEAST_FREE,
    PLAIN_FILES,
    S3_FORMATS,
    UPGRADE,
    Plan,
    Stop,
    VolumeState,
    Wanted,
    decide,
    decide_schema,
    postgres_image,
)

UNIT = "labctl-stack.service"
GUARD = "/usr/local/lib/labctl/stack-guard"
UNIT_FILE = f"/etc/systemd/system/{UNIT}"
SERVICES_FILE = "/etc/labctl/services.json"
NOTEBOOK = "food11_demo.ipynb"
#: What compose reads in place of .env until the database fits the image of MLflow that .env will name.
STORES_ENVIRONMENT = "/run/labctl-stack.env"
#: What the marker's key `stack` says once a stack has run on the volume.
MARKED = ("postgres_major", "postgres_dir", "s3_format", "s3_dir", "mlflow_version", "mlflow_schema", "origin")
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
        #: The reference of each service's image; PostgreSQL's depends on the volume.
        self.references: dict[str, str] = {}

    def run(self) -> dict[str, Any]:
        """The module's result; Stop, Failed or DockerFailed otherwise."""
        state = self._read_volume()
        if self.check and not state.mounted:
            return self._result("the volume isn't mounted yet", "services started on the volume")
        images = self._images(state)
        if images is None:
            return self._result("images are missing", "images pulled, services started")
        if remains := first.without_content(state, self.params["s3_flavour"]):
            if self.check:
                return self._result("a first start was cut off", "services started anew")
            self._forget_stores()
            self.changes += first.put_aside(self.data_dir, remains)
            state = self._read_volume()
        plan = decide(state, Wanted(self.data_dir, self._postgres_major(images), self.params["s3_flavour"]))
        self._room(state)
        if plan.adopt and not self._adopt(plan, state):
            return self._result("a volume that was made without labctl", "credentials proved, services started on it")
        self._prepare(plan)
        jupyter = self._jupyter_image(images)
        environment = self._environment(plan, jupyter, self.secrets_dir)
        current = self._up_to_date(images, environment)
        upgrade = None if current or self.check else self._settle_stores(plan, state, images, environment)
        self._write(os.path.join(self.project_dir, ".env"), environment)
        if not current:
            self._up(upgrade)
        services = self._describe(plan, state)
        self._guard()
        return {**self._result("", ""), "services": services, "dumps": schema.dumps_size(self.data_dir)}

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

    def _room(self, state: VolumeState) -> None:
        """Failed where the volume is as good as full: PostgreSQL would stop at its next write."""
        if state.free < LEAST_FREE:
            raise Failed(
                f"The volume at {self.data_dir} is full; the services can't write, and reads go on.",
                expected=f"at least {LEAST_FREE >> 20} MiB free",
                found=f"{state.free >> 20} MiB free of {state.size >> 20} MiB",
                next_step="labctl volume extend, or delete runs; the services go on by themselves once there is room",
            )

    def _images(self, state: VolumeState) -> dict[str, dict[str, Any]] | None:
        """The images by reference, pulled if they were missing; None in check mode if one is missing."""
        given = {name: str(reference) for name, reference in self.params["images"].items() if reference}
        self.references = {name: given[name] for name in docker.SERVICES if name in given}
        self.references["postgres"] = given[postgres_image(state, given)]
        wanted = list(self.references.values())
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
        environment = images[self.references["postgres"]].get("Config", {}).get("Env") or []
        return next((line.partition("=")[2] for line in environment if line.startswith("PG_MAJOR=")), "")

    def _jupyter_image(self, images: dict[str, dict[str, Any]]) -> str:
        """The given image, or the tag of one built on the MLflow image from what lies beside the compose file."""
        given = str(self.params["images"].get("jupyter") or "")
        if given:
            return given
        base = self.references["mlflow"]
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

    # -- adopting --------------------------------------------------------------------------------------------------

    def _adopt(self, plan: Plan, state: VolumeState) -> bool:
        """Prove the credentials of a volume that was made without labctl and keep them; False in check mode."""
        values = adopt.candidate(self.params["credentials"] or {}, self.data_dir)
        if self.check:
            return False
        self._refuse_others(plan)
        self.secrets = values
        stage = adopt.stage(values, plan, self.params["mlflow_uid"])
        environment = os.path.join(stage, "environment")
        docker.write_atomically(environment, self._environment(plan, self.references["mlflow"], stage), 0o600)
        for name, uid, mode in plan.create:
            if volume.make_folder(os.path.join(self.data_dir, name), uid, mode):
                self.changes.append(f"{name} made")
        adopt.prove(self.params, environment, self.references["mlflow"], values)
        # The origin first: a run that is cut off in between proves once more, and never takes the data for labctl's.
        marker.write(self.data_dir, {**state.stack, "origin": plan.origin})
        if volume.make_folder(self.secrets_dir, 0, 0o700):
            self.changes.append(f"{self.secrets_dir} made")
        keys.keep(self.secrets_dir, values)
        self.changes.append("the volume's credentials proved and kept")
        shutil.rmtree(stage)
        return True

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

    def _kept_secrets(self) -> dict[str, str] | None:
        """The volume's secrets, None where none were made yet; Stop for a file that can't be understood."""
        try:
            kept: dict[str, str] | None = keys.load(self.secrets_dir)
        except ValueError as error:
            raise Stop(
                "The volume's secrets can't be read; without them nobody gets into its database.",
                expected=f"{self.secrets_dir}/{keys.FILE} as labctl wrote it",
                found=str(error),
                next_step="bring the file back, or restore a backup: `labctl restore`",
            ) from None
        return kept

    def _prepare(self, plan: Plan) -> None:
        """Folders, secrets and the demo notebook: only what the volume lacks."""
        self.secrets = self._kept_secrets()
        if self.check:
            if self.secrets is None:
                self.changes.append("secrets generated, folders made")
                self.secrets = {**keys.generate(), "postgres_password": "", "s3_password": "", "jupyter_token": ""}
            return
        if volume.make_folder(self.secrets_dir, 0, 0o700):
            self.changes.append(f"{self.secrets_dir} made")
        if self.secrets is None:
            self.secrets = keys.generate()
            keys.keep(self.secrets_dir, self.secrets)
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

    def _environment(self, plan: Plan, jupyter: str, secrets_dir: str) -> str:
        """The values that compose.yml takes from the volume and the engine; no secret among them."""
        assert self.secrets is not None
        programs = hashlib.sha256()
        folder = os.path.join(self.project_dir, "containers")
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            with open(os.path.join(folder, name), "rb") as handle:
                programs.update(name.encode() + b"\0" + handle.read())
        files = ["compose.yml"]
        files += ["compose.fast-start.yml"] if docker.supports_start_interval() else []
        files += ["compose.s3-root.yml"] if plan.s3_as_root else []
        values = {
            "COMPOSE_FILE": ":".join(os.path.join(self.project_dir, name) for name in files),
            "POSTGRES_OWNER": "{}:{}".format(*plan.postgres_owner),
            "POSTGRES_USER": self.secrets["postgres_user"],
            "POSTGRES_DB": self.secrets["postgres_database"],
            "POSTGRES_DIR": plan.postgres_dir,
            "POSTGRES_TARGET": plan.postgres_target,
            "POSTGRES_IMAGE": self.references["postgres"],
            "MLFLOW_IMAGE": self.references["mlflow"],
            "SECRETS_DIR": secrets_dir,
            "S3_OWNER": "{}:{}".format(*plan.s3_owner),
            "S3_DIR": plan.s3_dir,
            "JUPYTER_IMAGE": jupyter,
            "PROGRAMS": programs.hexdigest()[:16],
        }
        return "# Written by labctl at each converge.\n" + "".join(f"{key}={value}\n" for key, value in values.items())

    # -- containers ------------------------------------------------------------------------------------------------

    def _inputs(self, environment: str) -> str:
        """A hash of everything that compose reads."""
        digest = hashlib.sha256(environment.encode())
        for name in ("compose.yml", "compose.fast-start.yml", "compose.s3-root.yml"):
            try:
                with open(os.path.join(self.project_dir, name), "rb") as handle:
                    digest.update(name.encode() + b"\0" + handle.read())
            except FileNotFoundError:
                digest.update(b"absent")
        return digest.hexdigest()

    def _up_to_date(self, images: dict[str, dict[str, Any]], environment: str) -> bool:
        """Whether the containers are those that the present files asked for, of the present images, and healthy."""
        try:
            with open(os.path.join(self.project_dir, "applied.json"), encoding="utf-8") as handle:
                applied = json.load(handle)
        except (FileNotFoundError, ValueError):
            applied = {}
        containers = docker.inspect("container", list(docker.SERVICES))
        reasons = [] if applied.get("inputs") == self._inputs(environment) else ["the compose project changed"]
        reasons += ["a secret's file was written"] if self.secrets_rewritten else []
        reasons += ["an upgrade of MLflow's schema was cut off"] if self._upgrade().pending else []
        for name in docker.SERVICES:
            container = containers.get(name)
            reference = self.references.get(name)
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

    def _upgrade(self) -> schema.Upgrade:
        assert self.secrets is not None
        database = schema.Database(self.secrets["postgres_user"], self.secrets["postgres_database"])
        return schema.Upgrade(self.data_dir, database, self.params["upgrade_timeout"], self.changes)

    def _settle_stores(
        self, plan: Plan, state: VolumeState, images: dict[str, dict[str, Any]], environment: str
    ) -> schema.Upgrade | None:
        """PostgreSQL and the S3 server up, with a database that fits MLflow; the upgrade if one is unfinished."""
        self._refuse_others(plan)
        if plan.new_cluster or state.first_start:
            self._first_start(plan, environment)
            return None
        return self._settle_schema(images, environment)

    def _first_start(self, plan: Plan, environment: str) -> None:
        """Have the stores made, or their making finished; MLflow makes its own tables once it starts."""
        docker.write_atomically(STORES_ENVIRONMENT, environment)
        if not plan.new_cluster:  # cut off: PostgreSQL's entry point takes a cluster for complete by its first file
            try:
                with docker.locked():
                    self._compose_up(docker.STORES, STORES_ENVIRONMENT, first.GRACE)
                first.end(self.data_dir)
                return
            except Failed:
                self._forget_stores()
                self.changes += first.put_aside(self.data_dir, [plan.postgres_place.partition("/")[0]])
                volume.make_folder(plan.postgres_dir, plan.postgres_owner[0], 0o700)
        first.begin(self.data_dir)
        with docker.locked():
            self._compose_up(docker.STORES, STORES_ENVIRONMENT)
        first.end(self.data_dir)

    def _forget_stores(self) -> None:
        """No container of ours has the folders that are about to change their names."""
        with docker.locked():
            ours = docker.inspect("container", list(docker.SERVICES))
            names = [name for name, one in ours.items() if docker.is_ours(one, self.project_dir)]
            if names:
                docker.docker("rm", "--force", *names, check=False)

    def _settle_schema(self, images: dict[str, dict[str, Any]], environment: str) -> schema.Upgrade | None:
        """Bring the database to the schema of the MLflow image before that runs."""
        mlflow = self.references["mlflow"]
        with open(os.path.join(self.project_dir, "oneshot", "schema.py"), encoding="utf-8") as script:
            cache = os.path.join(self.project_dir, "schemas.json")
            image = schema.known(mlflow, images[mlflow]["Id"], script.read(), cache)
        docker.write_atomically(STORES_ENVIRONMENT, environment)
        upgrade, stopped = self._upgrade(), []
        with docker.locked():
            before = docker.inspect("container", list(docker.STORES))
            self._compose_up(docker.STORES, STORES_ENVIRONMENT)
            try:
                upgrade.recover()
                found = upgrade.database.schema()
                if decide_schema(found, image) == UPGRADE:
                    stopped = schema.stop_writers(self.project_dir)
                    pgpass = os.path.join(self.secrets_dir, "pgpass")
                    upgrade.run(mlflow, self.params["mlflow_uid"], pgpass, found.revisions[0], image)
            except Stop:
                if not any(one["State"].get("Running") for one in before.values()):  # started only to be asked
                    docker.compose(
                        self.project_dir,
                        "rm",
                        "--stop",
                        "--force",
                        *docker.STORES,
                        seconds=STOP_SECONDS,
                        environment=STORES_ENVIRONMENT,
                    )
                raise
            except (schema.UpgradeFailed, docker.DockerFailed, OSError) as failure:
                if stopped:
                    docker.docker("start", *stopped, check=False)
                raise Failed(
                    keys.scrub(f"MLflow's database wasn't upgraded: {failure}", self.secrets),
                    expected=f"MLflow's schema at {image.head}, that of MLflow {image.version}",
                    found="the database as it was" + (", served as before" if stopped else ""),
                    next_step="mend what the message says and converge again, or keep the MLflow that wrote the data"
                    " (lab.yaml: images.mlflow)",
                ) from None
        return upgrade if upgrade.pending else None

    def _refuse_others(self, plan: Plan) -> None:
        """Stop where somebody else's containers have the data or our names: two servers would ruin it."""
        others = docker.others_on(self.project_dir, [plan.postgres_dir, plan.s3_dir])
        if not others:
            return
        labels = [one["Config"].get("Labels") or {} for one in others.values()]
        files = {str(label.get("com.docker.compose.project.config_files") or "") for label in labels}
        down = f"docker compose -f {files.pop()} down" if len(files) == 1 and "" not in files else ""
        names = " ".join(sorted(others))
        raise Stop(
            "Containers that labctl didn't make have the volume's data or the services' names; nothing was started.",
            expected="none but labctl's own, made from " + self.project_dir,
            found=", ".join(f"{name} ({one['State'].get('Status')})" for name, one in sorted(others.items())),
            next_step=f"save what is only in them (an open notebook), then on the server: sudo"
            f" {down or f'docker stop -t 60 {names} && sudo docker rm {names}'}",
        )

    def _compose_up(self, services: tuple[str, ...], environment: str = "", seconds: int = 0) -> None:
        """`compose up --wait` under the lock that the caller holds. Failed, with the services' last words."""
        found = docker.inspect("container", list(docker.SERVICES))
        seconds, words = seconds or self.params["start_timeout"], ""
        # A running container keeps the file that was at a path when it started. One in a restart loop would wait for
        # Docker's growing pause, or make compose give up at once.
        old = [n for n in services if n in found and (self.secrets_rewritten or docker.is_ailing(found[n]))]
        try:
            if old:
                docker.compose(
                    self.project_dir, "rm", "--stop", "--force", *old, seconds=STOP_SECONDS, environment=environment
                )
            done = docker.compose(
                self.project_dir, "up", "-d", "--no-build", "--wait", "--wait-timeout", str(seconds), *services,
                seconds=seconds + GRACE_SECONDS, environment=environment,
            )  # fmt: skip
            words = done.stderr.strip() if done.returncode else ""
        except docker.DockerFailed as failure:
            words = str(failure)
        containers = {n: c for n, c in docker.inspect("container", list(services)).items() if n in services}
        unhealthy = [name for name in services if not docker.is_healthy(containers.get(name))]
        if words or unhealthy:
            last = words.splitlines()[-1] if words else f"not healthy: {', '.join(unhealthy)}"
            complaints = docker.complaints(containers, services)
            raise Failed(
                keys.scrub(f"The services didn't come up: {last}\n{complaints}", self.secrets),
                expected=f"{', '.join(services)} running and healthy",
                found=f"not healthy: {', '.join(unhealthy) or 'none'}; {volume.free_words(self.data_dir)}",
                next_step="mend what the log above says, then `labctl converge --only mlflow_stack`",
            )

    def _up(self, upgrade: schema.Upgrade | None) -> None:
        """All services; what `_settle_schema` has just started stays."""
        before = docker.identity(docker.inspect("container", list(docker.SERVICES)))
        try:
            with docker.locked():
                self._compose_up(docker.SERVICES)
        except Failed as failure:
            if upgrade:
                self._back(upgrade, failure)
            raise
        if upgrade:
            upgrade.finish()
        containers = docker.inspect("container", list(docker.SERVICES))
        if docker.identity(containers) != before:
            self.changes.append("services started")
            docker.write_atomically(volume.MOUNT_RECORD, volume.mount_at(self.data_dir) or "")
        with open(os.path.join(self.project_dir, ".env"), encoding="utf-8") as environment:
            inputs = self._inputs(environment.read())
        applied = {"inputs": inputs, "containers": {name: c["Id"] for name, c in containers.items()}}
        docker.write_atomically(os.path.join(self.project_dir, "applied.json"), json.dumps(applied, indent=1) + "\n")

    def _back(self, upgrade: schema.Upgrade, failure: Failed) -> None:
        """MLflow doesn't run on the upgraded database: back to the old one, unless somebody wrote to the new one.

        First nothing can start the new MLflow any more, then the databases change names: a new MLflow that met the old
        one would upgrade it by itself.
        """
        if docker.is_healthy(docker.inspect("container", ["mlflow"]).get("mlflow")):
            return
        with docker.locked():
            docker.docker("rm", "--force", *docker.WRITERS, check=False)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.project_dir, ".env"))
            reverted = upgrade.revert()
        failure.facts["found"] += (
            "; the database is as it was before the upgrade"
            if reverted
            else "; the database was upgraded and has been written to since, so it stays"
        )
        failure.facts["next_step"] = (
            "mend what the log above says and converge again, or keep the MLflow that wrote the data (lab.yaml:"
            " images.mlflow)"
        )

    def _describe(self, plan: Plan, state: VolumeState) -> dict[str, Any]:
        """Write down what runs, for `labctl status` (on the host) and for the next machine (on the volume)."""
        try:
            with open(SERVICES_FILE, encoding="utf-8") as handle:
                known = json.load(handle)
        except (FileNotFoundError, ValueError):
            known = {}
        if self.check or (known and not self.changes and set(MARKED) <= set(state.stack)):
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
        self._mark(plan, state, versions)
        return services

    def _mark(self, plan: Plan, state: VolumeState, versions: dict[str, str]) -> None:
        """The marker's key `stack`: what served the volume last, from which directories."""
        revisions = self._upgrade().database.schema().revisions
        stack = {
            **state.stack,
            "postgres_major": versions["postgres"].split(".")[0],
            "postgres_dir": plan.postgres_place,
            "s3_format": PLAIN_FILES if self.params["s3_flavour"] == "rclone" else S3_FORMATS[0],
            "s3_dir": plan.s3_place,
            "mlflow_version": versions["mlflow"],
            "mlflow_schema": revisions[0] if revisions else "",
            "origin": plan.origin,
        }
        if marker.write(self.data_dir, stack):
            self.changes.append(f"{marker.MARKER}: {marker.KEY} brought up to date")

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
    containers = _own_containers(project_dir)
    theirs = docker.tutorials(project_dir)
    changed = guarded or bool(containers or theirs)
    diff = {"before": "".join(f"{name}\n" for name in [*containers, *theirs]), "after": ""}
    if not changed or check:
        return {"changed": changed, "diff": diff, "clean_shutdown": _shut_down(data_dir)}
    if guarded:
        systemctl("disable", "--now", UNIT, check=True)
    with docker.locked():
        if theirs:
            # stopped, not removed: they are the student's, and write to the volume all the same
            docker.docker("stop", "--time", str(STOP_SECONDS // 2), *theirs, seconds=STOP_SECONDS)
        schema.remove_container()
        done = docker.compose(project_dir, "down", "--timeout", str(STOP_SECONDS // 2), seconds=STOP_SECONDS)
        ours = [name for name in _own_containers(project_dir) if name in containers]
        if done.returncode and ours:  # a first converge that was cut off left no .env, without which compose is lost
            docker.docker("stop", "--time", str(STOP_SECONDS // 2), *ours, seconds=STOP_SECONDS)
            done = docker.docker("rm", *ours, check=False)
    left = _own_containers(project_dir)
    if left:
        raise Failed(
            f"The services can't be stopped: {done.stderr.strip()[-800:]}",
            found=f"still there: {', '.join(left)}",
            next_step="look at `docker ps -a` on the server, then run the command again",
        )
    with contextlib.suppress(FileNotFoundError):
        os.unlink(volume.MOUNT_RECORD)
    return {"changed": True, "diff": diff, "clean_shutdown": _shut_down(data_dir)}


def _own_containers(project_dir: str) -> list[str]:
    """The names of the role's containers that exist. Another's of such a name is left to who unmounts the volume."""
    found = docker.inspect("container", [*docker.SERVICES, schema.CONTAINER])
    return [name for name, one in found.items() if name == schema.CONTAINER or docker.is_ours(one, project_dir)]


def _shut_down(data_dir: str) -> bool:
    """Whether no cluster of the volume has a server's pid file, which a clean shutdown removes."""
    pointer = str(volume.read_marker(data_dir)[0].get("postgres_dir") or "")
    places = volume.clusters(data_dir, pointer)
    return not any(os.path.exists(os.path.join(data_dir, place, "postmaster.pid")) for place in places)
