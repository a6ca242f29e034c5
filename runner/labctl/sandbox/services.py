"""Service images: pulled by digest where a container registry answers, else built and pushed into the sandbox's own.

What there is, is in sandbox/images: a folder with a Dockerfile each, and versions.json.
"""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from labctl.errors import ConfigError, ConvergeFailed
from labctl.sandbox import control, images, upstream
from labctl.sandbox.board import Board, Job
from labctl.sandbox.config import SandboxConfig
from labctl.sandbox.docker import Commands, docker, image_exists
from labctl.sandbox.files import build_files, content_hash, read_json, write_private

Source = Literal["auto", "pull", "build"]
#: Builds at a time: a third one on two cores makes each of them slower.
PARALLEL_BUILDS = 2
MANIFESTS = "application/vnd.docker.distribution.manifest.v2+json, application/vnd.oci.image.manifest.v1+json"
_PUSHED = re.compile(r"digest: (sha256:[0-9a-f]{64})")


@dataclass(frozen=True)
class Service:
    """One entry of versions.json.

    `base` names the service image it is built on ("from"), `folder` the build files if they aren't called like it. An
    `optional` one is made when somebody asks for it, not by `up`.
    """

    name: str
    version: str
    upstream: str = ""
    flavour: str = ""
    upstream_flavour: str = ""
    base: str = ""
    folder: str = ""
    optional: bool = False

    @property
    def build_folder(self) -> Path:
        """Where its Dockerfile is."""
        return build_files("images", self.folder or self.name)

    @property
    def local_tag(self) -> str:
        """The image on this machine; the tag changes with the Dockerfile's folder and with what it starts from."""
        folder = self.build_folder
        below = content_hash(build_files("images", self.base)) if self.base else ""
        return f"labctl-sandbox-service-{self.name}:{content_hash(images.base_image(), folder, self.version, below)}"


def listed(optional: bool = False) -> list[Service]:
    """The service images: first those that others wait for, then those that wait for none, then the others.

    Those that a plain `up` makes, or with `optional` the others.
    """
    path = build_files("images", "versions.json")
    entries: dict[str, dict[str, Any]] = json.loads(path.read_text())
    names = {"from": "base"}
    known = Service.__dataclass_fields__
    services = [
        Service(name, **{names.get(k, k): v for k, v in entry.items() if names.get(k, k) in known})
        for name, entry in entries.items()
        if bool(entry.get("optional")) == optional
    ]
    needed = {s.base for s in services if s.base}
    return sorted(services, key=lambda s: (bool(s.base), s.name not in needed))


class Catalogue:
    """images.json as it grows: written whole after each image, so an interrupted `up` loses nothing that was done."""

    def __init__(self, config: SandboxConfig) -> None:
        self.config = config
        self.lock = threading.Lock()
        self.references: dict[str, str] = {}
        self.made_from: dict[str, str] = {}
        self.flavour = ""
        kept = read_json(config.state / "images-made.json") or {}
        old = read_json(config.images_file) or {}
        for name, source in kept.items():
            if reference := old.get("images", {}).get(name):
                self.references[name], self.made_from[name] = reference, source
        self.flavour = old.get("s3_flavour", "")

    def current(self, name: str, source: str) -> bool:
        """Whether this image is already there, made from this very source."""
        return self.made_from.get(name) == source

    def add(self, name: str, reference: str, source: str, flavour: str = "") -> None:
        """Notes where the servers get an image from, and what it was made from."""
        with self.lock:
            self.references[name], self.made_from[name] = reference, source
            if name == "s3":
                self.flavour = flavour
            own = any(r.startswith(self.config.registry_address) for r in self.references.values())
            content = {
                "registry": self.config.registry_address if own else "",
                "images": dict(sorted(self.references.items())),
                "s3_flavour": self.flavour,
            }
            write_private(self.config.images_file, json.dumps(content, indent=2) + "\n")
            write_private(self.config.state / "images-made.json", json.dumps(self.made_from))


def complete(config: SandboxConfig, source: Source) -> bool:
    """Whether images.json has every service image as the files here want it, without asking the network."""
    catalogue = Catalogue(config)
    for service in listed():
        wanted = {f"build:{service.local_tag}"} if source != "pull" else set()
        if source != "build" and service.upstream:
            wanted.add(f"upstream:{service.upstream}")
        if source == "pull" and not service.upstream:
            wanted.add(f"build:{service.local_tag}")
        if service.name == "s3" and source != "pull":
            wanted.add(f"instead:{service.local_tag}")
        if not any(catalogue.current(service.name, w) for w in wanted):
            return False
    return True


