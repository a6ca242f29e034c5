"""EC2 keys, with which S3 clients open the object store: made by Keystone, for a user and a project.

They have no name, no end and no roles of their own: a key does what its user may do in its project until it is
deleted. Whose a key is has to be remembered elsewhere (`META_S3_KEY`).
"""

from __future__ import annotations

import hashlib
import hmac
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlsplit

from labctl.cloud.refusals import refusals, status_of
from labctl.cloud.session import ANSWER_TIMEOUT, CONNECT_TIMEOUT, Cloud
from labctl.errors import CloudRefused
from labctl.models import Credential

#: What S3 clients accept for a region: Chameleon's own names have an @ in them, and Ceph's gateway takes any.
REGION = "us-east-1"


def offered(cloud: Cloud) -> bool:
    """Whether the store's host speaks S3, by its answer to a request that nobody signed rightly. One request."""
    import requests

    with refusals(f"ask {cloud.store.s3_endpoint} for S3"):
        answer = requests.get(
            f"{cloud.store.s3_endpoint}/labctl-probe",
            headers={
                "Authorization": "AWS nobody:nothing",
                "Date": datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT"),
            },
            timeout=(CONNECT_TIMEOUT, ANSWER_TIMEOUT),
        )
    return answer.status_code in (400, 403) and "<Error>" in answer.text and "<Code>" in answer.text


def create(cloud: Cloud) -> Credential:
    """A new key for the store's user and project. Raises CloudRefused where the login may not make one."""
    with refusals("make an EC2 key"):
        made = _keystone(cloud, "POST", "", json={"tenant_id": cloud.store.project_id}).json()["credential"]
    return Credential(str(made["access"]), f"EC2 key {made['access']}", None, str(made["secret"]), "s3")


def may_be_made(cloud: Cloud) -> str:
    """ "" if the login may have EC2 keys, else what Keystone says (it refuses application credentials). One request."""
    try:
        with refusals("list the EC2 keys"):
            _keystone(cloud, "GET", "")
    except CloudRefused as refused:
        if "HTTP 403" not in refused.found:
            raise
        return refused.detail or refused.found
    return ""


def exists(cloud: Cloud, access: str) -> bool:
    """Whether a key is there and the login's own. One request."""
    with refusals(f"read EC2 key {access}"):
        try:
            _keystone(cloud, "GET", f"/{quote(access, safe='')}")
        except Exception as error:
            if status_of(error) not in (401, 403, 404):
                raise
            return False
    return True


def delete(cloud: Cloud, access: str) -> bool:
    """Revokes a key; False when it was gone. Raises CloudRefused for a login that may not."""
    with refusals(
        f"revoke EC2 key {access}", next_step=f"with a password login: openstack ec2 credentials delete {access}"
    ):
        try:
            _keystone(cloud, "DELETE", f"/{quote(access, safe='')}")
        except Exception as error:
            if status_of(error) == 404:
                return False
            raise
    return True


def _keystone(cloud: Cloud, method: str, path: str, **more: Any) -> Any:
    """With the libraries' logging off: every answer holds a secret."""
    from openstack.exceptions import raise_from_response

    url = f"/users/{cloud.store.user_id}/credentials/OS-EC2{path}"
    response = cloud.objects.identity.request(url, method, log=False, raise_exc=False, **more)
    raise_from_response(response)
    return response


def refusal(cloud: Cloud, key: Credential, container: str) -> str:
    """ "" if the key opens the container over S3, else what the store says. One request."""
    import requests

    url = f"{cloud.store.s3_endpoint}/{quote(container, safe='')}?max-keys=1"
    with refusals(f"read container {container} over S3"):
        answer = requests.get(
            url, headers=signed(url, key.id, str(key.secret)), timeout=(CONNECT_TIMEOUT, ANSWER_TIMEOUT)
        )
    return "" if answer.status_code == 200 else f"HTTP {answer.status_code}: {answer.text[:300]}"


def signed(url: str, access: str, secret: str, now: datetime | None = None) -> dict[str, str]:
    """The headers of a GET without a body, signed by version 4 (AWS's "Signature Version 4 signing process")."""
    parts = urlsplit(url)
    stamp = (now or datetime.now(UTC)).strftime("%Y%m%dT%H%M%SZ")
    scope = f"{stamp[:8]}/{REGION}/s3/aws4_request"
    nothing = hashlib.sha256(b"").hexdigest()
    headers = {"host": parts.netloc, "x-amz-content-sha256": nothing, "x-amz-date": stamp}
    names = ";".join(headers)
    lines = [
        "GET",
        parts.path,
        parts.query,
        *(f"{name}:{value}" for name, value in headers.items()),
        "",
        names,
        nothing,
    ]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    key = f"AWS4{secret}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{digest}".encode(), "sha256").hex()
    claim = f"AWS4-HMAC-SHA256 Credential={access}/{scope}, SignedHeaders={names}, Signature={signature}"
    return {**headers, "Authorization": claim}
