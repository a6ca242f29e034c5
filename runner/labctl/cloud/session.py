"""From a site's configuration to an authenticated cloud: python-chi makes the session, openstacksdk uses it.

Of python-chi only `chi.set`, `chi.reset` and `chi.session` are used: they bring Chameleon's ways to log in (the
token of its Jupyter, refreshed; application credentials; passwords). `chi.connection()` drops the region of its
own session and `chi.use_site()` asks a host elsewhere without a time-out, so neither is called.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from labctl.cloud import logins
from labctl.cloud.logins import Login
from labctl.cloud.refusals import refusals
from labctl.cloud.traffic import Traffic
from labctl.errors import CloudRefused, ConfigError
from labctl.models import Site

if TYPE_CHECKING:
    from labctl.cloud.credential import LoginCredential

#: Seconds to connect to an API. A host that is up accepts in milliseconds; ten cover a far site and lost packets.
CONNECT_TIMEOUT = 10
#: Seconds until an API's first bytes. Blazar deletes a lease with its server in up to 15 s before it answers.
ANSWER_TIMEOUT = 60
#: The version of Cinder's API that is spoken where a request names no other: the first of v3.
VOLUME_API = "3.0"


@dataclass
class Cloud:
    """An authenticated cloud. `compute` serves all but objects, which may live at another site (`objects`)."""

    site: Site
    compute: Any
    user_id: str
    project_id: str
    auth_url: str
    region: str
    traffic: Traffic
    _login: Login = field(repr=False)
    #: How far this machine's clock was ahead of Keystone's when it issued the token; negative: behind.
    clock_skew: timedelta = timedelta(0)

    @property
    def requests(self) -> int:
        """How many API requests were answered so far, those for authentication included."""
        return len(self.traffic.log)

    @property
    def by_application_credential(self) -> bool:
        """Whether the login is an application credential, which may do less than the user it belongs to."""
        return self._login.auth_type == logins.APPLICATION_CREDENTIAL

    @property
    def login_source(self) -> str:
        """Where the compute login came from."""
        return self._login.source

    @property
    def login_help(self) -> str:
        """How to make an application credential that labctl can work with, at the compute site."""
        return logins.how_to_make(self.auth_url, f" at {self.region}", "credentials")

    @property
    def store_login_help(self) -> str:
        """The same at the object store's site."""
        return logins.how_to_make(self.object_auth_url, f" at {self.object_region}", "object_credentials")

    @cached_property
    def store(self) -> _Store:
        """The object store's site: connection, user, project, region. Authenticates on first use.

        Raises CloudRefused and ConfigError, as `connect`.
        """
        return _open_store(self)

    @property
    def object_auth_url(self) -> str:
        """Keystone's URL at the object store's site. No request."""
        return self._object_login.values["auth_url"]

    @property
    def object_region(self) -> str:
        """The object store's region. No request where the configuration names it."""
        return self._object_login.region or self.store.region

    @cached_property
    def _object_login(self) -> Login:
        return logins.for_objects(self.site)

    @property
    def objects(self) -> Any:
        """The openstack Connection for the object store's region."""
        return self.store.connection


