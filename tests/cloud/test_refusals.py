"""What services say when they refuse, as seen on OpenStack 2025.1: each must come out as what it is."""

from __future__ import annotations

from typing import Any

import pytest
import requests
from labctl.cloud.refusals import refusals, words_of
from labctl.cloud.traffic import Traffic, was_reset
from labctl.errors import CloudRefused, SafetyStop
from openstack import exceptions


def answer(status: int, body: str, kind: str = "application/json") -> Any:
    response = requests.Response()
    response.status_code, response._content, response.reason = status, body.encode(), "Reason"
    response.headers["Content-Type"] = kind
    response._content_consumed = True
    response.request = request("GET")
    response.url = "http://api.test/v1"
    return response


def refusal(status: int, body: str, kind: str = "application/json") -> CloudRefused:
    with pytest.raises(CloudRefused) as caught, refusals("do it"):
        exceptions.raise_from_response(answer(status, body, kind))
    return caught.value


@pytest.mark.parametrize(
    ("status", "quota", "body"),
    [
        (413, "gigabytes", '{"overLimit": {"code": 413, "message": "VolumeSizeExceedsAvailableQuota: Requested volume or snapshot exceeds allowed gigabytes quota."}}'),  # noqa: E501
        (413, "volumes", '{"overLimit": {"code": 413, "message": "VolumeLimitExceeded: Maximum number of volumes allowed (10) exceeded for quota \'volumes\'."}}'),  # noqa: E501
        (403, "instances", '{"forbidden": {"code": 403, "message": "Quota exceeded for instances: Requested 1, but already used 1 of 0 instances"}}'),  # noqa: E501
        (403, "cores", '{"forbidden": {"code": 403, "message": "Quota exceeded for cores: Requested 1, but already used 4 of 0 cores"}}'),  # noqa: E501
        (409, "floating IPs", '{"NeutronError": {"type": "OverQuota", "message": "Quota exceeded for resources: [\'floatingip\'].", "detail": ""}}'),  # noqa: E501
    ],
)  # fmt: skip
def test_a_quota_is_called_a_quota_in_the_services_words(status: int, quota: str, body: str) -> None:
    error = refusal(status, body)
    assert f"the project's quota of {quota} is used up" in error.what
    assert error.next_step
    assert "uota" in error.detail
    assert error.detail.strip("{").startswith(("Volume", "Quota"))


def test_what_isnt_about_a_quota_isnt_called_one() -> None:
    for status, body in (
        (403, '{"error": {"code": 403, "message": "You are not authorized to perform the requested action"}}'),
        (
            409,
            '{"conflictingRequest": {"code": 409, "message": "Cannot \'attach_volume\' while it is deleting"}}',
        ),
        (400, '{"badRequest": {"code": 400, "message": "Invalid key_name provided."}}'),
    ):
        assert "quota" not in refusal(status, body).what


def test_html_is_told_without_its_tags() -> None:
    error = refusal(503, "<html><body><h1>503</h1> No server is available</body></html>", "text/html")
    assert "<" not in error.found
    assert "503" in error.found


def test_blazars_error_body_is_understood() -> None:
    class Refused(Exception):
        response = answer(409, '{"error_code": 409, "error_name": 409, "error_message": "Not enough hosts"}')

    assert words_of(Refused()) == "Not enough hosts"


def test_a_bug_stays_a_bug_and_a_safety_stop_a_safety_stop() -> None:
    with pytest.raises(KeyError), refusals("do it"):
        raise KeyError("x")
    with pytest.raises(SafetyStop), refusals("do it"):
        raise SafetyStop("no")


class Adapter:
    """Stands for a connection that is reset: a real one can't be made to do it at will."""

    def __init__(self, failures: int, error: OSError) -> None:
        self.failures, self.error, self.sent, self.closed = failures, error, 0, 0

    def send(self, request: Any, **_: Any) -> Any:
        self.sent += 1
        if self.sent <= self.failures:
            raise self.error
        return answer(200, "{}")

    def close(self) -> None:
        self.closed += 1


def watched(adapter: Adapter) -> Adapter:
    class Session:
        hooks: dict[str, list[Any]] = {"response": []}  # noqa: RUF012
        adapters = {"http://": adapter, "https://": adapter}  # noqa: RUF012

    Traffic().watch(Session())
    return adapter


def request(method: str) -> Any:
    return requests.Request(method, "http://api.test/v1", headers={"X-Auth-Token": "t"}).prepare()


def test_a_request_whose_connection_was_just_closed_is_sent_once_more() -> None:
    adapter = watched(Adapter(1, ConnectionResetError(104, "reset")))
    assert adapter.send(request("GET")).status_code == 200
    assert adapter.sent == 2
    with pytest.raises(OSError, match="reset"):
        watched(Adapter(9, ConnectionResetError(104, "reset"))).send(request("DELETE"))


def test_a_post_is_never_sent_twice_since_it_could_make_a_second_server() -> None:
    adapter = watched(Adapter(1, ConnectionResetError(104, "reset")))
    with pytest.raises(OSError, match="reset"):
        adapter.send(request("POST"))
    assert (adapter.sent, adapter.closed) == (1, 1)


@pytest.mark.parametrize(
    ("method", "status", "sent"),
    [("PUT", 503, 3), ("GET", 429, 3), ("POST", 503, 1), ("POST", 429, 3), ("GET", 500, 1)],
)
def test_a_busy_service_is_asked_again_unless_that_could_make_two(
    monkeypatch: pytest.MonkeyPatch, method: str, status: int, sent: int
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("labctl.cloud.traffic.time.sleep", slept.append)

    class Busy(Adapter):
        def send(self, request: Any, **_: Any) -> Any:
            self.sent += 1
            response = answer(status, "{}")
            response.headers["Retry-After"] = "2" if self.sent == 1 else "Wed, 21 Oct 2026 07:28:00 GMT"
            return response

    adapter = watched(Busy(0, OSError()))
    assert adapter.send(request(method)).status_code == status
    assert adapter.sent == sent
    assert slept == ([2.0, 4.0] if sent == 3 else [])


def test_a_timeout_isnt_waited_for_twice() -> None:
    adapter = watched(Adapter(1, TimeoutError("silent")))
    with pytest.raises(TimeoutError):
        adapter.send(request("GET"))
    assert adapter.sent == 1
    assert not was_reset(ConnectionRefusedError())
