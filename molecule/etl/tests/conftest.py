"""Fixtures of the scenario."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import loads
from loads import GATEWAY, NODE, SETTINGS, food11, nodes


@pytest.fixture(scope="session")
def container() -> loads.Container:
    """The scenario's container."""
    return loads.Container()


@pytest.fixture(scope="session")
def objects(container: loads.Container) -> Any:
    """A function that lists the container: {name: MD5}."""
    return container.objects


@pytest.fixture
def served() -> Iterator[Any]:
    """`served(path)` puts a file on an HTTP server that the node reaches; returns its URL."""
    running = []

    def serve(path: Path) -> str:
        server = food11.server(path, GATEWAY, 0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"http://{GATEWAY}:{server.server_address[1]}/{path.name}"

    yield serve
    for server in running:
        server.shutdown()


@pytest.fixture
def described(served: Any) -> Iterator[Any]:
    """`described(file, **settings)` gives the program a dataset and settings, as the role would; undone at the end."""
    kept = nodes.execute(NODE, "cat", SETTINGS)

    def give(path: Path | None, sha256: str = "", dataset: dict[str, Any] | None = None, **more: Any) -> None:
        document = json.loads(kept)
        document["dataset"] |= {
            "name": "part",
            "url": served(path) if path else "",
            "sha256": sha256,
            **(dataset or {}),
        }
        nodes.execute(NODE, "tee", SETTINGS, data=json.dumps({**document, **more}).encode())

    yield give
    nodes.execute(NODE, "tee", SETTINGS, data=kept.encode())
