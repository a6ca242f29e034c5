"""Containers of the object store, over Swift's API (OpenStack Swift and Ceph RGW alike)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from labctl.cloud import META_LAB
from labctl.cloud.refusals import refusals
from labctl.cloud.session import Cloud
from labctl.cloud.wait import wait_until
from labctl.errors import CloudRefused
from labctl.models import Container, Tell

#: Names a listing asks for at a time. Swift's own limit is 10,000; smaller pages keep `tell` talking.
PAGE = 1000
#: Names in one bulk delete. Swift takes 10,000 and RGW 1,000; a request of 250 is answered in about 2 s.
BULK = 250
#: Swift's and RGW's query for it (RGW wants no value, Swift takes any).
BULK_QUERY = "?bulk-delete"
#: Seconds until a container that was emptied can be deleted: Swift's listings are eventually consistent.
EMPTY_TIMEOUT = 120
#: Where segments of large objects lie: rclone's and python-swiftclient's, and those of S3 uploads to a Swift.
SEGMENTS = ("_segments", "+segments")

_META = "x-container-meta-"


def stat(cloud: Cloud, name: str) -> Container | None:
    """The container with its number of objects and bytes, or None. One request."""
    with refusals(f"read container {name}"):
        response = _request(cloud, "HEAD", quote(name, safe=""))
    if response.status_code == 404:
        return None
    headers = {key.lower(): value for key, value in response.headers.items()}
    return Container(
        name=name,
        objects=int(headers.get("x-container-object-count", 0)),
        bytes=int(headers.get("x-container-bytes-used", 0)),
        metadata={
            key.removeprefix(_META).replace("-", "_"): value for key, value in headers.items() if key.startswith(_META)
        },
    )


def head(connection: Any, name: str) -> int:
    """The store's status for the container, asked with another login than the cloud's own. One request."""
    with refusals(f"read container {name}"):
        return int(connection.object_store.head(f"/{quote(name, safe='')}", raise_exc=False).status_code)


def ensure_container(cloud: Cloud, name: str, metadata: dict[str, str]) -> tuple[Container, bool]:
    """The container of that name and whether it was made now; `metadata` goes only on a new one."""
    found = stat(cloud, name)
    if found is not None:
        return found, False
    headers = {_META + key.replace("_", "-"): value for key, value in metadata.items()}
    with refusals(f"create container {name}"):
        _request(cloud, "PUT", quote(name, safe=""), headers=headers)
        made = stat(cloud, name)
    if made is None:
        raise CloudRefused(f"container {name} was created and isn't there", next_step="run the same command again")
    return made, True


def list_containers(cloud: Cloud) -> list[Container]:
    """All containers of the project, without metadata."""
    found: list[Container] = []
    with refusals("list the containers"):
        marker = ""
        while page := _listing(cloud, "", marker, PAGE):
            found += [Container(str(c["name"]), int(c["count"]), int(c["bytes"])) for c in page]
            marker = found[-1].name
    return found


def object_names(cloud: Cloud, container: str, page: int = PAGE) -> Iterator[str]:
    """All object names, in order. Pages are asked for until an empty one: RGW's may be short before the end."""
    marker = ""
    while names := _names(cloud, container, marker, page):
        yield from names
        marker = names[-1]


def with_segments(cloud: Cloud, name: str) -> list[Container]:
    """The container and those of its segments, as far as they are there. One request for each that may be.

    A container of that name that carries the tag of any lab is a container of its own.
    """
    segments = [one for suffix in SEGMENTS if (one := stat(cloud, name + suffix)) and META_LAB not in one.metadata]
    return [one for one in [stat(cloud, name)] if one] + segments


def delete_container(cloud: Cloud, name: str, tell: Tell, *, page: int = PAGE) -> int:
    """Deletes the container, all objects in it and its segments' containers; returns how many objects went.

    There is no way back. 0 when there is none. Raises CloudRefused when an object can't be deleted, or when the store
    doesn't show the container empty within EMPTY_TIMEOUT seconds.
    """
    return sum(_delete_one(cloud, one.name, tell, page) for one in with_segments(cloud, name))


