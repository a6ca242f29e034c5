"""A lab.yaml that is wrong must be refused before a cloud is asked for anything, with the place to mend."""

from __future__ import annotations

from pathlib import Path

import pytest
from labctl import lab
from labctl.errors import ConfigError
from labctl.lab import Lab


def load(tmp_path: Path, text: str) -> Lab:
    path = tmp_path / "lab.yaml"
    path.write_text(text)
    return lab.load(path)


REFUSED = {
    "unknown key": ("lab: ada\nservr: {}\n", 2, "servr", "server"),
    "unknown nested key": ("lab: ada\nserver:\n  flavour: m1\n", 3, "server.flavour", "flavor"),
    "wrong type": ("lab: ada\nserver:\n  image: 5\n", 3, "server.image", "string"),
    "number as text": ("lab: ada\nvolume:\n  size_gib: '2'\n", 3, "volume.size_gib", "integer"),
    "true as number": ("lab: ada\nvolume:\n  size_gib: true\n", 3, "volume.size_gib", "integer"),
    "size 0": ("lab: ada\nvolume: {size_gib: 0}\n", 2, "volume.size_gib", "greater than or equal to 1"),
    "negative size": ("lab: ada\nvolume: {size_gib: -2}\n", 2, "volume.size_gib", "greater than or equal to 1"),
    "shell in a name": ("lab: a;reboot\n", 1, "lab", "a-z"),
    "command substitution": ("lab: ada\nserver:\n  name: $(id)\n", 3, "server.name", "63 characters"),
    "newline in a name": ('lab: ada\nserver:\n  name: "a\\nb"\n', 3, "server.name", "63 characters"),
    "name of 64 characters": (f"lab: ada\nserver:\n  name: {'a' * 64}\n", 3, "server.name", "63 characters"),
    "lab name that makes a long one": (f"lab: {'a' * 49}\n", 1, "lab", "48 characters"),
    "path as a name": ("lab: ../../etc\n", 1, "lab", "a-z"),
    "dots in a name": ("lab: ada\nserver:\n  name: a..b\n", 3, "server.name", "63 characters"),
    "mount point /": ("lab: ada\nvolume:\n  mount_point: /\n", 3, "volume.mount_point", "/mnt"),
    "mount point /etc": ("lab: ada\nvolume:\n  mount_point: /etc\n", 3, "volume.mount_point", "/mnt"),
    "mount point below /etc": ("lab: ada\nvolume:\n  mount_point: /etc/x\n", 3, "volume.mount_point", "/mnt"),
    "mount point /mnt": ("lab: ada\nvolume:\n  mount_point: /mnt\n", 3, "volume.mount_point", "/mnt"),
    "mount point by a detour": ("lab: ada\nvolume:\n  mount_point: /mnt/../etc\n", 3, "volume.mount_point", "/mnt"),
    "relative mount point": ("lab: ada\nvolume:\n  mount_point: mnt/x\n", 3, "volume.mount_point", "/mnt"),
    "mount point with a space": ("lab: ada\nvolume:\n  mount_point: /mnt/a b\n", 3, "volume.mount_point", "/mnt"),
    "one mount inside the other": (
        "lab: ada\nobject_store:\n  mount_point: /mnt/block/x\n",
        3,
        "mount_point",
        "inside",
    ),
    "duplicate port": ("lab: ada\nservices:\n  jupyter_port: 8000\n", 3, "jupyter_port", "mlflow_port"),
    "port of the system": ("lab: ada\nservices:\n  jupyter_port: 80\n", 3, "services.jupyter_port", "1024"),
    "port too high": ("lab: ada\nservices:\n  jupyter_port: 70000\n", 3, "services.jupyter_port", "65535"),
    "network that is none": ("lab: ada\naccess:\n  ssh_from: [10.0.0.0/40]\n", 3, "access.ssh_from.0", "IPv4 network"),
    "host bits in a network": ("lab: ada\naccess:\n  ssh_from: [10.0.0.1/8]\n", 3, "access.ssh_from.0", "IPv4 network"),
    "key twice": ("lab: ada\nserver: {}\nserver: {}\n", 3, "server", "twice"),
    "broken YAML": ("lab: [\n", 2, "not valid YAML", ""),
    "a list": ("- lab\n", None, "mapping", ""),
    "empty": ("", None, "mapping", ""),
    "no name": ("site: sandbox\n", None, "lab is missing", ""),
    "short hash": ("lab: ada\ndataset:\n  name: x\n  url: http://h/x\n  sha256: abc\n", 5, "dataset.sha256", "pattern"),
    "image with shell": ("lab: ada\nimages:\n  mlflow: 'a b'\n", 3, "images.mlflow", "image reference"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_refused_with_its_line_key_and_what_is_allowed(tmp_path: Path, name: str) -> None:
    text, line, key, allowed = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    error = caught.value
    told = f"{error.what} {error.expected}"
    assert error.exit_code == 2
    assert "lab.yaml" in told and key in told and allowed in told
    if line is not None:
        assert f"lab.yaml:{line}" in error.what


def test_defaults_are_the_tutorials_names(tmp_path: Path) -> None:
    found = load(tmp_path, "lab: ada\n")
    assert (found.server_name, found.volume_name, found.container_name) == (
        "node-persist-ada",
        "block-persist-ada",
        "object-persist-ada",
    )
    assert (found.volume.mount_point, found.object_store.mount_point) == ("/mnt/block", "/mnt/object")


def test_a_value_knows_its_source(tmp_path: Path) -> None:
    found = load(tmp_path, "lab: ada\nserver:\n  flavor: m1.small\n")
    assert found.source("server.flavor") == f"{tmp_path}/lab.yaml:3"
    assert found.source("server.image") == "default"


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "lab: A\nvolume: {size_gib: 0}\n")
    assert "lab.yaml:1" in caught.value.what
    assert "lab.yaml:2" in caught.value.detail


def test_what_init_writes_is_a_valid_lab(tmp_path: Path) -> None:
    from labctl import template

    found = lab.load(template.write(tmp_path / "lab.yaml", "ada", "chameleon"))
    assert (found.lab, found.site) == ("ada", "chameleon")
    assert found.server == Lab(lab="x").server


def test_init_never_overwrites(tmp_path: Path) -> None:
    from labctl import template

    path = tmp_path / "lab.yaml"
    path.write_text("mine\n")
    with pytest.raises(ConfigError):
        template.write(path, "ada", "sandbox")
    assert path.read_text() == "mine\n"


def test_init_refuses_a_bad_name_and_leaves_nothing(tmp_path: Path) -> None:
    from labctl import template

    with pytest.raises(ConfigError):
        template.write(tmp_path / "lab.yaml", "a;b", "sandbox")
    assert list(tmp_path.iterdir()) == []
