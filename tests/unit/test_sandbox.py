"""The parts of the sandbox that decide: what is ours, what has changed, what a registry's answer means."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from pathlib import Path

import pytest
from labctl.errors import ConfigError, ConvergeFailed
from labctl.sandbox import control, files, lifecycle, loops, services, upstream
from labctl.sandbox.board import Board, Job
from labctl.sandbox.config import SandboxConfig, resolvers
from labctl.sandbox.docker import Commands


def test_loop_devices_of_others_are_never_taken_for_ours(tmp_path: Path) -> None:
    """By file identity: a foreign loop device may have a backing file of the very same name or inode number."""
    volume = tmp_path / "volume-1"
    volume.write_bytes(b"")
    [(device, inode)] = loops.identities(tmp_path)
    listed = loops.parse(
        json.dumps(
            {
                "loopdevices": [
                    {"name": "/dev/loop0", "back-ino": inode, "back-maj:min": device},
                    {"name": "/dev/loop1", "back-ino": inode, "back-maj:min": "0:99"},
                    {"name": "/dev/loop2", "back-ino": inode + 1, "back-maj:min": device},
                    {"name": "/dev/loop3", "back-ino": None, "back-maj:min": None},
                ]
            }
        )
    )
    assert [loop.name for loop in loops.belonging_to(listed, loops.identities(tmp_path))] == ["/dev/loop0"]


def test_no_loop_devices_at_all_is_an_empty_list(tmp_path: Path) -> None:
    assert loops.parse("") == []
    assert loops.identities(tmp_path / "missing") == []


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda d: (d / "a").write_text("other"), False),
        (lambda d: (d / "a").rename(d / "b"), False),
        (lambda d: (d / "sub" / "c").write_text("new"), False),
        (lambda d: (d / "a").chmod(0o755), True),
        (lambda d: os.utime(d / "a", (0, 0)), True),
        (lambda d: (d / "__pycache__" / "x.pyc").write_text("compiled"), True),
    ],
)
def test_an_image_is_built_again_exactly_when_content_changes(tmp_path: Path, change: object, same: bool) -> None:
    for folder in ("sub", "__pycache__"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a").write_text("text")
    before = files.content_hash(tmp_path, "x")
    change(tmp_path)  # type: ignore[operator]
    assert (files.content_hash(tmp_path, "x") == before) is same


def test_two_parts_never_hash_like_their_concatenation() -> None:
    assert files.content_hash("ab", "c") != files.content_hash("a", "bc")


def test_credentials_are_private_from_the_first_byte_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "clouds.yaml"
    os.umask(0)
    files.write_private(path, "old")
    files.write_private(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["clouds.yaml"]
    os.umask(0o022)


def test_a_folder_with_somebody_elses_files_is_not_taken_as_state(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError) as error:
        files.prepare_state(SandboxConfig(state=tmp_path))
    assert error.value.source == "LABCTL_SANDBOX_STATE"


def test_state_of_another_sandbox_is_not_taken(tmp_path: Path) -> None:
    files.prepare_state(SandboxConfig(name="one", state=tmp_path / "s"))
    files.prepare_state(SandboxConfig(name="one", state=tmp_path / "s"))
    with pytest.raises(ConfigError):
        files.prepare_state(SandboxConfig(name="two", state=tmp_path / "s"))


def test_destroy_leaves_a_folder_without_our_marker_and_files_it_did_not_write(tmp_path: Path) -> None:
    foreign = tmp_path / "volumes" / "volume-x"
    foreign.parent.mkdir()
    foreign.write_text("data")
    lifecycle._delete_state(SandboxConfig(state=tmp_path), lambda _: None)
    assert foreign.exists()
    mine = SandboxConfig(state=tmp_path / "mine")
    files.prepare_state(mine)
    (mine.state / "notes.txt").write_text("a user's")
    (mine.volumes / "volume-1").write_text("")
    lifecycle._delete_state(mine, lambda _: None)
    assert [p.name for p in mine.state.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("prefix", ["172.29.0", "8.8", "172.15", "10.300", "", "10.1; rm"])
def test_addresses_outside_private_networks_are_refused(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABCTL_SANDBOX_SUBNET_PREFIX", prefix)
    with pytest.raises(ConfigError):
        SandboxConfig.from_environment()


@pytest.mark.parametrize("name", ["Up", "a b", "../x", "-x", "x" * 60])
def test_names_that_docker_or_a_path_would_read_differently_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABCTL_SANDBOX_NAME", name)
    with pytest.raises(ConfigError):
        SandboxConfig.from_environment()


def test_two_sandboxes_share_no_name_address_or_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("NAME", "SUBNET_PREFIX", "STATE"):
        monkeypatch.delenv(f"LABCTL_SANDBOX_{variable}", raising=False)
    first = SandboxConfig.from_environment()
    monkeypatch.setenv("LABCTL_SANDBOX_NAME", "labctl-sandbox-t")
    monkeypatch.setenv("LABCTL_SANDBOX_SUBNET_PREFIX", "172.28")
    second = SandboxConfig.from_environment()
    for field in ("name", "registry_name", "build_name", "own_label", "bridge", "subnet", "address", "state"):
        assert getattr(first, field) != getattr(second, field), field
    assert all(len(c.bridge) <= 15 for c in (first, second))


def test_a_loopback_resolver_is_not_given_to_containers(tmp_path: Path) -> None:
    stub, real = tmp_path / "stub", tmp_path / "real"
    stub.write_text("nameserver 127.0.0.53\noptions edns0\n")
    real.write_text("# by systemd\nnameserver 192.0.2.1\nnameserver 2001:db8::1\n")
    assert resolvers((stub, real)) == ["192.0.2.1"]
    assert resolvers((tmp_path / "none", stub)) == []


def test_a_second_command_waits_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LOCKS", tmp_path)
    config = SandboxConfig(state=tmp_path / "s")
    said: list[str] = []

    def release(_: float) -> None:
        first.__exit__(None, None, None)

    first = files.locked(config, lambda _: None)
    first.__enter__()
    with files.locked(config, said.append, sleep=release):
        pass
    assert len(said) == 1


def test_a_failure_ends_the_other_jobs_and_is_the_one_that_is_reported(tmp_path: Path) -> None:
    board = Board()
    commands = Commands(tmp_path, board.stop)

    def slow(_: object) -> None:
        commands.run(["sleep", "60"], "slow")

    board.start("slow", slow)

    def broken(_: object) -> None:
        time.sleep(0.3)
        raise ConvergeFailed("the first one")

    failed = board.start("broken", broken)
    board.start("later", lambda job: pytest.fail("must not run"), (failed,))
    begin = time.monotonic()
    with pytest.raises(ConvergeFailed, match="the first one"):
        board.finish(lambda _: None)
    assert time.monotonic() - begin < 10


def test_waiting_says_what_it_waits_for_at_least_every_two_seconds() -> None:
    told: list[tuple[float, str]] = []
    board = Board()

    def work(job: Job) -> None:
        job.note("step 1 of 2")
        time.sleep(4)

    board.start("image x", work)
    board.finish(lambda sentence: told.append((time.monotonic(), sentence)))
    assert len(told) >= 2
    assert all("image x: step 1 of 2" in sentence for _, sentence in told)
    assert all(b - a < 2 for (a, _), (b, _) in itertools.pairwise(told))


def test_a_failed_command_names_its_log_and_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(ConvergeFailed) as error:
        Commands(tmp_path, threading.Event()).run(["sh", "-c", "echo why; exit 3"], "x")
    assert error.value.detail == "why"
    assert error.value.source == str(tmp_path / "x.log")


@pytest.mark.parametrize(
    ("header", "realm"),
    [
        (
            'Bearer realm="https://auth.example/token",service="r",scope="repository:a/b:pull"',
            "https://auth.example/token",
        ),
        ('Basic realm="x"', None),
        ("", None),
    ],
)
def test_a_registrys_challenge_is_read(header: str, realm: str | None) -> None:
    assert upstream.challenge(header).get("realm") == realm


def test_references_are_split_at_host_and_tag() -> None:
    assert upstream.split("docker.io/library/postgres:17") == ("docker.io", "library/postgres", "17")
    assert upstream.split("127.0.0.1:5000/labctl/x:1") == ("127.0.0.1:5000", "labctl/x", "1")


def test_every_listed_image_can_be_built_and_comes_after_its_base() -> None:
    order = services.listed()
    names = [service.name for service in order]
    assert {"postgres", "s3", "mlflow", "jupyter", "rclone"} <= set(names)
    for service in order:
        assert files.build_files("images", service.name, "Dockerfile").is_file()
        assert not service.base or names.index(service.base) < names.index(service.name)
        assert not service.upstream or not service.upstream.endswith(":latest")


def test_half_written_files_of_an_interrupted_run_count_as_missing(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"images": ')
    assert files.read_json(tmp_path / "x.json") is None


def test_optional_images_are_made_only_when_asked_for() -> None:
    optional = {service.name: service for service in services.listed(optional=True)}
    assert {"postgres-15", "postgres-16", "postgres-18"} <= set(optional)
    assert not set(optional) & {service.name for service in services.listed()}
    for service in optional.values():
        assert (service.build_folder / "Dockerfile").is_file()
    assert len({service.local_tag for service in optional.values()}) == len(optional)


def test_images_json_keeps_what_an_interrupted_up_had_done(tmp_path: Path) -> None:
    config = SandboxConfig(state=tmp_path)
    first = services.Catalogue(config)
    first.add("s3", f"{config.registry_address}/labctl/s3@sha256:1", "build:a", "minio")
    second = services.Catalogue(config)
    second.add("postgres", "docker.io/library/postgres@sha256:2", "upstream:p")
    content = json.loads(config.images_file.read_text())
    assert content["registry"] == config.registry_address
    assert content["s3_flavour"] == "minio"
    assert sorted(content["images"]) == ["postgres", "s3"]
    assert services.Catalogue(config).current("s3", "build:a")
    assert not services.Catalogue(config).current("s3", "build:b")


def test_images_that_all_come_from_upstream_need_no_registry_of_ours(tmp_path: Path) -> None:
    config = SandboxConfig(state=tmp_path)
    services.Catalogue(config).add("python", "docker.io/library/python@sha256:1", "upstream:x")
    assert json.loads(config.images_file.read_text())["registry"] == ""


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_memory_is_read_from_either_cgroup_version(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / ("memory/docker/abc" if kind == "v1" else "docker/abc")
    folder.mkdir(parents=True)
    (folder / ("memory.usage_in_bytes" if kind == "v1" else "memory.current")).write_text(str(300 * 2**20))
    (folder / "memory.stat").write_text(f"total_inactive_file {100 * 2**20}\n" if kind == "v1" else "anon 1\n")
    assert control.memory_mib("abc", tmp_path) == (200 if kind == "v1" else 300)
    assert control.memory_mib("none", tmp_path) is None