@dataclass(frozen=True)
class _Store:
    connection: Any
    user_id: str
    project_id: str
    auth_url: str
    region: str
    roles: tuple[str, ...]
    url: str

    @property
    def s3_endpoint(self) -> str:
        """Where S3 is spoken, if it is: for Swift's s3api and Ceph's gateway, the root of the same host and port."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}"

    @property
    def s3_provider(self) -> str:
        """rclone's name for the kind of S3 server: Ceph's gateway has its Swift API below /swift."""
        return "Ceph" if urlsplit(self.url).path.startswith("/swift/") else "Other"


def connect(site: Site) -> Cloud:
    """Logs in at the site's compute region. Two requests.

    Raises ConfigError where the configuration lacks something (before any request), CloudRefused where the cloud
    refuses the credentials, doesn't answer, or has no compute service in the region.
    """
    traffic = Traffic()
    login = logins.for_compute(site)
    session, access = _open(login, traffic)
    skew = datetime.now(UTC) - access.issued
    region = _region(access, "compute", login, "region")
    return Cloud(
        site=site,
        compute=_connection(session, region, login),
        user_id=str(access.user_id),
        project_id=str(access.project_id),
        auth_url=login.values["auth_url"],
        region=region,
        traffic=traffic,
        _login=login,
        clock_skew=skew,
    )


@dataclass(frozen=True)
class Tried:
    """A login with an application credential that a person gave."""

    connection: Any
    project_id: str
    roles: tuple[str, ...]
    credential: LoginCredential


def by_application_credential(cloud: Cloud, credential_id: str, secret: str, source: str) -> Tried:
    """A login at the store's site with another credential than labctl's own. Raises CloudRefused."""
    from labctl.cloud import credential

    values = {
        "auth_url": cloud.store.auth_url,
        "application_credential_id": credential_id,
        "application_credential_secret": secret,
    }
    own = cloud._object_login
    login = replace(
        own,
        auth_type=logins.APPLICATION_CREDENTIAL,
        values=values,
        source=source,
        from_environment=False,
        key="object_credentials",
    )
    session, access = _open(login, cloud.traffic)
    connection = _connection(session, cloud.store.region, login)
    used = credential.of_connection(connection, str(access.user_id))
    if used is None:
        raise CloudRefused(
            "Keystone doesn't say which application credential logged in",
            expected="an application credential in the token",
            source=source,
            next_step=login.mend,
        )
    return Tried(connection, str(access.project_id), tuple(access.role_names), used)


def _open_store(cloud: Cloud) -> _Store:
    login = cloud._object_login
    same = (login.auth_type, login.values) == (cloud._login.auth_type, cloud._login.values)
    if same:
        session = cloud.compute.session
        with refusals("log in for the object store", source=login.source):
            access = session.auth.get_access(session)
    else:
        session, access = _open(login, cloud.traffic)
    region = _region(access, "object-store", login, "object_region")
    return _Store(
        connection=_connection(session, region, login),
        user_id=str(access.user_id),
        project_id=str(access.project_id),
        auth_url=login.values["auth_url"],
        region=region,
        roles=tuple(access.role_names),
        url=str(
            access.service_catalog.url_for(service_type="object-store", region_name=region, interface=login.interface)
        ),
    )


def _connection(session: Any, region: str, login: Login) -> Any:
    return _connection_class()(
        session=session,
        region_name=region,
        interface=login.interface,
        block_storage_endpoint_override=_volumes_url(session, region, login),
    )


def _volumes_url(session: Any, region: str, login: Login) -> str | None:
    """Cinder's address in the catalogue; None where the region has none (the object store's, often)."""
    from keystoneauth1.exceptions import EndpointNotFound

    try:
        return str(
            session.auth.get_access(session).service_catalog.url_for(
                service_type="block-storage", region_name=region, interface=login.interface
            )
        )
    except EndpointNotFound:
        return None


@functools.cache
def _connection_class() -> Any:
    """openstacksdk's Connection, which takes Cinder's address from the catalogue and asks it for no versions.

    Cinder answers such a question with 401 first: two requests of every command, and there is only one version left.
    """
    from openstack.block_storage.block_storage_service import BlockStorageService
    from openstack.block_storage.v3._proxy import Proxy
    from openstack.connection import Connection

    class Volumes(Proxy):  # type: ignore[misc]
        skip_discovery = True

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.default_microversion = VOLUME_API  # given as an option, it would be checked by discovery

    class VolumeService(BlockStorageService):  # type: ignore[misc]
        supported_versions = {"3": Volumes}  # noqa: RUF012 (as the class above it has it)

    class LabConnection(Connection):  # type: ignore[misc]
        block_storage = VolumeService(service_type="block-storage")

    return LabConnection


def _open(login: Login, traffic: Traffic) -> tuple[Any, Any]:
    """A keystoneauth session of python-chi's making, and the token's access record."""
    # python-chi takes OS_* from the environment as defaults, at import too: an entry of clouds.yaml must not be
    # mixed with them (an application credential with a project's name is refused).
    with _stdout_kept(), _environment(login.from_environment):
        import chi

        chi.reset()
        chi.set("auth_type", login.auth_type)
        for key, value in login.values.items():
            with _unknown_option(login, key):
                chi.set(key, value)
        for key, value in login.settings:
            chi.set(key, value)
        with refusals("log in", expected=login.expected, source=login.source, next_step=login.mend):
            session = chi.session().session
            session.timeout = (CONNECT_TIMEOUT, ANSWER_TIMEOUT)
            traffic.watch(session.session)
            access = session.auth.get_access(session)
    if not access.project_id:
        raise CloudRefused(
            "the credentials are not for a project",
            expected="a project-scoped login",
            found="a token without a project",
            source=login.source,
            next_step="set project_name (and project_domain_name) in the clouds.yaml entry, or OS_PROJECT_NAME",
        )
    return session, access


def _region(access: Any, service: str, login: Login, key: str) -> str:
    """The region to use: the configured one if it has the service, or the only one that has it."""
    aliases = {"compute": ("compute",), "object-store": ("object-store",)}[service]
    having = sorted(
        {
            str(endpoint.get("region"))
            for entry in access.service_catalog.catalog
            if entry["type"] in aliases
            for endpoint in entry["endpoints"]
        }
    )
    if login.region in having:
        return str(login.region)
    if login.region is None and len(having) == 1:
        return having[0]
    raise CloudRefused(
        f"no {service} service in region {login.region}" if login.region else f"which region's {service} service?",
        expected=f"one of the regions that have it: {', '.join(having) or 'none here has'}",
        found=login.region or "no region given",
        source=login.source,
        next_step=_another_region(service, login, key),
    )


def _another_region(service: str, login: Login, key: str) -> str:
    named = f"set region_name in the clouds.yaml entry (or cloud.{key} in lab.yaml)"
    if service != "object-store":
        return named
    wanted = f" at {login.region}" if login.region else ""
    return (
        f"{named}; or this login's site has no store: {logins.how_to_make(login.at_site, wanted, 'object_credentials')}"
    )


@contextlib.contextmanager
def _stdout_kept() -> Iterator[None]:
    """What python-chi and its libraries print goes to stderr: stdout carries results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def _environment(kept: bool) -> Iterator[None]:
    """Hides `OS_*` from python-chi unless the login comes from there."""
    if kept:
        yield
        return
    hidden = {key: value for key, value in os.environ.items() if key.startswith("OS_")}
    for key in hidden:
        del os.environ[key]
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextlib.contextmanager
def _unknown_option(login: Login, key: str) -> Iterator[None]:
    from oslo_config.cfg import NoSuchOptError

    try:
        yield
    except NoSuchOptError as error:
        raise ConfigError(
            f"the login has a setting that no way to log in knows: {key}",
            source=login.source,
            next_step="remove it from the clouds.yaml entry",
        ) from error
