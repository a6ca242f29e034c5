"""How many API requests the commands make, whatever else is in the project. Requests for tokens are included."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml
from admin import Operator, project_of_its_own
from conftest import CLOUD, FLAVOR, IMAGE, Lab, object_entry
from faults import proxy
from labctl import ansible, lifecycle, observe, teardown
from labctl import lab as labs
from labctl.cloud import network, server, session, volume
from labctl.context import Context
from labctl.models import Rule, SecurityGroup
from labctl.progress import Progress
from rich.console import Console

#: What issue 4 allows. An object store with a login of its own costs one more (its token) than is measured here.
UP, STATUS, INVENTORY = 15, 8, 5


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Operator, Lab]]:
    with project_of_its_own(tmp_path_factory.mktemp("own")) as made:
        yield made


@pytest.fixture(scope="module")
def finished(both: tuple[Operator, Lab], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a lab whose server can be logged into, with volume, container, address and credential.

    What Ansible does on the host is no API request, and is left out.
    """
    own, folder = both[1], tmp_path_factory.mktemp("finished")
    name = own.prefix
    (folder / "lab.yaml").write_text(
        f"lab: {name}\nserver: {{flavor: {FLAVOR}, image: {IMAGE}, name: {name}-server, ssh_key: {folder / 'key'}}}\n"
        f"volume: {{name: {name}-volume, size_gib: 1}}\nobject_store: {{container: {name}-container}}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABCTL_STATE", str(folder / "state"))
        patch.setattr(ansible, "run", lambda *_: ansible.Outcome())
        lifecycle.up(context(own, folder))
        yield folder
        teardown.destroy(context(own, folder), force=True)


def context(own: Lab, folder: Path) -> Context:
    """The lab as one command sees it, with a login of its own."""
    ctx = Context(labs.load(folder / "lab.yaml"), Progress(Console(quiet=True)), lambda _: False)
    ctx.site = own.cloud.site
    return ctx


def counted(own: Lab, folder: Path) -> dict[str, list[tuple[str, str]]]:
    """The requests of each command."""
    done = {}
    for command in (lifecycle.up, observe.status, lifecycle.verify):
        ctx = context(own, folder)
        command(ctx)
        done[command.__name__] = [(method, url) for method, url, _ in ctx.cloud.traffic.log]
    ctx = context(own, folder)
    lifecycle.up(ctx)
    observe.status(ctx)  # what the command line shows at the end of `up`
    done["up with its summary"] = [(method, url) for method, url, _ in ctx.cloud.traffic.log]
    return done


@pytest.mark.parametrize(
    ("others", "volumes"), [(6, 8), pytest.param(30, 50, marks=pytest.mark.slow)], ids=["small", "large"]
)
def test_a_finished_lab_costs_few_requests_whatever_else_is_in_the_project(
    both: tuple[Operator, Lab], finished: Path, others: int, volumes: int
) -> None:
    admin, own = both
    alone = counted(own, finished)
    assert len(alone["up with its summary"]) <= UP, alone
    assert len(alone["status"]) <= STATUS, alone
    with (
        admin.quota("compute", instances=others + 9, cores=999, ram=9_999_999, key_pairs=99),
        admin.quota("block_storage", volumes=volumes + 9, gigabytes=999),
        admin.flavor(**{"aggregate_instance_extra_specs:labctl": "nowhere"}) as nowhere,
    ):
        names = crowd(own, others, volumes, str(nowhere.id))
        crowded = counted(own, finished)
        assert {command: len(made) for command, made in crowded.items()} == {
            command: len(made) for command, made in alone.items()
        }
        remove(own, names)


def crowd(own: Lab, others: int, volumes: int, flavor: str) -> str:
    """Other servers (records that found no host, by one request), volumes, groups; returns how their names begin."""
    name = f"{own.prefix}-crowd{secrets.token_hex(2)}"
    compute = own.cloud.compute.compute
    compute.create_server(
        name=name,
        image_id=compute.find_image(IMAGE).id,
        flavor_id=flavor,
        networks=[{"uuid": server.network_of(own.cloud, own.cloud.site.network)}],
        min_count=others,
        max_count=others,
    )
    for number in range(volumes):
        own.cloud.compute.block_storage.create_volume(name=f"{name}-{number}", size=1)
    network.ensure_groups(own.cloud, [SecurityGroup(f"{name}-{n}", (Rule(22),)) for n in range(3)])
    there = [one for one in server.names(own.cloud).values() if one.startswith(name)]
    assert (len(there), len(of_crowd(own, name))) == (others, volumes)
    return name


