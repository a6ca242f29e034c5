"""lab.yaml: what a lab is, checked before anything is asked of a cloud.

Every value keeps its source (`lab.yaml:12` or `default`), so that an error anywhere can say where the value came from.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from labctl.errors import ConfigError

LAB_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
RESOURCE_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
#: 63 is what a host name's label may have (RFC 1123); a server's name becomes one.
NAME_LENGTH = 63
MOUNT_ROOTS = ("/mnt", "/srv", "/media", "/opt", "/data")


def _lab_name(value: str) -> str:
    # node-persist-<name> and object-persist-<name> must fit into 63 characters as well
    if not LAB_NAME.fullmatch(value) or len(value) > NAME_LENGTH - len("object-persist-"):
        raise ValueError("must be 1 to 48 characters out of a-z, 0-9 and -, not starting or ending with -")
    return value


def _resource_name(value: str) -> str:
    if not RESOURCE_NAME.fullmatch(value) or len(value) > NAME_LENGTH or ".." in value:
        raise ValueError(
            "must be 1 to 63 characters out of A-Z, a-z, 0-9, '.', '_' and '-', starting with a letter or digit"
        )
    return value


def _mount_point(value: str) -> str:
    path = PurePosixPath(value)
    under_root = any(PurePosixPath(root) in path.parents for root in MOUNT_ROOTS)
    if not re.fullmatch(r"(/[A-Za-z0-9][A-Za-z0-9._-]*)+", value) or ".." in path.parts or not under_root:
        raise ValueError(f"must be a plain absolute path below one of {', '.join(MOUNT_ROOTS)}")
    return value


def _cidr(value: str) -> str:
    try:
        return str(ipaddress.IPv4Network(value))
    except ValueError as error:
        raise ValueError(f"must be an IPv4 network such as 203.0.113.0/24 ({error})") from None


def _image_reference(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9][A-Za-z0-9._:/@-]*", value):
        raise ValueError("must be an image reference such as quay.io/jupyter/scipy-notebook:2026-10-01")
    return value


def _user_name(value: str) -> str:
    if not re.fullmatch(r"[a-z_][a-z0-9_-]{0,31}", value):
        raise ValueError("must be a Linux user name: a-z, 0-9, _ and -, at most 32 characters")
    return value


def _host_pattern(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9*][A-Za-z0-9.*-]*(:(\d{1,5}|\*))?", value):
        raise ValueError(
            "must be a host name or address, with :PORT or :* if not on port 80, such as mlflow.example.org:*"
        )
    return value


LabName = Annotated[str, AfterValidator(_lab_name)]
ResourceName = Annotated[str, AfterValidator(_resource_name)]
MountPoint = Annotated[str, AfterValidator(_mount_point)]
Cidr = Annotated[str, AfterValidator(_cidr)]
ImageReference = Annotated[str, AfterValidator(_image_reference)]
Port = Annotated[int, Field(ge=1024, le=65535)]


def _at(key: str, message: str) -> PydanticCustomError:
    """A mistake that a section as a whole finds, at the key that it is about."""
    return PydanticCustomError("labctl", "{message}", {"key": key, "message": message})


class Section(BaseModel):
    """What all sections share: no unknown keys, no guessing of types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class CloudSection(Section):
    """How the site differs from its preset (see `labctl.sites`), and what it is logged into with.

    `credentials`, `object_credentials`: files as Horizon hands them out, an openrc or a clouds.yaml (mode 0600).
    `compute_cloud`, `object_cloud`: entries of clouds.yaml.
    """

    credentials: str | None = None
    object_credentials: str | None = None
    compute_cloud: str | None = None
    region: str | None = None
    object_cloud: str | None = None
    object_region: str | None = None
    network: ResourceName | None = None
    external_network: ResourceName | None = None
    volume_type: ResourceName | None = None


class LeaseSection(Section):
    """The lease that the server lives in, on sites that have leases; `days` and `hours` add up.

    `name`: a lease that was made by hand. `required` and `extendable` overrule what is known of the site.
    """

    name: ResourceName | None = None
    days: Annotated[int, Field(ge=0, le=366)] | None = None
    hours: Annotated[int, Field(ge=0, le=8784)] | None = None
    required: bool | None = None
    extendable: bool | None = None

    @model_validator(mode="after")
    def _lasts(self) -> LeaseSection:
        if (self.days, self.hours) != (None, None) and not self.duration:
            raise _at("days", "a lease of no days and no hours would end at once")
        return self

    @property
    def duration(self) -> timedelta:
        """How long a new lease lasts: a week, unless lab.yaml says."""
        if self.days is None and self.hours is None:
            return timedelta(days=7)
        return timedelta(days=self.days or 0, hours=self.hours or 0)


class ServerSection(Section):
    """The VM."""

    name: ResourceName | None = None
    image: ResourceName = "CC-Ubuntu24.04"
    flavor: ResourceName = "m1.large"
    availability_zone: ResourceName | None = None
    user: Annotated[str, AfterValidator(_user_name)] = "cc"
    ssh_key: str | None = None