def _delete_one(cloud: Cloud, name: str, tell: Tell, page: int) -> int:
    if stat(cloud, name) is None:
        return 0
    deleted = 0
    last: list[str] = []

    def emptied() -> tuple[bool | None, str]:
        nonlocal deleted, last
        while (names := _names(cloud, name, "", page)) and names != last:
            last = names
            for start in range(0, len(names), BULK):
                _delete_objects(cloud, name, names[start : start + BULK])
                deleted += len(names[start : start + BULK])
                tell(f"container {name}: {deleted} objects deleted")
        last = []
        with refusals(f"delete container {name}"):
            gone = _request(cloud, "DELETE", quote(name, safe=""), accepted=(204, 404, 409)).status_code != 409
        return (True if gone else None), f"container {name}: its listing still shows deleted objects"

    done, seen, passed = wait_until(emptied, tell, EMPTY_TIMEOUT)
    if not done:
        raise CloudRefused(
            f"{seen} after {passed:.0f} s",
            expected="an empty container",
            found="objects in its listing, or new ones that somebody writes",
            next_step="unmount it everywhere, then run the same command again",
        )
    return deleted


def _delete_objects(cloud: Cloud, container: str, names: list[str]) -> None:
    """One bulk delete; one DELETE for each object where the store has no bulk delete."""
    lines = "\n".join(quote(f"{container}/{name}") for name in names)
    with refusals(f"delete objects of container {container}"):
        response = _request(
            cloud,
            "POST",
            BULK_QUERY,
            data=lines.encode(),
            headers={"Content-Type": "text/plain", "Accept": "application/json"},
            accepted=(200, 400, 404, 405, 411, 412, 501),
        )
    result = _bulk_result(response)
    if result is None:
        for name in names:
            with refusals(f"delete object {container}/{name}"):
                _request(cloud, "DELETE", f"{quote(container, safe='')}/{quote(name)}", accepted=(204, 404))
        return
    # The status is 200 even if objects stay: the truth is in the body.
    errors = [entry for entry in result.get("Errors") or [] if not str(entry[1]).startswith("404")]
    gone = int(result.get("Number Deleted", 0)) + int(result.get("Number Not Found", 0))
    if errors or gone < len(names):
        said = "; ".join(f"{entry[0]}: {entry[1]}" for entry in errors[:5])
        raise CloudRefused(
            f"objects of container {container} can't be deleted",
            expected=f"{len(names)} objects gone",
            found=said or f"{gone}, and: {result.get('Response Status')} {result.get('Response Body')}",
            next_step="run the same command again",
        )


def _bulk_result(response: Any) -> dict[str, Any] | None:
    if response.status_code != 200:
        return None
    try:
        body = response.json()
    except ValueError:
        return None
    return body if isinstance(body, dict) and "Number Deleted" in body else None


def _names(cloud: Cloud, container: str, marker: str, limit: int) -> list[str]:
    with refusals(f"list container {container}"):
        return [str(entry["name"]) for entry in _listing(cloud, quote(container, safe=""), marker, limit)]


def _listing(cloud: Cloud, path: str, marker: str, limit: int) -> list[dict[str, Any]]:
    query = {"format": "json", "limit": str(limit), **({"marker": marker} if marker else {})}
    response = _request(cloud, "GET", path, params=query, accepted=(200, 204, 404))
    return list(response.json()) if response.status_code == 200 else []


def _request(cloud: Cloud, method: str, path: str, *, accepted: tuple[int, ...] = (), **more: Any) -> Any:
    """A request below the account's URL. A HEAD may say 404; else a status that isn't `accepted` (or 2xx) raises."""
    from openstack.exceptions import raise_from_response

    response = cloud.objects.object_store.request("/" + path, method, raise_exc=False, **more)
    if response.status_code not in accepted and not (method == "HEAD" and response.status_code == 404):
        raise_from_response(response)
    return response


def set_metadata(cloud: Cloud, name: str, metadata: dict[str, str]) -> None:
    """Adds or replaces metadata items of a container."""
    headers = {_META + key.replace("_", "-"): value for key, value in metadata.items()}
    with refusals(f"tag container {name}"):
        _request(cloud, "POST", quote(name, safe=""), headers=headers)