class Maker:
    """Brings one service image after the other to where the servers can pull it."""

    def __init__(self, config: SandboxConfig, commands: Commands, source: Source) -> None:
        self.config, self.commands, self.source = config, commands, source
        self.catalogue = Catalogue(config)
        self.slots = threading.Semaphore(PARALLEL_BUILDS)
        self.answers: dict[str, bool] = {}

    def start_all(self, board: Board, base: Future[None], registry: Future[None]) -> None:
        """A job for each image. Builds wait for `base`, pushes for `registry`."""
        probe = board.start("container registries", self.probe)
        jobs: dict[str, Future[None]] = {}
        for service in listed():
            before = (probe, base, registry, *((jobs[service.base],) if service.base else ()))
            jobs[service.name] = board.start(f"image {service.name}", self.job_for(service, jobs), before)

    def start_one(self, board: Board, service: Service, base: Future[None]) -> None:
        """A job for one image of a sandbox that runs."""
        board.start(f"image {service.name}", lambda job: self.one(service, job), (base,))

    def one(self, service: Service, job: Job) -> None:
        """One image, and the answer of the registry that it would come from."""
        self.probe(job, [service])
        self.job_for(service, {})(job)

    def probe(self, job: Job, among: list[Service] | None = None) -> None:
        """Asks each registry that an image would come from whether it answers; not with `images="build"`."""
        if self.source == "build":
            return
        hosts = {upstream.split(s.upstream)[0] for s in among or listed() if s.upstream}
        if not hosts:
            return
        job.note(f"asking {', '.join(sorted(hosts))}")
        self.answers = upstream.answering(hosts)
        if self.source == "pull" and not all(self.answers.values()):
            silent = sorted(h for h, ok in self.answers.items() if not ok)
            raise ConfigError(
                "not every container registry answers",
                expected="an answer from " + ", ".join(sorted(hosts)),
                found="none from " + ", ".join(silent),
                source="images=pull",
                next_step="labctl sandbox up --images build",
            )

    def job_for(self, service: Service, jobs: dict[str, Future[None]]) -> Callable[[Job], None]:
        """The work for one image."""

        def work(job: Job) -> None:
            if self.source != "build" and service.upstream and self.from_upstream(service, job):
                return
            try:
                self.build_and_push(service, job)
            except ConvergeFailed as error:
                # the one service that something else can stand in for, and says so in status
                if service.name != "s3" or "rclone" not in jobs or job.board.stop.is_set():
                    raise
                job.say(f"image s3: {error.what} ({error.source}); rclone serves S3 instead")
                job.note("waiting for the image rclone")
                jobs["rclone"].result()
                rclone = self.catalogue.references["rclone"]
                self.catalogue.add("s3", rclone, f"instead:{service.local_tag}", "rclone")

        return work

    def from_upstream(self, service: Service, job: Job) -> bool:
        """Whether the image can be had by digest from upstream's registry; then it is noted."""
        source = f"upstream:{service.upstream}"
        if self.catalogue.current(service.name, source):
            return True
        if not self.answers.get(upstream.split(service.upstream)[0]):
            return False
        job.note(f"asking for the digest of {service.upstream}")
        try:
            reference = upstream.resolve(service.upstream)
        except upstream.NotThere as error:
            if self.source == "pull":
                raise ConfigError(str(error), source="sandbox/images/versions.json") from error
            job.say(f"image {service.name}: {error}; it is built here")
            return False
        self.catalogue.add(service.name, reference, source, service.upstream_flavour)
        return True

    def build_and_push(self, service: Service, job: Job) -> None:
        """Builds the image if this machine doesn't have it, pushes it if the registry doesn't."""
        source = f"build:{service.local_tag}"
        if self.catalogue.current(service.name, source) and self.in_registry(self.catalogue.references[service.name]):
            return
        job.note(f"waiting: {PARALLEL_BUILDS} images are built at a time")
        with self.slots:
            if job.board.stop.is_set():
                return
            if not image_exists(service.local_tag):
                arguments = {"BASE": images.base_image(), "VERSION": service.version}
                if service.base:
                    arguments[f"{service.base.upper()}_IMAGE"] = self.base_of(service)
                images.build(self.commands, job, service.local_tag, service.build_folder, arguments=arguments)
            job.note("pushing it into the sandbox's registry")
            digest = self.push(service)
        name = f"{self.config.registry_address}/labctl/{service.name}"
        self.catalogue.add(service.name, f"{name}@{digest}", source, service.flavour)
        job.say(f"image {service.name} {service.version} is in the sandbox's registry")

    def base_of(self, service: Service) -> str:
        """What `docker build` on this machine calls the image that a service image is built on."""
        reference = self.catalogue.references[service.base]
        if not reference.startswith(self.config.registry_address):
            return reference
        return next(s.local_tag for s in listed() if s.name == service.base)

    def push(self, service: Service) -> str:
        """Pushes by the registry's port on 127.0.0.1, which needs no setting of the engine; returns the digest."""
        tag = f"{control.registry_port(self.config)}/labctl/{service.name}:{service.version}"
        docker("tag", service.local_tag, tag)
        try:
            lines = self.commands.run(["docker", "push", tag], f"push-{service.name}")
        finally:
            docker("rmi", tag, check=False)
        found = _PUSHED.search("\n".join(lines))
        if not found:
            raise ConvergeFailed(f"docker push of {service.name} didn't tell a digest", detail="\n".join(lines[-5:]))
        return found[1]

    def in_registry(self, reference: str) -> bool:
        """Whether the sandbox's registry has the manifest of `HOST/NAME@DIGEST`."""
        if not reference.startswith(self.config.registry_address):
            return False
        name, digest = reference.removeprefix(self.config.registry_address + "/").split("@")
        url = f"http://{control.registry_port(self.config)}/v2/{name}/manifests/{digest}"
        request = urllib.request.Request(url, method="HEAD", headers={"Accept": MANIFESTS})
        try:
            with urllib.request.urlopen(request, timeout=5):  # noqa: S310 - the address is ours
                return True
        except OSError:
            return False


def summary(config: SandboxConfig) -> dict[str, Any]:
    """images.json, or what stands for it when no image was ever made."""
    found: dict[str, Any] | None = read_json(config.images_file)
    return found or {"registry": "", "images": {}, "s3_flavour": ""}
