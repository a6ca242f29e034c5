"""A role's argument_specs.yml must name exactly the variables of its defaults: what isn't in both isn't documented."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml


def main() -> int:
    """Print each difference; 1 if there is any."""
    wrong = 0
    for role in sorted((Path(__file__).parents[1] / "roles").iterdir()):
        specs = yaml.safe_load((role / "meta" / "argument_specs.yml").read_text())["argument_specs"]
        options = {name: option for spec in specs.values() for name, option in (spec.get("options") or {}).items()}
        defaults_file = role / "defaults" / "main.yml"
        defaults = (yaml.safe_load(defaults_file.read_text()) if defaults_file.exists() else None) or {}
        public = {name for name in defaults if not name.startswith("_")}
        for name in sorted(public - options.keys()):
            print(f"{role.name}: {name} has a default and no entry in argument_specs.yml")
            wrong += 1
        for name in sorted(
            name for name, option in options.items() if name not in public and not option.get("required")
        ):
            print(f"{role.name}: {name} is optional in argument_specs.yml and has no default")
            wrong += 1
        if not (role / "README.md").is_file():
            print(f"{role.name}: no README.md")
            wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
