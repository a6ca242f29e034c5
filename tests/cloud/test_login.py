"""Logging in: what is wrong is said in the cloud's own words, with where it came from and what to do."""

from __future__ import annotations

import http.server
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CLOUD, CLOUDS_FILE, Lab, object_entry, site
from labctl.cloud import credential, server, session, store
from labctl.errors import CloudRefused, ConfigError


def clouds_file(folder: Path, **changes: Any) -> Path:
    """A copy of the test cloud's entry as `t`, with other auth values."""
    entry = yaml.safe_load(CLOUDS_FILE.read_text())["clouds"][CLOUD]
    entry["auth"].update(changes)
    path = folder / "clouds.yaml"
    path.write_text(yaml.safe_dump({"clouds": {"t": entry}}))
    return path


def at(path: Path, **more: Any) -> Any:
    return site(cloud="t", object_cloud="t", clouds_file=path, **more)


@contextmanager
def listening(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as api:
        threading.Thread(target=api.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{api.server_address[1]}/v3"
        api.shutdown()


def test_a_login_is_two_requests_at_most_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    cloud = session.connect(site())
    assert cloud.user_id and cloud.project_id and cloud.region
    assert cloud.requests <= 2
    assert capfd.readouterr().out == ""


def test_a_wrong_password_is_refused_with_keystones_words_and_not_shown(tmp_path: Path) -> None:
    path = clouds_file(tmp_path, password="not-the-password-7461")
    with pytest.raises(CloudRefused) as caught:
        session.connect(at(path))
    error = caught.value
    assert error.exit_code == 3
    assert "credentials" in error.what
    assert "401" in error.found
    assert str(path) in error.source
    assert error.next_step
    assert "not-the-password-7461" not in str(error.as_dict()) + str(error.__cause__)


def test_a_project_that_isnt_the_users_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CloudRefused, match="credentials"):
        session.connect(at(clouds_file(tmp_path, project_name="nobodys")))


def test_a_wrong_region_names_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(CloudRefused) as caught:
        session.connect(site(region="KVM@NOWHERE"))
    assert session.connect(site()).region in caught.value.expected


def test_an_api_that_is_down_is_named(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(CloudRefused) as caught:
        session.connect(at(clouds_file(tmp_path, auth_url=f"http://127.0.0.1:{port}/v3")))
    assert f"no connection to http://127.0.0.1:{port}" in caught.value.what


def test_an_api_that_never_answers_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "ANSWER_TIMEOUT", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v3"
        started = time.monotonic()
        with pytest.raises(CloudRefused) as caught:
            session.connect(at(clouds_file(tmp_path, auth_url=url)))
    assert time.monotonic() - started < 20
    assert f"no answer from {url}" in caught.value.what
    assert "2 s" in caught.value.what


@pytest.mark.parametrize(
    ("status", "body"),
    [(503, "<html><body><h1>Service Unavailable</h1></body></html>"), (500, ""), (200, "<html>a login page</html>")],
)
def test_an_answer_that_isnt_keystones_is_refused(tmp_path: Path, status: int, body: str) -> None:
    class Broken(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with listening(Broken) as url, pytest.raises(CloudRefused) as caught:
        session.connect(at(clouds_file(tmp_path, auth_url=url)))
    assert "<h" not in str(caught.value.as_dict())


def test_a_missing_file_and_a_missing_entry_make_no_request(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        session.connect(site(clouds_file=tmp_path / "clouds.yaml"))
    assert caught.value.next_step
    with pytest.raises(ConfigError) as caught:
        session.connect(at(CLOUDS_FILE))
    assert CLOUD in caught.value.expected


def test_without_any_configuration_nothing_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OS_AUTH_URL", "OS_CLOUD"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError):
        session.connect(site(cloud=None, object_cloud=None, clouds_file=None))


def test_another_clouds_environment_isnt_mixed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OS_PROJECT_NAME", "of-another-cloud")
    monkeypatch.setenv("OS_AUTH_URL", "http://127.0.0.1:9/v3")
    monkeypatch.setenv("OS_AUTH_TYPE", "v3token")
    assert session.connect(site()).project_id


@pytest.mark.parametrize("auth_type", ["", "password", "v3password"])
def test_an_openrcs_environment_logs_in_too(monkeypatch: pytest.MonkeyPatch, auth_type: str) -> None:
    entry = yaml.safe_load(CLOUDS_FILE.read_text())["clouds"][CLOUD]
    for key, value in entry["auth"].items():
        monkeypatch.setenv(f"OS_{key.upper()}", str(value))
    monkeypatch.setenv("OS_REGION_NAME", entry["region_name"])
    monkeypatch.setenv("OS_AUTH_TYPE", auth_type)
    cloud = session.connect(site(cloud=None, object_cloud=None, clouds_file=None))
    assert server.find(cloud, "lct-no-such-server") is None


def test_the_labs_credential_ends_and_its_successor_can_be_made_before_that(lab: Lab) -> None:
    ends = datetime.now(UTC) + timedelta(hours=1)
    first = credential.create(lab.cloud, lab.name, "0a1b2c3d-more", ends)
    second = credential.create(lab.cloud, lab.name, "0a1b2c3d-more", ends)
    assert first.name.startswith(f"labctl-{lab.name}-0a1b2c3d-")
    assert {c.id for c in credential.list_ours(lab.cloud, lab.name)} == {first.id, second.id}
    assert credential.delete(lab.cloud, first.id) is True
    assert str(second.secret) not in repr(second)
    assert credential.lives(second, timedelta(minutes=50))
    assert not credential.lives(second)
    assert str(second.expires_at).startswith(ends.strftime("%Y-%m-%dT%H:%M"))
    assert credential.delete(lab.cloud, second.id) is True
    assert credential.delete(lab.cloud, second.id) is False


def test_the_labs_credential_reads_the_store_and_may_not_make_another(lab: Lab, tmp_path: Path) -> None:
    made = credential.create(lab.cloud, lab.name, "11111111-more")
    entry = yaml.safe_load(CLOUDS_FILE.read_text())["clouds"][object_entry()]
    entry["auth_type"] = "v3applicationcredential"
    entry["auth"] = {
        "auth_url": entry["auth"]["auth_url"],
        "application_credential_id": made.id,
        "application_credential_secret": made.secret,
    }
    path = tmp_path / "clouds.yaml"
    path.write_text(yaml.safe_dump({"clouds": {"objects": entry}}))
    cloud = session.connect(site(object_cloud="objects", clouds_file=_both(path, tmp_path)))
    store.ensure_container(cloud, f"{lab.prefix}-appcred", {})
    with pytest.raises(CloudRefused) as caught:
        credential.create(cloud, lab.name, "22222222-more")
    assert "openstack application credential create" in caught.value.next_step
    assert "Horizon" in caught.value.next_step
    credential.delete(lab.cloud, made.id)


def _both(objects: Path, folder: Path) -> Path:
    clouds = yaml.safe_load(CLOUDS_FILE.read_text())["clouds"]
    both = folder / "both.yaml"
    both.write_text(yaml.safe_dump({"clouds": {CLOUD: clouds[CLOUD], **yaml.safe_load(objects.read_text())["clouds"]}}))
    return both


def test_no_secret_gets_into_the_libraries_own_debug_log(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    password = yaml.safe_load(CLOUDS_FILE.read_text())["clouds"][CLOUD]["auth"].get("password", "-no password-")
    with caplog.at_level(logging.DEBUG):
        cloud = session.connect(site())
        made = credential.create(cloud, lab.name, "33333333-more")
        credential.delete(cloud, made.id)
    assert caplog.records
    assert str(made.secret) not in caplog.text
    assert f'"password": "{password}"' not in caplog.text


def test_importing_the_cloud_package_costs_nothing_until_it_is_used() -> None:
    modules = "labctl.cloud.session, labctl.cloud.volume, labctl.inventory"
    code = f"import sys, {modules}; print({{'chi', 'openstack', 'keystoneauth1'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
