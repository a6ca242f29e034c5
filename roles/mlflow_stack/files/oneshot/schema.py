"""What this image's MLflow knows of its database schema, as JSON, read from the migrations' files without an import."""

import importlib.metadata
import importlib.util
import json
import pathlib
import re


def main():
    """Version, newest revisions (one, in a sound release) and all revisions."""
    package = pathlib.Path(importlib.util.find_spec("mlflow").submodule_search_locations[0])
    known, below = set(), set()
    for file in (package / "store/db_migrations/versions").glob("*.py"):
        text = file.read_text(encoding="utf-8")
        for name, place in (("revision", known), ("down_revision", below)):
            found = re.search(rf"^{name}(?:\s*:[^=]*)?\s*=\s*(.*)$", text, re.MULTILINE)
            place.update(re.findall(r"[\"']([0-9a-f]+)[\"']", found[1]) if found else [])
    version = importlib.metadata.version("mlflow")
    print(json.dumps({"version": version, "heads": sorted(known - below), "revisions": sorted(known)}))


if __name__ == "__main__":
    main()