def of_crowd(own: Lab, name: str) -> list[str]:
    return [one.id for one in volume.list_volumes(own.cloud) if one.name.startswith(name)]


def remove(own: Lab, name: str) -> None:
    servers = [key for key, one in server.names(own.cloud).items() if one.startswith(name)]
    for wait in (False, True):
        for each in servers:
            server.delete(own.cloud, each, own.told, wait=wait)
    for each in of_crowd(own, name):
        volume.settled(own.cloud, each, own.told)
        own.cloud.compute.block_storage.delete_volume(each)


def test_the_inventory_asks_once_in_a_run_and_an_error_is_never_remembered(
    both: tuple[Operator, Lab], finished: Path, tmp_path: Path
) -> None:
    own, script = both[1], Path(__file__).parents[2] / "inventory" / "labctl.py"
    entries = yaml.safe_load(own.cloud.site.clouds_file.read_text())["clouds"]  # type: ignore[union-attr]
    with proxy() as api:
        for name in {CLOUD, object_entry()}:
            entries[name]["auth"]["auth_url"] = api.through(entries[name]["auth"]["auth_url"])
        entries["behind"] = entries.pop(CLOUD)
        path = tmp_path / "clouds.yaml"
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump({"clouds": entries}))
        text = (finished / "lab.yaml").read_text() + "site: behind\n"
        text += f"cloud: {{object_cloud: {object_entry() if object_entry() != CLOUD else 'behind'}}}\n"
        (tmp_path / "lab.yaml").write_text(text)
        run = partial(
            subprocess.run,
            cwd=tmp_path,
            env={**os.environ, "OS_CLIENT_CONFIG_FILE": str(path)},
            capture_output=True,
            text=True,
            check=False,
        )

        def asked(*arguments: str) -> subprocess.CompletedProcess[str]:
            return run([sys.executable, str(script), *arguments])

        listed = asked("--list")
        assert listed.returncode == 0, listed.stderr
        first = len(api.seen)
        assert 0 < first <= INVENTORY, api.seen
        host = f"{own.prefix}-server"
        again, variables = asked("--list"), asked("--host", host)
        assert again.stdout == listed.stdout
        assert json.loads(variables.stdout) == json.loads(listed.stdout)["_meta"]["hostvars"][host]
        assert len(api.seen) == first, "the same run asked the cloud again"
        # another run (a shell between) asks anew
        other = run(["/bin/sh", "-c", f"'{sys.executable}' '{script}' --list; exit $?"])
        assert other.stdout == listed.stdout
        assert len(api.seen) == 2 * first
        # what labctl changes is seen at once; a cloud that refuses is an error, also the second time
        lifecycle.inventory_cache.forget(Path(os.environ["LABCTL_STATE"]) / "behind" / own.prefix)
        path.write_text(path.read_text().replace(entries["behind"]["auth"]["password"], "wrong"))
        for _ in range(2):
            refused = asked("--list")
            assert (refused.returncode, refused.stdout) == (3, "")
            assert "credentials" in refused.stderr


def test_a_login_talks_to_the_cloud_and_to_nobody_else(tmp_path: Path) -> None:
    """python-chi's `use_site` asks a host of Chameleon's for its sites, without a time-out, wherever the cloud is."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "asked = set()\n"
        "def hook(event, arguments):\n"
        "    if event == 'socket.getaddrinfo': asked.add(arguments[0])\n"
        "sys.addaudithook(hook)\n"
        "from conftest import session, site, server\n"
        "assert server.find(session.connect(site()), 'lct-none') is None\n"
        "print(*sorted(map(str, asked)), sep='\\n')\n"
    )
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=tmp_path)
    cloud = session.connect(__import__("conftest").site())
    hosts = {
        endpoint["url"].split("/")[2].partition(":")[0]
        for entry in cloud.compute.session.auth.get_access(cloud.compute.session).service_catalog.catalog
        for endpoint in entry["endpoints"]
    }
    assert done.stdout.split(), "nothing was asked: the test proves nothing"
    assert set(done.stdout.split()) <= hosts
