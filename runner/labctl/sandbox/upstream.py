"""Container registries on the network: does one answer, and which digest does a tag have at this moment."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

#: Where a registry's API is, if not at the name that references use.
API_HOSTS = {"docker.io": "registry-1.docker.io"}
MANIFESTS = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
PROBE_S = 3


class NotThere(Exception):
    """The registry doesn't have the reference, or doesn't give it to the anonymous."""


def split(reference: str) -> tuple[str, str, str]:
    """("docker.io", "library/postgres", "17") of "docker.io/library/postgres:17". The host is always written out."""
    host, _, rest = reference.partition("/")
    name, _, tag = rest.rpartition(":")
    return host, name, tag


def answering(hosts: Iterable[str]) -> dict[str, bool]:
    """Which registries answer at /v2/ within `PROBE_S` seconds, all asked at once. 401 is an answer."""

    def ask(host: str) -> bool:
        try:
            with urllib.request.urlopen(f"https://{API_HOSTS.get(host, host)}/v2/", timeout=PROBE_S):
                return True
        except urllib.error.HTTPError as error:
            return error.code == 401
        except OSError:
            return False

    names = sorted(set(hosts))
    with ThreadPoolExecutor(max(1, len(names))) as pool:
        return dict(zip(names, pool.map(ask, names), strict=True))


def challenge(header: str) -> dict[str, str]:
    """realm, service, scope of a `WWW-Authenticate: Bearer …` header (RFC 6750); {} if it is another scheme."""
    if not header.lower().startswith("bearer "):
        return {}
    return dict(re.findall(r'(\w+)="([^"]*)"', header))


def resolve(reference: str, scheme: str = "https") -> str:
    """`HOST/NAME@sha256:…` of `HOST/NAME:TAG`, as its registry answers now (OCI distribution specification).

    Raises NotThere if it has no such tag or wants a log-in.
    """
    host, name, tag = split(reference)
    url = f"{scheme}://{API_HOSTS.get(host, host)}/v2/{name}/manifests/{tag}"
    headers = {"Accept": MANIFESTS}
    for _ in range(2):
        request = urllib.request.Request(url, method="HEAD", headers=headers)  # noqa: S310 - http(s) only, see url
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
                digest = answer.headers.get("Docker-Content-Digest", "")
        except urllib.error.HTTPError as error:
            asked = challenge(error.headers.get("WWW-Authenticate", ""))
            if error.code != 401 or "realm" not in asked or "Authorization" in headers:
                raise NotThere(f"{reference}: its registry answers {error.code}") from error
            headers["Authorization"] = "Bearer " + _token(asked)
            continue
        except OSError as error:
            raise NotThere(f"{reference}: {error}") from error
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
            raise NotThere(f"{reference}: its registry tells no digest")
        return f"{host}/{name}@{digest}"
    raise NotThere(f"{reference}: its registry wants a log-in")


def _token(asked: dict[str, str]) -> str:
    query = urllib.parse.urlencode({k: v for k, v in asked.items() if k in ("service", "scope")})
    try:
        with urllib.request.urlopen(f"{asked['realm']}?{query}", timeout=20) as answer:  # noqa: S310
            content = json.load(answer)
    except (OSError, ValueError) as error:
        raise NotThere(f"no anonymous token from {asked['realm']}: {error}") from error
    return str(content.get("token") or content.get("access_token") or "")
