"""Taking over a volume that was made without labctl: its credentials are proved before any of them is kept.

The two servers are started on their own data, with credentials that lie in memory only. Nothing of labctl's is written
to the volume until both have accepted them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from typing import Any

from ansible.module_utils import stack_docker as docker
from ansible.module_utils import stack_secrets as keys
from ansible.module_utils.stack_plan import Plan, Stop

#: In memory, and gone once the credentials are on the volume or refused.
STAGE = "/run/labctl-adopt"
START_SECONDS, PROOF_SECONDS, STOP_SECONDS = 300, 300, 180


def candidate(given: dict[str, str], data_dir: str) -> dict[str, str]:
    """The credentials to try. Stop where what was given can't be used."""
    try:
        values: dict[str, str] = keys.adopted(given)
    except ValueError as error:
        raise Stop(
            "The credentials that were given for the volume can't be used; nothing was started.",
            expected=", ".join(keys.TUTORIAL),
            found=str(error),
            next_step=f"mend the file that lab.yaml names as volume.credentials_file; {data_dir} is untouched",
        ) from None
    return values


def stage(values: dict[str, str], plan: Plan, uid: int) -> str:
    """The secret files in memory, as the containers will find them on the volume; their directory."""
    shutil.rmtree(STAGE, ignore_errors=True)
    os.mkdir(STAGE, 0o700)
    for name, (content, reader) in keys.files(values, plan.postgres_owner[0], plan.s3_owner[0], uid).items():
        keys.write(STAGE, name, content, reader)
    return STAGE


def prove(params: dict[str, Any], environment: str, image: str, values: dict[str, str]) -> None:
    """Start both servers and log in to them. Stop, with both stopped again, unless both accept the credentials."""
    project_dir, uid, data_dir = params["project_dir"], params["mlflow_uid"], params["data_dir"]
    arguments = [
        *("run", "--rm", "-i", "--name", "labctl-prove", "--label", "labctl.oneshot=1", "--network", docker.NETWORK),
        *("--user", f"{uid}:{uid}", "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true"),
        *("--env", "HOME=/tmp", "--env", "PGPASSFILE=/run/secrets/pgpass", "--env", "AWS_DEFAULT_REGION=us-east-1"),
        *("--env", "AWS_SHARED_CREDENTIALS_FILE=/run/secrets/aws_credentials"),
        *("--env", "MLFLOW_S3_ENDPOINT_URL=http://s3:9000"),
    ]
    for name in ("pgpass", "aws_credentials"):
        arguments += ["--mount", f"type=bind,source={STAGE}/{name},target=/run/secrets/{name},readonly"]
    arguments += ["--entrypoint", "python3", image, "-", values["postgres_user"], values["postgres_database"]]
    with open(os.path.join(project_dir, "oneshot", "prove.py"), encoding="utf-8") as script:
        program = script.read()
    try:
        with docker.locked():
            docker.docker("rm", "--force", "labctl-prove", check=False)
            # Without --wait: with a wrong user or database PostgreSQL's health check would never be content.
            done = docker.compose(
                project_dir, "up", "-d", "--no-build", *docker.STORES, seconds=START_SECONDS, environment=environment
            )
            if done.returncode:
                raise docker.DockerFailed(done.stderr.strip()[-800:])
            answer = docker.docker(*arguments, data=program, seconds=PROOF_SECONDS)
        said = json.loads(answer.stdout)
    except BaseException:
        withdraw(project_dir, environment)
        raise
    refusals = [f"{name}: {said[name]}" for name in docker.STORES if said[name]]
    if refusals:
        containers = docker.inspect("container", list(docker.STORES))
        silent = tuple(
            name for name, one in containers.items() if not one["State"].get("Running") or one["RestartCount"]
        )
        refusals += [docker.complaints(containers, silent)] if silent else []
        withdraw(project_dir, environment)
        raise Stop(
            f"{data_dir} was made without labctl, and its servers don't accept the credentials; none was kept.",
            expected=f"the tutorial's (user {keys.TUTORIAL['postgres_user']}, database"
            f" {keys.TUTORIAL['postgres_database']}), or those of the file that lab.yaml names",
            found=keys.scrub("; ".join(refusals), values),
            next_step="write POSTGRES_USER, POSTGRES_PASSWORD, POSTGRES_DB, MINIO_ROOT_USER and MINIO_ROOT_PASSWORD as"
            " KEY=VALUE lines into a file of mode 0600, name it in lab.yaml as volume: {credentials_file: FILE}, and"
            " converge again",
        )


def withdraw(project_dir: str, environment: str) -> None:
    """Stop what was started for the proof, PostgreSQL cleanly, and forget the credentials."""
    with contextlib.suppress(docker.DockerFailed), docker.locked():
        docker.docker("rm", "--force", "labctl-prove", check=False)
        docker.compose(project_dir, "down", seconds=STOP_SECONDS, environment=environment)
    shutil.rmtree(STAGE, ignore_errors=True)
