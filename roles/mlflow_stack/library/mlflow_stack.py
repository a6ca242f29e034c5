#!/usr/bin/python
"""The stack's services: read everything, decide, apply the difference."""

from __future__ import annotations

DOCUMENTATION = r"""
module: mlflow_stack
short_description: Run the MLflow stack on a mounted volume, or stop it
description:
  - Reads the volume, the images and the containers, decides whether the services may run, and applies the difference.
  - Stops before anything is written if the volume isn't mounted, or holds data that the images don't fit.
  - In check mode it predicts, also on a host without Docker or volume.
options:
  state: {description: C(started) or C(stopped)., type: str, choices: [started, stopped], required: true}
  data_dir: {description: Mount point of the volume., type: path, required: true}
  project_dir: {description: Directory of the compose project., type: path, required: true}
  images: {description: "Full references by service; an empty C(jupyter) is built.", type: dict, default: {}}
  s3_flavour: {description: Kind of S3 server., type: str, choices: [minio, silo, rclone], default: minio}
  ports: {description: Published ports by service., type: dict, default: {}}
  mlflow_uid: {description: User id that MLflow runs as., type: int, default: 10001}
  lock_timeout: {description: Seconds to wait for another run on the same host to end., type: int, default: 900}
  start_timeout: {description: Seconds until all services must be healthy., type: int, default: 420}
  pull_timeout: {description: Seconds for pulling or building images., type: int, default: 1200}
  upgrade_timeout: {description: Seconds for each step of an upgrade of MLflow's schema., type: int, default: 3600}
  credentials:
    description: What a volume that was made without labctl was made with; the tutorial's if it is empty.
    type: dict
    default: {}
author: labctl
attributes:
  check_mode: {support: full, description: Predicts.}
  diff_mode: {support: full, description: Names what would change and why.}
"""

EXAMPLES = r"""
- name: Run | Services on the volume
  mlflow_stack:
    state: started
    data_dir: /mnt/block
    project_dir: /etc/labctl/stack
    images: "{{ mlflow_stack_images }}"
"""

RETURN = r"""
services:
  description: What /etc/labctl/services.json says, by service (url, version, health, note).
  type: dict
  returned: when started
dumps:
  description: How many dumps from before upgrades the volume keeps (count) and their size (bytes).
  type: dict
  returned: when started
clean_shutdown:
  description: Whether PostgreSQL wrote its last checkpoint and removed its pid file.
  type: bool
  returned: when stopped
"""

import contextlib
import shutil

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.stack_converge import Converge, Failed, stop_services
from ansible.module_utils.stack_docker import Busy, DockerFailed, alone
from ansible.module_utils.stack_marker import MarkerError
from ansible.module_utils.stack_plan import Stop


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["started", "stopped"], "required": True},
            "data_dir": {"type": "path", "required": True},
            "project_dir": {"type": "path", "required": True},
            "images": {"type": "dict", "default": {}},
            "s3_flavour": {"type": "str", "choices": ["minio", "silo", "rclone"], "default": "minio"},
            "ports": {"type": "dict", "default": {}},
            "mlflow_uid": {"type": "int", "default": 10001},
            "lock_timeout": {"type": "int", "default": 900},
            "start_timeout": {"type": "int", "default": 420},
            "pull_timeout": {"type": "int", "default": 1200},
            "upgrade_timeout": {"type": "int", "default": 3600},
            "credentials": {"type": "dict", "default": {}, "no_log": True},
        },
        supports_check_mode=True,
    )
    params, check = module.params, module.check_mode
    if shutil.which("docker") is None:
        if check or params["state"] == "stopped":
            starting = params["state"] == "started"
            after = "images pulled, services started\n" if starting else "stopped\n"
            module.exit_json(changed=starting, diff={"before": "no Docker\n" if starting else after, "after": after})
        module.fail_json(msg="There is no docker command on this host.", next_step="run the role docker first")
    try:
        with contextlib.nullcontext() if check else alone(params["lock_timeout"]):
            if params["state"] == "stopped":
                module.exit_json(**stop_services(params["data_dir"], params["project_dir"], check))
            module.exit_json(**Converge(params, check).run())
    except Busy as busy:
        module.fail_json(
            msg="Another run is still at work on this host's services; nothing was changed.",
            expected=f"that it ends within {params['lock_timeout']} s",
            found=str(busy),
            next_step="run the same command again once it is done; `ps -f PID` on the server shows what it does",
        )
    except Stop as stop:
        module.fail_json(safety_stop=True, **stop.facts)
    except MarkerError as error:
        step = "look at the file, then converge again"
        module.fail_json(safety_stop=True, msg="The volume's marker can't be used.", found=str(error), next_step=step)
    except OSError as error:
        step = "labctl status shows the room on the volume; `dmesg` on the server shows a failing disk"
        module.fail_json(msg=f"The host's or the volume's filesystem refused: {error}", next_step=step)
    except Failed as failure:
        module.fail_json(**failure.facts)
    except DockerFailed as failure:
        module.fail_json(msg=str(failure), next_step="look at `systemctl status docker`, then converge again")


if __name__ == "__main__":
    main()