class VolumeSection(Section):
    """The block volume; `size_gib` is in GiB and counts when the volume is made.

    `credentials_file`: what a volume was made with that neither labctl nor the tutorial made; needed once, to adopt it.
    """

    name: ResourceName | None = None
    size_gib: Annotated[int, Field(ge=1, le=16384)] = 2
    mount_point: MountPoint = "/mnt/block"
    credentials_file: str | None = None


class ObjectStoreSection(Section):
    """The container of the object store and where it is mounted.

    `dialect`: what the server speaks with it; auto is what the site lets a credential be made for, Swift first.
    `credentials_file`: a credential for the server that was made by hand, where labctl may make none.
    """

    container: ResourceName | None = None
    dialect: Literal["auto", "swift", "s3"] = "auto"
    credentials_file: str | None = None
    mount_point: MountPoint = "/mnt/object"
    layout: Literal["files", "packed"] = "files"


class AccessSection(Section):
    """Which networks reach the server. Unless `services_from` opens them, services are reached by `labctl tunnel`."""

    ssh_from: list[Cidr] = ["0.0.0.0/0"]
    services_from: list[Cidr] = []


class ServicesSection(Section):
    """Ports of the services, and further Host header values that MLflow answers to."""

    mlflow_port: Port = 8000
    s3_port: Port = 9000
    s3_console_port: Port = 9001
    jupyter_port: Port = 8888
    allowed_hosts: list[Annotated[str, AfterValidator(_host_pattern)]] = []

    @model_validator(mode="after")
    def _no_port_twice(self) -> ServicesSection:
        taken: dict[int, str] = {}
        for key in ("mlflow_port", "s3_port", "s3_console_port", "jupyter_port"):
            port = getattr(self, key)
            if port in taken:
                raise _at(key, f"{key} and {taken[port]} are both {port}; each service needs a port of its own")
            taken[port] = key
        return self


class ImagesSection(Section):
    """Images to run instead of the site's own, for instance from an air-gapped registry."""

    mlflow: ImageReference | None = None
    postgres: ImageReference | None = None
    s3: ImageReference | None = None
    jupyter: ImageReference | None = None
    registry_mirrors: list[str] = []
    insecure_registries: list[str] = []


ArchiveURL = Annotated[str, Field(pattern=r"^(https?|file)://")]
SHA256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Dataset(Section):
    """A dataset to load. One of `url` (an archive or a list), `folder` (on the server), `prefix` (CONTAINER/PATH).

    `class_rule`: where a file's class is told. `labels`: a CSV of lines `path,class`, a file beside lab.yaml or one
    in the archive.
    """

    name: LabName
    url: ArchiveURL | Annotated[list[ArchiveURL], Field(min_length=1)] | None = None
    folder: Annotated[str, Field(pattern=r"^/")] | None = None
    prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9]")] | None = None
    sha256: SHA256 | list[SHA256] | None = None
    classes: Annotated[int, Field(ge=1, le=100000)] | list[str] | None = None
    splits: list[ResourceName] | None = None
    class_rule: Literal["prefix", "folder", "csv"] | None = None
    labels: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Dataset:
        if sum(value is not None for value in (self.url, self.folder, self.prefix)) != 1:
            raise _at("dataset", "dataset needs exactly one of url, folder and prefix")
        if (self.class_rule == "csv") != (self.labels is not None):
            raise _at("dataset", "dataset.labels names the CSV of class_rule: csv, and goes with no other rule")
        if isinstance(self.sha256, list) != isinstance(self.url, list) and self.sha256 is not None:
            raise _at("dataset", "dataset.sha256 is a list where dataset.url is one, and only there")
        if isinstance(self.sha256, list) and isinstance(self.url, list) and len(self.sha256) != len(self.url):
            raise _at("dataset", "dataset.sha256 needs one hash for each archive of dataset.url")
        return self


class Lab(Section):
    """A whole lab.yaml."""

    lab: LabName
    site: ResourceName = "sandbox"
    cloud: CloudSection = CloudSection()
    lease: LeaseSection = LeaseSection()
    server: ServerSection = ServerSection()
    volume: VolumeSection = VolumeSection()
    object_store: ObjectStoreSection = ObjectStoreSection()
    access: AccessSection = AccessSection()
    services: ServicesSection = ServicesSection()
    images: ImagesSection = ImagesSection()
    dataset: Annotated[
        Annotated[Literal["food11"], Tag("built-in")] | Annotated[Dataset, Tag("described")],
        Discriminator(lambda value: "described" if isinstance(value, dict | Dataset) else "built-in"),
    ] = "food11"

    _file: Path | None = PrivateAttr(default=None)
    _lines: dict[tuple[str, ...], int] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _mounts_apart(self) -> Lab:
        volume, store = PurePosixPath(self.volume.mount_point), PurePosixPath(self.object_store.mount_point)
        if volume == store or volume in store.parents or store in volume.parents:
            raise _at(
                "object_store.mount_point",
                f"volume.mount_point {volume} and object_store.mount_point {store} must not be inside each other",
            )
        return self

    @property
    def server_name(self) -> str:
        """The server's name, the tutorial's unless lab.yaml says another."""
        return self.server.name or f"node-persist-{self.lab}"

    @property
    def volume_name(self) -> str:
        """The volume's name, the tutorial's unless lab.yaml says another."""
        return self.volume.name or f"block-persist-{self.lab}"

    @property
    def container_name(self) -> str:
        """The container's name, the tutorial's unless lab.yaml says another."""
        return self.object_store.container or f"object-persist-{self.lab}"

    def source(self, key: str) -> str:
        """Where a value came from, for instance `source("server.flavor")` is `lab.yaml:7` or `default`."""
        line = self._lines.get(tuple(key.split(".")))
        return f"{self._file}:{line}" if line and self._file else "default"


