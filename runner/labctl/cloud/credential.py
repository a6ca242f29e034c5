"""The lab's own application credential, with which a server reads the object store and nothing more than it must."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from labctl.cloud.refusals import refusals, status_of, words_of
from labctl.cloud.session import Cloud
from labctl.errors import CloudRefused
from labctl.models import Credential

#: How long a credential lives when nobody says otherwise: a semester's month; `up` makes a new one before that.
LIFETIME = timedelta(days=30)
#: A credential with less than this left is due for renewal: a lab that is touched weekly never meets the end.
MARGIN = timedelta(days=7)
#: Roles that a credential is narrowed to where the user has them. `member` reads and writes objects; `reader` is what
#: newer policies ask for when listing (a member-only credential gets 403 at Chameleon).
ROLES = ("member", "reader")


def name_of(lab: str, server_id: str) -> str:
    """`labctl-LAB-`, the first eight characters of the server's id, and four of chance: a server's next credential is
    made before its last one goes, and names are unique."""
    return f"labctl-{lab}-{server_id[:8]}-{secrets.token_hex(2)}"


def lives(credential: Credential, for_at_least: timedelta = MARGIN) -> bool:
    """Whether a credential has that long to live; one without an end has."""
    if credential.expires_at is None:
        return True
    return datetime.fromisoformat(credential.expires_at).replace(tzinfo=UTC) - datetime.now(UTC) >= for_at_least


def create(cloud: Cloud, lab: str, server_id: str, expires_at: datetime | None = None) -> Credential:
    """Makes the credential for a server; its secret is in the result and can never be read again.

    `expires_at`: aware datetime, default now + LIFETIME. Raises CloudRefused, with how to make one by hand, where
    the login is an application credential itself and so may not make others.
    """
    store = cloud.store
    name = name_of(lab, server_id)
    ends = (expires_at or datetime.now(UTC) + LIFETIME).astimezone(UTC)
    roles = [role for role in ROLES if role in store.roles] or list(store.roles)
    request = {
        "application_credential": {
            "name": name,
            "description": f"labctl: lab {lab}, server {server_id}",
            "expires_at": ends.strftime("%Y-%m-%dT%H:%M:%S"),
            "roles": [{"name": role} for role in roles],
            "unrestricted": False,
        }
    }
    with refusals(f"make the application credential {name}"):
        response = _post(cloud, request)
    made = response["application_credential"]
    return Credential(str(made["id"]), str(made["name"]), made.get("expires_at"), str(made["secret"]))


def _post(cloud: Cloud, request: dict[str, Any]) -> dict[str, Any]:
    """Posts with the libraries' logging off: the answer holds the secret, and their debug log prints bodies."""
    from openstack.exceptions import raise_from_response

    url = f"/users/{cloud.store.user_id}/application_credentials"
    response = cloud.objects.identity.post(url, json=request, log=False, raise_exc=False)
    try:
        raise_from_response(response)
    except Exception as error:
        if status_of(error) == 403:
            raise by_hand(cloud, request, words_of(error)) from None
        raise
    return dict(response.json())


def by_hand(cloud: Cloud, request: dict[str, Any], said: str) -> CloudRefused:
    """What to do where the API makes no credential for us."""
    wanted = request["application_credential"]
    roles = " ".join(f"--role {role['name']}" for role in wanted["roles"])
    return CloudRefused(
        "the login may not make application credentials",
        expected="a password or token login, or an unrestricted application credential",
        found=f"HTTP 403: {said}",
        source=f"login at {cloud.store.auth_url}",
        next_step=(
            f"make one by hand in Horizon at {cloud.store.region} (Identity > Application Credentials > Create: name "
            f"{wanted['name']}, expiration, roles), or with a password login: openstack application credential create "
            f"{roles} --expiration {wanted['expires_at']} {wanted['name']}"
        ),
        detail=said,
    )


def list_all(cloud: Cloud) -> list[Credential]:
    """All application credentials of the store's user, without their secrets. One request."""
    return [_record(one) for one in _listed(cloud)]


def list_ours(cloud: Cloud, lab: str) -> list[Credential]:
    """Those that labctl made for the lab, of whatever server. One request."""
    prefix = f"labctl: lab {lab}, server "
    listed = [(_record(one), str(one.description or "")) for one in _listed(cloud)]
    return [one for one, description in listed if is_ours(one, lab) and description.startswith(prefix)]


def is_ours(credential: Credential, lab: str) -> bool:
    """Whether it is named as labctl names those that it makes for the lab; its description says for sure."""
    return re.fullmatch(rf"labctl-{re.escape(lab)}-[0-9a-f]{{8}}(-[0-9a-f]{{4}})?", credential.name) is not None


def _listed(cloud: Cloud) -> list[Any]:
    with refusals("list the application credentials"):
        return list(cloud.objects.identity.application_credentials(user=cloud.store.user_id))


def _record(one: Any) -> Credential:
    return Credential(str(one.id), str(one.name), str(one.expires_at) if one.expires_at else None)


@dataclass(frozen=True)
class LoginCredential:
    """The application credential that labctl itself logs in with. `expires_at` is UTC, None for never."""

    name: str
    expires_at: str | None
    unrestricted: bool


def of_login(cloud: Cloud) -> LoginCredential | None:
    """What the compute login is made with, or None for a password or a token. One request at most."""
    return of_connection(cloud.compute, cloud.user_id)


def of_store_login(cloud: Cloud) -> LoginCredential | None:
    """The same of the login at the object store's site, which may be another one."""
    return of_connection(cloud.objects, cloud.store.user_id)


def is_restricted(cloud: Cloud) -> bool:
    """Whether the store's login is an application credential that may make no other. One request at most."""
    used = of_store_login(cloud)
    return used is not None and not used.unrestricted


def of_connection(connection: Any, user_id: str) -> LoginCredential | None:
    """The same of any connection and its user."""
    session = connection.session
    used = session.auth.get_access(session).application_credential_id
    if not used:
        return None
    with refusals("read the login's application credential"):
        found = connection.identity.get_application_credential(user_id, used)
    return LoginCredential(str(found.name), found.expires_at, bool(found.unrestricted))


def delete(cloud: Cloud, credential_id: str) -> bool:
    """Revokes a credential; False when it was gone. Raises CloudRefused (403) for a login that may not."""
    with refusals(
        f"revoke application credential {credential_id}",
        next_step=f"with a password login: openstack application credential delete {credential_id}",
    ):
        try:
            cloud.objects.identity.delete_application_credential(
                cloud.store.user_id, credential_id, ignore_missing=False
            )
        except Exception as error:
            if status_of(error) == 404:
                return False
            raise
    return True
