"""APIs that fail, are busy, answer with a web page or not at all: an error that says so, and nothing made twice."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CLOUD, CLOUDS_FILE, Lab, object_entry, site
from faults import Fault, Proxy, proxy
from labctl.cloud import credential, lease, network, quota, server, session, store, traffic, volume
from labctl.cloud.session import Cloud
from labctl.errors import CloudRefused
from labctl.models import Rule, SecurityGroup

PAGE = (
    "<!DOCTYPE html><html><head><title>Log in</title></head><body><h1>Welcome to the guest network</h1></body></html>"
)
#: What is asked of each service, and where.
OPERATIONS: dict[str, tuple[str, Callable[[Cloud], Any]]] = {
    "compute": ("/servers/detail", lambda cloud: server.find(cloud, "lct-none")),
    "volumes": ("/volumes/detail", lambda cloud: volume.find(cloud, "lct-none")),
    "network": ("/security-groups", lambda cloud: network.ensure_groups(cloud, [])),
    "images": ("/images", lambda cloud: server.check_choices(cloud, "i", "f", "n")),
    "flavors": ("/flavors", lambda cloud: server.flavor_id(cloud, "lct-none")),
    "limits": ("/limits", quota.room),
    "containers": ("/AUTH_", store.list_containers),
    "identity": ("/application_credentials", lambda cloud: credential.list_ours(cloud, "lct-none")),
    "leases": ("/leases", lease.list_leases),
}
FAULTS = {
    "500": Fault("", 500, body='{"computeFault": {"code": 500, "message": "Unexpected API Error."}}'),
    "503": Fault("", 503, body='{"message": "The server is currently unavailable."}'),
    "503-page": Fault("", 503, body="<html><body><h1>503</h1>No server is available</body></html>", kind="text/html"),
    "429": Fault("", 429, body='{"message": "Too many requests"}', headers={"Retry-After": "2"}),
    "page": Fault("", 200, body=PAGE, kind="text/html; charset=utf-8"),
    "not JSON": Fault("", 200, body="OK", kind="text/plain"),
    "no answer": Fault("", None),
}


def clouds_behind(api: Proxy, folder: Path) -> Path:
    """A clouds.yaml with the test cloud's entries, reached through the proxy."""
    entries = yaml.safe_load(CLOUDS_FILE.read_text())["clouds"]
    for name in {CLOUD, object_entry()}:
        entries[name]["auth"]["auth_url"] = api.through(entries[name]["auth"]["auth_url"])
    path = folder / "clouds.yaml"
    path.write_text(yaml.safe_dump({"clouds": entries}))
    path.chmod(0o600)
    return path


@pytest.fixture
def api() -> Iterator[Proxy]:
    with proxy() as running:
        yield running


