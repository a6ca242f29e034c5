"""Turns what the OpenStack libraries raise into `CloudRefused`, in the cloud's own words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from labctl.errors import CloudRefused, LabctlError

#: Cinder says 413 where a volume or gigabyte quota is used up, Nova 403, Neutron 409: only the text is common to all.
_QUOTA_WORDS = re.compile(r"quota|over ?limit|maximum number of|exceeded for", re.IGNORECASE)
#: Neutron's 409 where a network has no address left ("No more IP addresses available on network …").
_NO_ADDRESS = re.compile(r"no more ip addresses|no (free|available) (fixed |floating )?ip", re.IGNORECASE)
_URL = re.compile(r"https?://[^\s'\"),]+")


def status_of(error: BaseException) -> int | None:
    """HTTP status of an error of openstacksdk, keystoneauth or a Python client; None where it has none."""
    for name in ("status_code", "http_status", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int):
            return value
    return None


def words_of(error: BaseException) -> str:
    """What the service itself said, without the library's wrapping and without any HTML."""
    body: Any = None
    response = getattr(error, "response", None)
    if response is not None:
        try:
            body = response.json()
        except (ValueError, json.JSONDecodeError):
            body = None
    said = _message(body) or str(getattr(error, "details", None) or "") or str(error)
    if "<html" in said.lower() or "<!doctype" in said.lower():
        said = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", said)).strip()[:300] + " (an HTML page, not an API's answer)"
    return said.strip()


def _message(body: Any) -> str:
    """The message inside an OpenStack error body; services differ in where they put it."""
    if not isinstance(body, dict):
        return ""
    if isinstance(body.get("error_message"), str):
        return str(body["error_message"])
    for value in [body, *body.values()]:
        if isinstance(value, dict) and isinstance(value.get("message"), str):
            return str(value["message"])
    return str(body["message"]) if isinstance(body.get("message"), str) else ""


@contextmanager
def refusals(doing: str, *, expected: str = "", source: str = "", next_step: str = "") -> Iterator[None]:
    """Runs a block that talks to the cloud; `doing` completes "could not …" in the error that comes out.

    Raises CloudRefused for everything that openstacksdk, keystoneauth or blazarclient raise; other exceptions
    (bugs) and errors of labctl's own pass through.
    """
    try:
        yield
    except LabctlError:
        raise
    except Exception as error:
        if not _is_cloud_error(error):
            raise
        raise translate(error, doing, expected=expected, source=source, next_step=next_step) from error


def _is_cloud_error(error: Exception) -> bool:
    roots = ("openstack.", "keystoneauth1.", "blazarclient.", "novaclient.", "requests.", "urllib3.")
    return any(cls.__module__.startswith(roots) for cls in type(error).__mro__)


def translate(
    error: Exception, doing: str, *, expected: str = "", source: str = "", next_step: str = ""
) -> CloudRefused:
    """The `CloudRefused` for an error of the libraries. Says first what kind of refusal it is.

    `expected`, `source` and `next_step` win over what the kind of refusal says by itself, but for a quota's next step.
    """
    said = words_of(error)
    kind = _kind(error, said)
    return CloudRefused(
        f"could not {doing}{kind.what}",
        expected=expected or kind.expected,
        found=kind.found,
        source=source or _request_of(error) or _url(said),
        next_step=kind.next_step if kind.next_step_wins else next_step or kind.next_step,
        detail=kind.detail,
    )


@dataclass(frozen=True)
class _Kind:
    """What is said of one kind of refusal; `what` completes "could not …"."""

    what: str
    expected: str
    found: str
    next_step: str
    detail: str = ""
    next_step_wins: bool = False


_AGAIN = "then run the same command again"


def _kind(error: Exception, said: str) -> _Kind:
    name, status = type(error).__name__, status_of(error)
    if status is not None:
        return _refusal(error, status, said)
    if name in ("ConnectTimeout", "RequestTimeout", "ReadTimeout"):
        return _silence(said)
    if "Connect" in name or name in ("SSLFailure", "SSLError"):
        return _Kind(
            f": no connection to {_url(said)}",
            "an API that accepts connections",
            said,
            "check auth_url and the network; for the sandbox: labctl sandbox status",
        )
    if name == "JSONDecodeError":
        text = " ".join(str(getattr(error, "doc", "")).split())[:200]
        return _Kind(
            ": the answer isn't an API's", "JSON", f"text: {text}", f"check auth_url and the network, {_AGAIN}"
        )
    return _Kind("", "an answer that OpenStack's API gives", said, f"labctl doctor, {_AGAIN}", said)


def _refusal(error: Exception, status: int, said: str) -> _Kind:
    found = f"HTTP {status}: {said}"
    if status == 413 or (status in (400, 403, 409) and _QUOTA_WORDS.search(said)):
        return _quota(found, said)
    if status == 401 or (status == 404 and _request_of(error).endswith("/auth/tokens")):
        # Keystone's 404 is for an application credential that was revoked, its 401 for one that expired
        return _Kind(
            ": the cloud does not accept these credentials",
            "a valid password, token or application credential",
            found,
            "mend the clouds.yaml entry or the OS_* variables; a credential that expired or was revoked: make a new"
            " one in Horizon (Identity > Application Credentials)",
            said,
        )
    if status == 409 and _NO_ADDRESS.search(said):
        return _Kind(
            ": the network has no free address",
            "a free address",
            found,
            "release an address that nobody uses (openstack floating ip list), or wait until somebody else does, "
            f"{_AGAIN}",
            said,
        )
    return _by_status(error, status, found, said)


def _by_status(error: Exception, status: int, found: str, said: str) -> _Kind:
    if status == 429:
        pause = _retry_after(error)
        after = f"after {pause} s" if pause.isdecimal() else f"at {pause}" if pause else "in a minute"
        return _Kind(
            ": the cloud's API is asked too often",
            "fewer requests",
            found,
            f"run the same command again {after}",
            said,
        )
    if status >= 500:
        return _Kind(
            ": the cloud's API failed",
            "an answer",
            found,
            "run the same command again in a minute; if it stays so: the site's status page or its help desk",
            said,
        )
    if status == 403:
        return _Kind(
            ": the login may not do that",
            "a login whose roles allow it",
            found,
            "labctl doctor; an application credential needs the roles member and reader",
            said,
        )
    return _Kind("", "a request that the cloud accepts", found, f"labctl doctor, {_AGAIN}", said)


def _silence(said: str) -> _Kind:
    from labctl.cloud.session import ANSWER_TIMEOUT, CONNECT_TIMEOUT

    return _Kind(
        f": no answer from {_url(said)} within {CONNECT_TIMEOUT} s (to connect) or {ANSWER_TIMEOUT} s (to reply)",
        "an answer from the cloud's API",
        "silence",
        f"check the network and the site's status page, {_AGAIN}",
    )


#: What a service calls a quota, what people call it, and how to make room.
_QUOTAS = (
    (r"instances", "instances", "openstack server list"),
    (r"cores", "cores", "openstack server list, or a smaller server.flavor in lab.yaml"),
    (r"ram", "memory", "openstack server list, or a smaller server.flavor in lab.yaml"),
    (r"key.?pairs?", "key pairs", "openstack keypair list"),
    (r"gigabytes", "gigabytes", "labctl volume list, or a smaller volume.size_gib in lab.yaml"),
    (r"volumes", "volumes", "labctl volume list"),
    (r"floating.?ips?", "floating IPs", "openstack floating ip list"),
    (r"security.?group.?rules?", "security group rules", "openstack security group list"),
    (r"security.?groups?", "security groups", "openstack security group list"),
    (r"ports?", "ports", "openstack port list"),
)


def _quota(found: str, said: str) -> _Kind:
    full = [(name, look) for word, name, look in _QUOTAS if re.search(rf"\b{word}\b", said, re.IGNORECASE)]
    if len(full) > 1:
        # "volume or snapshot exceeds allowed gigabytes quota": the one that is said to be used up is meant
        full = [one for one in full if re.search(rf"{one[0]} quota|exceeded for[^.]*{one[0]}", said)] or full
    names = " and ".join(name for name, _ in full)
    look = f" ({full[0][1]})" if full else ""
    return _Kind(
        f": the project's quota{' of ' + names if names else ''} is used up",
        "room in the project's quota",
        found,
        f"make room{look}, or ask the site for more quota, {_AGAIN}",
        said,
        next_step_wins=True,
    )


def _request_of(error: Exception) -> str:
    """The request that was refused, as "GET URL" without a query; "" where the error doesn't tell."""
    request = getattr(getattr(error, "response", None), "request", None) or getattr(error, "request", None)
    url = str(getattr(request, "url", "") or "").partition("?")[0]
    return f"{request.method} {url}" if request is not None and url else ""


def _retry_after(error: Exception) -> str:
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    return str(headers.get("Retry-After", ""))


def _url(text: str) -> str:
    found = _URL.search(text)
    return found.group(0).rstrip(":.") if found else "the cloud"