def find_file(option: Path | None) -> Path:
    """The lab.yaml to use: `--lab`, else ./lab.yaml, else `$LABCTL_LAB`."""
    if option is not None:
        candidates = [(option, "--lab")]
    else:
        candidates = [(Path("lab.yaml"), "the working directory")]
        if named := os.environ.get("LABCTL_LAB"):
            candidates.append((Path(named), "$LABCTL_LAB"))
    for path, _ in candidates:
        if path.is_file():
            return path
    raise ConfigError(
        "There is no lab.yaml.",
        found=", ".join(f"no file {path} ({source})" for path, source in candidates),
        next_step="labctl init --site sandbox, or --lab FILE",
    )


def load(path: Path) -> Lab:
    """Read and check a lab.yaml.

    Raises ConfigError for whatever is wrong with it: one message with the file, line, key and what is allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}", next_step="check the path and its permissions") from None
    lines: dict[tuple[str, ...], int] = {}
    data = _parse(path, text, lines)
    try:
        lab = Lab.model_validate(data)
    except ValidationError as error:
        raise _explain(path, lines, error) from None
    lab._file, lab._lines = path, lines
    return lab


def _parse(path: Path, text: str, lines: dict[tuple[str, ...], int]) -> Any:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _index(path, root, (), lines)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}: not valid YAML: {problem}", source=where, next_step="mend that line") from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path} must be a mapping of keys to values.",
            found="an empty file" if data is None else type(data).__name__,
            source=str(path),
            next_step="labctl init writes one to start from",
        )
    return data


def _index(path: Path, node: yaml.Node | None, key: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> None:
    """Note the line of every key, and refuse a key that stands twice (YAML would take the last one silently)."""
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            lines[(*key, str(number))] = item.start_mark.line + 1
            _index(path, item, (*key, str(number)), lines)
    if not isinstance(node, yaml.MappingNode):
        return
    for name_node, value_node in node.value:
        name = (*key, str(name_node.value))
        line = name_node.start_mark.line + 1
        if name in lines:
            raise ConfigError(
                f"{path}:{line}: {'.'.join(name)} stands twice (also on line {lines[name]}).",
                source=f"{path}:{line}",
                next_step="keep one of them",
            )
        lines[name] = line
        _index(path, value_node, name, lines)


def _explain(path: Path, lines: dict[tuple[str, ...], int], error: ValidationError) -> ConfigError:
    """All mistakes of a file in one error, the first one as its sentence."""
    mistakes = sorted(
        (_mistake(path, lines, dict(item)) for item in error.errors(include_url=False)),
        key=lambda mistake: int(mistake[0].rpartition(":")[2]) if ":" in mistake[0] else 0,
    )
    source, first, expected, found = mistakes[0]
    return ConfigError(
        f"{source}: {first}",
        expected=expected,
        found=found,
        source=source,
        detail="\n".join(f"{where}: {what}" for where, what, _, _ in mistakes[1:]),
        next_step=f"mend {source} and run the command again",
    )


def _mistake(path: Path, lines: dict[tuple[str, ...], int], item: dict[str, Any]) -> tuple[str, str, str, str]:
    """(source, sentence, expected, found) of one of pydantic's errors."""
    # a union puts the tag of its alternative into the place: keep what names a key
    place = tuple(str(part) for part in item["loc"] if str(part) not in ("described", "built-in"))
    place += tuple(item.get("ctx", {}).get("key", "").split(".")) if item["type"] == "labctl" else ()
    known = next((place[:n] for n in range(len(place), 0, -1) if place[:n] in lines), ())
    source = f"{path}:{lines[known]}" if known else str(path)
    key = ".".join(place)
    found = "" if item["type"] in ("missing", "extra_forbidden") else repr(item["input"])
    if item["type"] == "extra_forbidden":
        allowed = _keys_of(place[:-1])
        near = difflib.get_close_matches(place[-1], allowed, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return source, f"{key} is not a key that lab.yaml knows{hint}", f"one of {', '.join(allowed)}", ""
    if item["type"] == "missing":
        return source, f"{key} is missing", "a value", ""
    if item["type"] == "labctl":
        return source, item["msg"], "", ""
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return source, f"{key}: {message}" if key else message, message, found if len(found) < 200 else ""


def _keys_of(place: tuple[str, ...]) -> list[str]:
    """The keys that the section at place may have."""
    model: Any = Lab
    for part in place:
        field = model.model_fields.get(part)
        model = Dataset if part == "dataset" else field.annotation if field else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
    return list(model.model_fields)