@pytest.fixture
def cloud(api: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    """The test cloud through the proxy; pauses are not slept through."""
    monkeypatch.setattr(traffic.time, "sleep", lambda _seconds: None)
    return session.connect(site(clouds_file=clouds_behind(api, tmp_path)))


def test_the_real_answers_come_through(api: Proxy, cloud: Cloud) -> None:
    """Or the tests below would prove nothing."""
    for name, (_, ask) in OPERATIONS.items():
        if name not in ("images", "flavors") and (name != "leases" or lease.offered(cloud)):
            ask(cloud)
    with pytest.raises(CloudRefused, match="there is no flavor lct-none"):
        server.flavor_id(cloud, "lct-none")
    assert cloud.requests == len(api.seen), "every request is counted, those for tokens too"


@pytest.mark.parametrize("everything", [False, True], ids=["one-url", "all"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_api_is_an_error_that_says_what_and_what_next(
    api: Proxy, cloud: Cloud, fault: str, everything: bool
) -> None:
    """Never an empty list, a bug's traceback or a page of HTML; `all`: also where the SDK looks for versions."""
    if fault == "no answer":
        cloud.compute.session.timeout = cloud.objects.session.timeout = 2
    for name, (url, ask) in OPERATIONS.items():
        if name == "leases" and not lease.offered(cloud):
            continue
        if fault == "no answer" and everything and name not in ("compute", "volumes", "containers"):
            continue  # 2 s for each
        api.faults[:] = [Fault(**{**vars(FAULTS[fault]), "url": "." if everything else url})]
        with pytest.raises(CloudRefused) as caught:
            ask(cloud)
        error = caught.value
        api.faults.clear()
        assert error.exit_code == 3
        for text in (error.what, error.expected, error.found, error.next_step, error.source):
            assert text, (name, error.as_dict())
        said = str(error.as_dict())
        assert "<" not in said.replace("<class", ""), (name, said)
        assert {"no answer": "silence", "page": "guest network", "not JSON": "text: OK"}.get(
            fault, fault.partition("-")[0]
        ) in said, (name, said)
        if fault == "429":
            assert "after 2 s" in error.next_step


@pytest.mark.parametrize("status", [429, 503, 502, 504])
def test_a_busy_api_is_asked_again_after_the_pause_that_it_names(
    api: Proxy, cloud: Cloud, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(traffic.time, "sleep", slept.append)
    api.faults[:] = [Fault("/servers/detail", status, headers={"Retry-After": "7"}, times=2)]
    assert server.find(cloud, "lct-none") is None
    assert (api.count("GET", "/servers/detail"), slept) == (3, [7.0, 7.0])


def test_what_makes_something_is_repeated_only_if_it_wasnt_looked_at(lab: Lab, api: Proxy, cloud: Cloud) -> None:
    name = f"{lab.prefix}-busy"
    api.faults[:] = [Fault("/volumes$", 429, method="POST", headers={"Retry-After": "1"}, times=1)]
    made = volume.create(cloud, name, 1, metadata={}, tell=lab.told)
    assert api.count("POST", "/volumes$") == 2
    assert volume.find(cloud, name) == made, "one, not two"
    volume.delete(cloud, made, lab.told)
    api.faults[:] = [Fault("/volumes$", 503, method="POST", times=1)]
    with pytest.raises(CloudRefused, match="API failed"):
        volume.create(cloud, name, 1, metadata={}, tell=lab.told)
    assert api.count("POST", "/volumes$") == 3, "that one could have been executed"
    assert volume.find(cloud, name) is None


@pytest.mark.parametrize("status", [504, None], ids=["504", "silence"])
def test_what_was_made_though_its_answer_was_lost_is_found_by_the_next_run(
    lab: Lab, api: Proxy, cloud: Cloud, status: int | None
) -> None:
    """A gateway gave up while the service went on: the same command again must not make a second one."""
    name = f"{lab.prefix}-lost{status}"
    if status is None:
        cloud.compute.session.timeout = 5
    for url in ("/volumes$", "/floatingips$", "/security-groups$"):
        api.faults.append(Fault(url, status, method="POST", times=1, executed=True))
    with pytest.raises(CloudRefused):
        volume.create(cloud, name, 1, metadata={}, tell=lab.told)
    assert api.count("POST", "/volumes$") == 1
    found = volume.find(cloud, name)
    assert found is not None
    volume.wait_status(cloud, found.id, "available", lab.told)
    volume.delete(cloud, found, lab.told)
    group = SecurityGroup(f"{name}-g", (Rule(22),))
    with pytest.raises(CloudRefused):
        network.ensure_groups(cloud, [group])
    ids = network.ensure_groups(cloud, [group])
    assert api.count("POST", "/security-groups$") == 1
    rules = list(cloud.compute.network.security_group_rules(security_group_id=ids[0], direction="ingress"))
    assert [rule.port_range_min for rule in rules] == [22], "the group that was made has its rules now"
    network.delete_groups(cloud, [group.name])


def test_the_command_line_ends_with_exit_3_and_no_traceback(api: Proxy, tmp_path: Path) -> None:
    labctl = Path(sys.executable).with_name("labctl")
    (tmp_path / "lab.yaml").write_text(f"lab: lct-cli\nsite: {CLOUD}\ncloud: {{object_cloud: {object_entry()}}}\n")
    path = clouds_behind(api, tmp_path)
    if CLOUD == "sandbox":  # the name of a preset
        (tmp_path / "lab.yaml").write_text("lab: lct-cli\nsite: behind\ncloud: {object_cloud: sandbox-objects}\n")
        path.write_text(re.sub(r"^  sandbox:$", "  behind:", path.read_text(), flags=re.MULTILINE))
    environment = {**os.environ, "OS_CLIENT_CONFIG_FILE": str(path), "LABCTL_STATE": str(tmp_path / "state")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(labctl), *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    assert run("status").returncode == 0
    for command in (("status",), ("up",), ("--json", "status"), ("inventory",)):
        api.faults[:] = [Fault("/servers/detail", 200, body=PAGE, kind="text/html")]
        if command == ("up",):
            api.faults[:] = [Fault("/servers/detail", 500, body='{"message": "no"}')]
        done = run(*command)
        said = done.stdout + done.stderr
        assert done.returncode == 3, (command, said)
        assert "Traceback" not in said and "<html" not in said, said
        assert "next" in said, said
    assert not [one for one in api.seen if one[0] in ("POST", "PUT", "DELETE") and "/auth/tokens" not in one[1]]
