"""From a site's configuration to an authenticated cloud: python-chi makes the session, openstacksdk uses it.

Of python-chi only `chi.set`, `chi.reset` and `chi.session` are used: they bring Chameleon's ways to log in (the
token of its Jupyter, refreshed; application credentials; passwords). `chi.connection()` drops the region of its
own session and `chi.use_site()` asks a host elsewhere without a time-out, so neither is called.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from labctl.cloud.refusals import refusals
from labctl.cloud.traffic import Traffic
from labctl.errors import CloudRefused, ConfigError
from labctl.models import Site

#: Seconds to connect to an API. A host that is up accepts in milliseconds; ten cover a far site and lost packets.
CONNECT_TIMEOUT = 10
#: Seconds until an API's first bytes. Blazar deletes a lease with its server in up to 15 s before it answers.
ANSWER_TIMEOUT = 60

_CREDENTIAL_HELP = "see Chameleon's Horizon: Identity > Application Credentials > Create, and download its clouds.yaml"


@dataclass(frozen=True)
class _Login:
    """What python-chi needs for one session. `values` holds secrets: never shown."""

    auth_type: str
    values: dict[str, str] = field(repr=False)
    region: str | None
    interface: str
    source: str
    settings: tuple[tuple[str, Any], ...] = ()
    from_environment: bool = False


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
    _login: _Login = field(repr=False)

    @property
    def requests(self) -> int:
        """How many API requests were answered so far, those for authentication included."""
        return len(self.traffic.log)

    @property
    def by_application_credential(self) -> bool:
        """Whether the login is an application credential, which may do less than the user it belongs to."""
        return self._login.auth_type == "v3applicationcredential"

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
    def _object_login(self) -> _Login:
        return _login(self.site, self.site.object_cloud or self.site.cloud, self.site.object_region)

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
    login = _login(site, site.cloud, site.region)
    session, access = _open(login, traffic)
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
    )


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


def _connection(session: Any, region: str, login: _Login) -> Any:
    from openstack.connection import Connection

    return Connection(session=session, region_name=region, interface=login.interface)


def _open(login: _Login, traffic: Traffic) -> tuple[Any, Any]:
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
        with refusals("log in", source=login.source):
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


def _region(access: Any, service: str, login: _Login, key: str) -> str:
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
        next_step=f"set region_name in the clouds.yaml entry (or the site's {key})",
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
def _unknown_option(login: _Login, key: str) -> Iterator[None]:
    from oslo_config.cfg import NoSuchOptError

    try:
        yield
    except NoSuchOptError as error:
        raise ConfigError(
            f"the login has a setting that no way to log in knows: {key}",
            source=login.source,
            next_step="remove it from the clouds.yaml entry",
        ) from error


def _login(site: Site, name: str | None, region: str | None) -> _Login:
    if name is None and site.clouds_file is None:
        name = os.environ.get("OS_CLOUD")
    return _login_from_file(site, name, region) if name else _login_from_environment(region)


def _login_from_file(site: Site, name: str, region: str | None) -> _Login:
    """An entry of clouds.yaml, read by openstacksdk's own loader (profiles and secure.yaml included)."""
    from openstack.config import OpenStackConfig
    from openstack.exceptions import ConfigException

    path = site.clouds_file
    if path is not None and not path.is_file():
        raise ConfigError(
            f"there is no {path}",
            expected=f"a clouds.yaml with an entry {name}",
            source=f"site {site.name}",
            next_step="labctl sandbox up" if site.name == "sandbox" else _CREDENTIAL_HELP,
        )
    source = f"{path or 'clouds.yaml'}, entry {name}"
    try:
        config = OpenStackConfig(
            config_files=[str(path)] if path else None,
            secure_files=[str(path.with_name("secure.yaml"))] if path else None,
            load_envvars=path is None,
        )
        known = sorted(set(config.get_cloud_names()) - {"defaults"})
        if name not in known:
            raise ConfigError(
                f"clouds.yaml has no entry {name}",
                expected=f"one of: {', '.join(known)}" if known else "at least one entry",
                found=name,
                source=str(config.config_filename or path or "./clouds.yaml, ~/.config/openstack, /etc/openstack"),
                next_step=_CREDENTIAL_HELP,
            )
        entry = config.get_one(cloud=name, validate=False).config
    except ConfigException as error:
        raise ConfigError(
            "clouds.yaml can't be used", found=str(error), source=source, next_step="mend the file"
        ) from error
    values = {str(key): str(value) for key, value in (entry.get("auth") or {}).items() if value not in (None, "")}
    if not values.get("auth_url"):
        raise ConfigError("the clouds.yaml entry has no auth.auth_url", source=source, next_step=_CREDENTIAL_HELP)
    settings: list[tuple[str, Any]] = []
    if entry.get("verify") is False:
        settings.append(("insecure", True))
    settings += [(ours, str(entry[theirs])) for theirs, ours in _TLS if entry.get(theirs)]
    return _Login(
        auth_type=_auth_type(str(entry.get("auth_type") or ""), values),
        values=values,
        region=region or entry.get("region_name") or None,
        interface=str(entry.get("interface") or "public"),
        source=source,
        settings=tuple(settings),
    )


_TLS = (("cacert", "cafile"), ("cert", "certfile"), ("key", "keyfile"))


def _login_from_environment(region: str | None) -> _Login:
    """The `OS_*` variables, as Chameleon's Jupyter and openrc files set them."""
    env = os.environ
    if not env.get("OS_AUTH_URL"):
        raise ConfigError(
            "no credentials for the cloud",
            expected="a clouds.yaml entry (lab.yaml: cloud), $OS_CLOUD, or OS_AUTH_URL and its companions",
            found="neither",
            source="environment",
            next_step=_CREDENTIAL_HELP + ", or `source` its openrc",
        )
    values = {
        key[3:].lower(): value
        for key, value in env.items()
        if key.startswith("OS_") and value and key[3:].lower() in _ENVIRONMENT_VALUES
    }
    auth_type = env.get("OS_AUTH_TYPE") or env.get("OS_AUTH_METHOD") or ""
    settings = [("cafile", env["OS_CACERT"])] if env.get("OS_CACERT") else []
    return _Login(
        auth_type=_auth_type(auth_type, values),
        values={"auth_url": env["OS_AUTH_URL"]} if auth_type.startswith("v3") else values,
        region=region or env.get("OS_REGION_NAME"),
        interface=env.get("OS_INTERFACE") or "public",
        source="environment (OS_*)",
        settings=tuple(settings),
        from_environment=auth_type.startswith("v3"),
    )


_ENVIRONMENT_VALUES = frozenset(
    {
        *("auth_url", "token", "username", "user_id", "password", "user_domain_name", "user_domain_id"),
        *("project_name", "project_id", "project_domain_name", "project_domain_id"),
        *("application_credential_id", "application_credential_name", "application_credential_secret"),
    }
)


def _auth_type(given: str, values: dict[str, str]) -> str:
    """python-chi knows the `v3…` names only; clouds.yaml and openrc files often give the short one, or none."""
    if given.startswith("v3"):
        return given
    if "application_credential_secret" in values:
        return "v3applicationcredential"
    if given == "token" or "token" in values:
        return "v3token"
    return "v3password"
