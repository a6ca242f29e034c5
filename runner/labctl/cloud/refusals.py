"""Turns what the OpenStack libraries raise into `CloudRefused`, in the cloud's own words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from labctl.errors import CloudRefused, LabctlError

#: Cinder says 413 where a volume or gigabyte quota is used up, Nova 403, Neutron 409: only the text is common to all.
_QUOTA_WORDS = re.compile(r"quota|over ?limit|maximum number of|exceeded for", re.IGNORECASE)
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
    """The `CloudRefused` for an error of the libraries. Says first what kind of refusal it is."""
    status, said = status_of(error), words_of(error)
    kind = type(error).__name__
    found = f"HTTP {status}: {said}" if status else said
    if kind in ("ConnectTimeout", "RequestTimeout", "ReadTimeout"):
        from labctl.cloud.session import ANSWER_TIMEOUT, CONNECT_TIMEOUT

        return CloudRefused(
            f"could not {doing}: no answer from {_url(said)} within {CONNECT_TIMEOUT} s (to connect) or "
            f"{ANSWER_TIMEOUT} s (to reply)",
            expected=expected or "an answer from the cloud's API",
            found="silence",
            source=source,
            next_step=next_step or "check the network and the site's status page, then run the same command again",
        )
    if "Connect" in kind or kind in ("SSLFailure", "SSLError", "RetriableConnectionFailure"):
        return CloudRefused(
            f"could not {doing}: no connection to {_url(said)}",
            expected=expected or "an API that accepts connections",
            found=said,
            source=source,
            next_step=next_step or "check auth_url and the network; for the sandbox: labctl sandbox status",
        )
    if status == 413 or (status in (400, 403, 409) and _QUOTA_WORDS.search(said)):
        return CloudRefused(
            f"could not {doing}: the project's quota is used up",
            expected=expected or "room in the project's quota",
            found=found,
            source=source,
            next_step="delete what isn't needed, or ask for more quota, then run the same command again",
            detail=said,
        )
    if status == 401:
        return CloudRefused(
            f"could not {doing}: the cloud does not accept these credentials",
            expected=expected or "a valid password, token or application credential",
            found=found,
            source=source,
            next_step=next_step or "mend the clouds.yaml entry or OS_* variables; make a new credential if it expired",
            detail=said,
        )
    return CloudRefused(
        f"could not {doing}", expected=expected, found=found, source=source, next_step=next_step, detail=said
    )


def _url(text: str) -> str:
    found = _URL.search(text)
    return found.group(0).rstrip(":.") if found else "the cloud"
