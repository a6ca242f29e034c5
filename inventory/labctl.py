#!/usr/bin/env python3
"""The lab's dynamic inventory for plain `ansible-inventory -i inventory/labctl.py` and `ansible-playbook`.

The lab is `./lab.yaml` or what `$LABCTL_LAB` names. A failure ends with labctl's exit code and a message on stderr,
never with an empty inventory; for Ansible to stop at it too: ANSIBLE_INVENTORY_ANY_UNPARSED_IS_FAILED=true.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

_TRIED = "LABCTL_INVENTORY_PYTHON"


def main() -> int:
    """Prints the inventory (`--list`) or one host's variables (`--host NAME`) as JSON."""
    parser = argparse.ArgumentParser(description="The lab's Ansible inventory, from the cloud.")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--list", action="store_true", help="all hosts with their variables")
    wanted.add_argument("--host", metavar="NAME", help="one host's variables")
    options = parser.parse_args()

    # This file is called labctl as the package is: its folder must not be where Python looks first.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    try:
        from labctl.errors import LabctlError
        from labctl.lifecycle import inventory_document
    except ImportError as error:
        return _with_labctls_python(error)
    try:
        document = inventory_document(None)
    except LabctlError as error:
        for key, text in error.as_dict().items():
            if key != "exit_code":
                _say(str(text) if key == "what" else f"  {key.replace('_', ' ')}: {text}")
        return error.exit_code
    if options.host:
        hosts = document["_meta"]["hostvars"]
        if options.host not in hosts:
            _say(f"no host {options.host}; there is: {', '.join(hosts) or 'none'}")
            return 2
        document = hosts[options.host]
    sys.stdout.write(json.dumps(document, indent=1, sort_keys=True) + "\n")
    return 0


def _with_labctls_python(error: ImportError) -> int:
    """Starts again with the Python that labctl is installed for: Ansible takes whatever python3 is first in PATH."""
    here = Path(__file__).resolve()
    # a checkout: ROOT/inventory/labctl.py; a wheel: PREFIX/lib/pythonX.Y/site-packages/labctl/_data/inventory/labctl.py
    places = [here.parents[1] / ".venv" / "bin", *(parent / "bin" for parent in here.parents[6:7])]
    if command := shutil.which("labctl"):
        places.append(Path(command).resolve().parent)
    for place in places if _TRIED not in os.environ else []:
        python = place / "python"
        if python.is_file() and (place / "labctl").exists():
            os.environ[_TRIED] = str(python)
            os.execv(python, [str(python), str(here), *sys.argv[1:]])  # noqa: S606 (no shell is what is wanted)
    _say(f"labctl can't be used by {sys.executable}: {error}")
    _say("  next step: put the bin folder of labctl's environment first in PATH")
    return 2


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
