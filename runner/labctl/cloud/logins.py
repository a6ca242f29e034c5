"""Which credentials a site is logged into with, and what is wrong with them as far as can be told without a request.

In this order: a file that lab.yaml names (an openrc or a clouds.yaml, as Horizon hands them out), an entry of
clouds.yaml, and the environment, as an openrc or Chameleon's Jupyter sets it. Compute and store site may differ in it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from labctl import credentials_file
from labctl.errors import ConfigError
from labctl.models import Site

APPLICATION_CREDENTIAL, PASSWORD, TOKEN = "v3applicationcredential", "v3password", "v3token"
#: What keystoneauth's options of each kind are called; another one in the environment belongs to another kind, and a
#: project beside an application credential (an older openrc in the same shell) makes Keystone answer 401.
_PROJECT = ("project_name", "project_id", "project_domain_name", "project_domain_id")
_USER = ("username", "user_id", "user_domain_name", "user_domain_id")
_OPTIONS = {
    APPLICATION_CREDENTIAL: (
        *("auth_url", "application_credential_id", "application_credential_name", "application_credential_secret"),
        *_USER,
    ),
    PASSWORD: ("auth_url", "password", *_USER, *_PROJECT),
    TOKEN: ("auth_url", "token", *_PROJECT),
}
_KNOWN = frozenset(option for options in _OPTIONS.values() for option in options)
_NEEDS = {
    APPLICATION_CREDENTIAL: (
        "application_credential_secret",
        "application_credential_id or application_credential_name",
    ),
    PASSWORD: ("username or user_id", "password", "project_name or project_id"),
    TOKEN: ("token",),
}
_TLS = (("cacert", "cafile"), ("cert", "certfile"), ("key", "keyfile"))


@dataclass(frozen=True)
class Login:
    """What python-chi needs for one session. `values` holds secrets: never shown. `at_site`: Keystone's URL there."""

    auth_type: str
    values: dict[str, str] = field(repr=False)
    region: str | None
    interface: str
    source: str
    settings: tuple[tuple[str, Any], ...] = ()
    from_environment: bool = False
    at_site: str = ""
    key: str = "credentials"

    @property
    def expected(self) -> str:
        """What Keystone would accept."""
        return {
            APPLICATION_CREDENTIAL: "an application credential of this site that has neither ended nor been revoked",
            PASSWORD: "the user's password and a project of theirs",
            TOKEN: "a token that hasn't ended",
        }.get(self.auth_type, "a login that hasn't ended")

    @property
    def mend(self) -> str:
        """What to do when Keystone doesn't accept it."""
        if self.auth_type == APPLICATION_CREDENTIAL:
            where = f" at {self.region}" if self.region else ""
            return how_to_make(self.at_site or self.values.get("auth_url", ""), where, self.key)
        if self.auth_type == PASSWORD:
            return f"mend user, password and project in {self.source}"
        return "get a new token (in Chameleon's Jupyter: restart the server from its Hub), then run the command again"


def for_compute(site: Site) -> Login:
    """The login for compute, network and volumes. Raises ConfigError for one that can't work."""
    login = _find(site, site.credentials_file, site.cloud, site.region, site.auth_url)
    return _checked(replace(login, at_site=site.auth_url or ""))


def for_objects(site: Site) -> Login:
    """The login for the object store: its own, else the one for compute. Raises ConfigError for one that can't work."""
    named = site.object_credentials_file or (None if site.object_cloud else site.credentials_file)
    login = _find(site, named, site.object_cloud or site.cloud, site.object_region, site.object_auth_url)
    return _checked(replace(login, at_site=site.object_auth_url or "", key="object_credentials"))


def how_to_make(auth_url: str, where: str, key: str) -> str:
    """The page and the clicks, or the command, that make an application credential that labctl can work with."""
    page = horizon_page(auth_url)
    made = (
        f"open {page}, Create Application Credential, tick Unrestricted, Create, Download openrc file"
        if page
        else f"make one with a password login{where}: openstack application credential create --unrestricted labctl, "
        "or in its Horizon, and download the openrc file"
    )
    return f"{made}; chmod 600 it and name it in lab.yaml: cloud: {{{key}: FILE}}"


def horizon_page(auth_url: str) -> str:
    """Horizon's page for application credentials; "" where it isn't known. Chameleon has it on Keystone's host."""
    host = urlsplit(auth_url).hostname or ""
    return f"https://{host}/identity/application_credentials/" if host.endswith(".chameleoncloud.org") else ""


def _find(site: Site, file: Path | None, name: str | None, region: str | None, at_site: str | None) -> Login:
    if file is not None:
        return _from_download(file, region)
    if name is None and site.clouds_file is None:
        name = os.environ.get("OS_CLOUD")
    if name:
        return _from_clouds(site, name, region)
    return _from_variables(os.environ, "environment (OS_*)", region, at_site)


def _from_download(path: Path, region: str | None) -> Login:
    """A file that Horizon handed out: an openrc (assignments of OS_*), or a clouds.yaml with one entry."""
    text = private_text(path, "cloud.credentials")
    if path.suffix in (".yaml", ".yml"):
        site = Site(name=str(path), cloud=None, object_cloud=None, clouds_file=path)
        return _from_clouds(site, "", region)
    return _from_variables(dict(credentials_file.pairs(text)), str(path), region, None)


def private_text(path: Path, key: str) -> str:
    """The text of a login's file. Raises ConfigError if it can't be read, or others can read it."""
    return credentials_file.private_text(
        path,
        "a secret",
        key,
        lambda why: ConfigError(
            f"The credentials file {path} can't be read.",
            expected="an openrc or clouds.yaml as Horizon hands it out",
            found=why,
            source=f"lab.yaml: {key}",
            next_step="check the path, or download the file again",
        ),
    )


