#!/usr/bin/python
"""One remote task that installs Docker and says what its daemon.json should hold."""

from __future__ import annotations

DOCUMENTATION = r"""
module: docker_engine
short_description: Install Docker Engine and work out its daemon.json
description:
  - Installs the packages that are missing; with all of them there no apt runs.
  - A host that has all packages of C(accept) instead is left as it is.
  - Reads the daemon.json on the host and returns it with C(settings) merged in. It is written by another task.
options:
  packages:
    description: Names of the Debian packages to install.
    type: list
    elements: str
    required: true
  accept:
    description: Packages of another Docker that is as good when all of them are installed.
    type: list
    elements: str
    default: []
  settings:
    description: >-
      Top-level keys of daemon.json. Lists are put in front of what the host has, C(log-opts) is merged if the
      C(log-driver) is the same, anything else replaces.
    type: dict
    default: {}
  config:
    description: Path of daemon.json.
    type: path
    default: /etc/docker/daemon.json
author: labctl
attributes:
  check_mode: {support: full, description: Predicts.}
  diff_mode: {support: full, description: Shows the packages.}
"""

EXAMPLES = r"""
- name: Install | Docker Engine and compose
  docker_engine:
    packages: [docker.io, docker-cli, docker-compose]
    settings: {log-driver: local}
  register: __docker_engine
"""

RETURN = r"""
daemon_json:
  description: The whole text that daemon.json should have.
  type: str
  returned: always
installed:
  description: Packages that were installed, or would be.
  type: list
  returned: always
"""

from ansible.module_utils import deb_packages
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.daemon_json import BadConfig, parse, render


def read(path: str) -> str:
    """The text of a file; empty where there is none."""
    try:
        with open(path, encoding="utf-8") as handle:
            return handle.read()
    except FileNotFoundError:
        return ""


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "packages": {"type": "list", "elements": "str", "required": True},
            "accept": {"type": "list", "elements": "str", "default": []},
            "settings": {"type": "dict", "default": {}},
            "config": {"type": "path", "default": "/etc/docker/daemon.json"},
        },
        supports_check_mode=True,
    )
    packages, accept, path = module.params["packages"], module.params["accept"], module.params["config"]
    text = read(path)
    try:
        found = parse(text, path)
    except BadConfig as error:
        module.fail_json(
            msg=str(error),
            expected="a JSON object",
            found=text[:200],
            next_step=f"repair or move {path} on the host, then converge again",
        )
    todo = deb_packages.missing(module, packages)
    if todo and accept and not deb_packages.missing(module, accept):
        todo = []
    if todo and not module.check_mode:
        try:
            deb_packages.install(module, todo)
        except deb_packages.AptFailed as error:
            module.fail_json(
                msg=str(error),
                expected=f"the packages {', '.join(todo)} to install without removing any",
                next_step="run the apt-get command on the host and follow what it says",
            )
    diff = {"before": "", "after": "".join(f"package {name}\n" for name in todo)}
    module.exit_json(
        changed=bool(todo), installed=todo, diff=diff, daemon_json=render(found, text, module.params["settings"])
    )


if __name__ == "__main__":
    main()