def _from_clouds(site: Site, name: str, region: str | None) -> Login:
    """An entry of clouds.yaml, read by openstacksdk's own loader (profiles, secure.yaml too); "" for its only one."""
    from openstack.config import OpenStackConfig
    from openstack.exceptions import ConfigException

    path = site.clouds_file
    if path is not None and not path.is_file():
        raise ConfigError(
            f"there is no {path}",
            expected=f"a clouds.yaml with an entry {name}",
            source=f"site {site.name}",
            next_step="labctl sandbox up" if site.name == "sandbox" else _no_login(site.auth_url),
        )
    source = f"{path or 'clouds.yaml'}, entry {name}" if name else str(path)
    try:
        config = OpenStackConfig(
            config_files=[str(path)] if path else None,
            secure_files=[str(path.with_name("secure.yaml"))] if path else None,
            load_envvars=path is None,
        )
        known = sorted(set(config.get_cloud_names()) - {"defaults"})
        name = name or (known[0] if len(known) == 1 else "")
        if name not in known:
            raise ConfigError(
                f"clouds.yaml has no entry {name}" if name else f"{path} has not one entry",
                expected=f"one of: {', '.join(known)}" if known else "at least one entry",
                found=name or f"{len(known)}",
                source=str(config.config_filename or path or "./clouds.yaml, ~/.config/openstack, /etc/openstack"),
                next_step=_no_login(site.auth_url),
            )
        entry = config.get_one(cloud=name, validate=False).config
    except ConfigException as error:
        raise ConfigError(
            "clouds.yaml can't be used", found=str(error), source=source, next_step="mend the file"
        ) from error
    values = {str(key): str(value) for key, value in (entry.get("auth") or {}).items() if value not in (None, "")}
    if not values.get("auth_url"):
        raise ConfigError(
            "the clouds.yaml entry has no auth.auth_url", source=source, next_step=_no_login(site.auth_url)
        )
    settings: list[tuple[str, Any]] = []
    if entry.get("verify") is False:
        settings.append(("insecure", True))
    settings += [(ours, str(entry[theirs])) for theirs, ours in _TLS if entry.get(theirs)]
    return Login(
        auth_type=_auth_type(str(entry.get("auth_type") or ""), values),
        values=values,
        region=region or entry.get("region_name") or None,
        interface=str(entry.get("interface") or "public"),
        source=source,
        settings=tuple(settings),
    )


def _no_login(auth_url: str | None) -> str:
    return f"log in by password or token, or: {how_to_make(auth_url or '', '', 'credentials')}"


def _from_variables(env: Mapping[str, str], source: str, region: str | None, at_site: str | None) -> Login:
    """The `OS_*` variables of an openrc, or of Chameleon's Jupyter, whose token is good at every site of Chameleon."""
    given = env.get("OS_AUTH_TYPE") or env.get("OS_AUTH_METHOD") or ""
    federated = given.startswith("v3oidc")
    auth_url = (at_site if federated else None) or env.get("OS_AUTH_URL")
    if not auth_url:
        raise ConfigError(
            "no credentials for the cloud" if env is os.environ else f"{source} has no credentials",
            expected="lab.yaml: cloud.credentials, $OS_CLOUD and a clouds.yaml, or OS_AUTH_URL and its companions",
            found="none of them",
            source=source,
            next_step=_no_login(at_site),
        )
    given_values = {key[3:].lower(): value for key, value in env.items() if key.startswith("OS_") and value}
    values = {key: value for key, value in given_values.items() if key in _KNOWN}
    auth_type = _auth_type(given, values)
    settings = [("cafile", env["OS_CACERT"])] if env.get("OS_CACERT") else []
    return Login(
        auth_type=auth_type,
        values={**(values if auth_type in _OPTIONS else {}), "auth_url": auth_url},
        region=region or env.get("OS_REGION_NAME"),
        interface=env.get("OS_INTERFACE") or "public",
        source=source,
        settings=tuple(settings),
        from_environment=auth_type not in _OPTIONS,
    )


def _auth_type(given: str, values: Mapping[str, str]) -> str:
    """python-chi knows the `v3…` names only; clouds.yaml and openrc files often give the short one, or none."""
    if given.startswith("v3"):
        return given
    if "application_credential_secret" in values or given == "applicationcredential":
        return APPLICATION_CREDENTIAL
    if given == "token" or "token" in values:
        return TOKEN
    return PASSWORD


def _checked(login: Login) -> Login:
    """The login without what belongs to another kind of login. Raises ConfigError for what it lacks."""
    if login.auth_type not in _OPTIONS:
        return login
    options = _OPTIONS[login.auth_type]
    values = {key: value for key, value in login.values.items() if key in options or key not in _KNOWN}
    asked = any(value.startswith("$") for value in values.values())
    here = {key for key, value in values.items() if not value.startswith("$")}
    missing = [one for one in _NEEDS[login.auth_type] if not here & set(one.split(" or "))]
    if missing:
        raise ConfigError(
            f"the login lacks {', '.join(missing)}",
            expected=f"everything that a login by {login.auth_type.removeprefix('v3')} takes",
            found="an openrc that asks for the password when it is sourced" if asked else "it isn't there",
            source=login.source,
            next_step=f"source the openrc and leave it out of lab.yaml, or {login.mend}" if asked else login.mend,
        )
    return replace(login, values=values)
