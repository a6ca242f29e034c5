"""What may run on a volume: a pure decision over what was read from it, made before any container starts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

#: Where a PostgreSQL image may have put its cluster below postgres_data: the tutorial's place, one that images with a
#: PGDATA of their own use, and (as N/docker) the official image's from version 18 on.
POSTGRES_FOLDER = "postgres_data"
POSTGRES_PLACES = ("", "data")
POSTGRES_MAJOR_PLACE = re.compile(r"[1-9][0-9]/docker")
#: The uid of the official PostgreSQL image; a new data directory gets it.
POSTGRES_UID = 999
#: What PostgreSQL demands of its directory's mode: nothing for others, no writing for the group.
POSTGRES_FORBIDDEN_MODE = 0o027
#: The uid that the S3 server of a new volume runs as.
S3_UID = 10001
#: Each S3 flavour's folder on the volume. MinIO and silo share a format; rclone keeps plain files.
S3_FOLDERS = {"minio": "minio_data", "silo": "minio_data", "rclone": "rclone_s3_data"}
PLAIN_FILES = "plain-files"
#: `format` in .minio.sys/format.json of what today's servers open; `fs` is MinIO's older layout, which they refuse.
S3_FORMATS = ("xl-single",)
#: What mkfs leaves in the root of a filesystem; no sign of data.
NOT_DATA = frozenset(["lost+found"])
#: Who wrote a volume's data first: labctl, or the tutorial's compose file, whose MinIO ran as root.
LABCTL, TUTORIAL = "labctl", "tutorial"
#: Bytes below which nothing is started: PostgreSQL's next file of its log alone has 16 MiB.
LEAST_FREE = 32 << 20


@dataclass(frozen=True)
class Folder:
    """A folder of the volume: its entries and owner, or None for both where it doesn't exist."""

    entries: tuple[str, ...] | None = None
    owner: tuple[int, int] | None = None

    @property
    def holds_data(self) -> bool:
        """Whether there is anything in it; what it is doesn't matter here."""
        return bool(set(self.entries or ()) - NOT_DATA)


@dataclass(frozen=True)
class Cluster:
    """A PostgreSQL directory: PG_VERSION's text, its owner and mode, and the uids of the files that it needs."""

    version: str
    owner: tuple[int, int]
    uids: frozenset[int] = frozenset()
    mode: int = 0o700


@dataclass(frozen=True)
class VolumeState:
    """Everything that was read from the volume. Unreadable files are `None` in their folder's presence: unknown."""

    mounted: bool = False
    marked: bool = False
    #: Why the marker couldn't be read.
    marker_problem: str = ""
    #: The marker's key `stack`.
    stack: Mapping[str, object] = field(default_factory=dict)
    read_only: bool = False
    free: int = 1 << 40
    size: int = 1 << 40
    postgres: Folder = field(default_factory=Folder)
    #: Clusters by directory, relative to the volume: the marker's only, or all that lie below postgres_data.
    clusters: Mapping[str, Cluster] = field(default_factory=dict)
    minio: Folder = field(default_factory=Folder)
    #: `format` of format.json; "" where the file can't be read or understood.
    minio_format: str | None = None
    rclone: Folder = field(default_factory=Folder)
    secrets: bool = False
    #: A first start began and wasn't seen to end.
    first_start: bool = False

    @property
    def postgres_pointer(self) -> str:
        """The directory that the marker says is served, or ""."""
        return str(self.stack.get("postgres_dir") or "")

    @property
    def s3_pointer(self) -> str:
        """Likewise for the objects."""
        return str(self.stack.get("s3_dir") or "")


@dataclass(frozen=True)
class Wanted:
    """What should run: the major version of the PostgreSQL image ("" if it doesn't say) and the S3 flavour."""

    data_dir: str
    postgres_major: str
    s3_flavour: str


@dataclass(frozen=True)
class Plan:
    """What to make (path below the data directory, uid, mode) and what to run on; `*_place` are relative to the volume.

    `adopt`: there is data, and the credentials that it was made with have yet to be proved. `s3_as_root`: the objects
    belong to root and to others, as the tutorial's MinIO left them.
    """

    create: tuple[tuple[str, int, int], ...]
    postgres_dir: str
    postgres_place: str
    postgres_owner: tuple[int, int]
    postgres_target: str
    s3_dir: str
    s3_place: str
    s3_owner: tuple[int, int]
    origin: str = LABCTL
    adopt: bool = False
    new_cluster: bool = False
    s3_as_root: bool = False


class Stop(Exception):
    """Starting would put data at risk: what was expected, what was found, what to do."""

    def __init__(self, msg: str, expected: str, found: str, next_step: str) -> None:
        super().__init__(msg)
        self.facts = {"msg": msg, "expected": expected, "found": found, "next_step": next_step}


def postgres_image(state: VolumeState, images: Mapping[str, str]) -> str:
    """Which of the images serves the volume: that of its own major version if there is one, else `postgres`."""
    versions = {cluster.version for cluster in state.clusters.values()}
    name = f"postgres-{versions.pop()}" if len(versions) == 1 else ""
    return name if images.get(name) else "postgres"


def decide(state: VolumeState, wanted: Wanted) -> Plan:
    """The plan for a volume, or Stop. Nothing has been written when Stop is raised."""
    _usable(state, wanted.data_dir)
    create: list[tuple[str, int, int]] = []
    postgres_place, postgres_owner = _postgres(state, wanted, create)
    s3_place, s3_owner = _s3(state, wanted, create)
    origin = str(state.stack.get("origin") or (LABCTL if state.secrets or not state.clusters else TUTORIAL))
    as_root = origin == TUTORIAL and wanted.s3_flavour != "rclone"
    return Plan(
        create=tuple(create),
        postgres_dir=f"{wanted.data_dir}/{postgres_place}",
        postgres_place=postgres_place,
        postgres_owner=postgres_owner,
        postgres_target=postgres_target(wanted.postgres_major),
        s3_dir=f"{wanted.data_dir}/{s3_place}",
        s3_place=s3_place,
        s3_owner=(0, 0) if as_root else s3_owner,
        origin=origin,
        adopt=_adoption(state, wanted.data_dir),
        new_cluster=not state.clusters,
        s3_as_root=as_root,
    )


def postgres_target(major: str) -> str:
    """Where the official image of a major version wants its data: from 18 on it refuses its former place."""
    return f"/var/lib/postgresql/{major}/docker" if major.isdigit() and int(major) >= 18 else "/var/lib/postgresql/data"


def _usable(state: VolumeState, base: str) -> None:
    """Stop unless a labctl volume that can be written to is mounted."""
    if not state.mounted or not state.marked:
        raise Stop(
            f"No labctl volume is mounted at {base}; no service is started on the root disk.",
            expected=f"a mount point at {base} with the directory .labctl in it",
            found="a mount without .labctl" if state.mounted else "no mount",
            next_step="mount the lab's volume: `labctl reattach-volume`, or `labctl converge --only block_volume`",
        )
    if state.read_only:
        raise Stop(
            f"The volume at {base} is mounted read-only; nothing is started on it.",
            expected="a volume that can be written to",
            found="read-only: by hand, or by the kernel after an error of the filesystem or the disk",
            next_step="look at `dmesg` on the server; if the disk is sound: `labctl drain`, then `labctl converge`",
        )
    if state.marker_problem:
        raise Stop(
            "The volume's marker doesn't say which data is the lab's.",
            expected=f"{base}/.labctl/volume.json as labctl wrote it",
            found=state.marker_problem,
            next_step="`labctl converge --only block_volume` writes a missing one; bring a damaged one back by hand",
        )


def _adoption(state: VolumeState, base: str) -> bool:
    """Whether this is a volume that somebody made without labctl, with a database whose credentials can be proved."""
    if state.secrets:
        return False
    if state.clusters:
        return True
    if state.minio.holds_data or state.rclone.holds_data:
        raise Stop(
            f"{base} holds objects, and neither the database that knows of them nor labctl's credentials.",
            expected=f"{base}/.labctl/secrets/secrets.json, or a PostgreSQL cluster in {base}/{POSTGRES_FOLDER}",
            found="objects only: another database was used, or it was removed",
            next_step="bring the database back, or move the objects out of the way and converge again",
        )
    return False


def _postgres(state: VolumeState, wanted: Wanted, create: list[tuple[str, int, int]]) -> tuple[str, tuple[int, int]]:
    """The cluster's directory, relative to the volume, and its owner."""
    where = f"{wanted.data_dir}/{POSTGRES_FOLDER}"
    if len(state.clusters) > 1:
        raise Stop(
            "There is more than one PostgreSQL cluster on the volume.",
            expected=f"one PG_VERSION below {where}",
            found=f"PG_VERSION in {_places(wanted.data_dir, state.clusters)}",
            next_step="move the ones that aren't the lab's out of postgres_data, then converge again",
        )
    if not state.clusters and state.postgres_pointer:
        raise Stop(
            "The database that the volume's marker names isn't there.",
            expected=f"PG_VERSION in {wanted.data_dir}/{state.postgres_pointer}",
            found="no readable PG_VERSION",
            next_step="bring the directory back, or restore a backup: `labctl restore`",
        )
    if not state.clusters:
        if state.postgres.holds_data:
            names = ", ".join(sorted(set(state.postgres.entries or ()) - NOT_DATA)[:5])
            raise Stop(
                f"{where} isn't empty and isn't a PostgreSQL cluster that can be recognised.",
                expected=f"nothing in it, or PG_VERSION in {where}, {where}/data or {where}/N/docker",
                found=f"{names}, and no readable PG_VERSION",
                next_step="move it aside if it isn't needed, then converge again",
            )
        create.append((POSTGRES_FOLDER, POSTGRES_UID, 0o700))
        return POSTGRES_FOLDER, (POSTGRES_UID, POSTGRES_UID)
    ((place, cluster),) = state.clusters.items()
    _fits(cluster.version, wanted.postgres_major, f"{wanted.data_dir}/{place}")
    _owned(cluster, f"{wanted.data_dir}/{place}")
    return place, cluster.owner


def _fits(version: str, image: str, directory: str) -> None:
    """Stop unless the image's major version is the cluster's."""
    if version and version == image:
        return
    if version.isdigit() and image.isdigit() and int(image) > int(version):
        step = (
            f"name an image of PostgreSQL {version} (lab.yaml: images.postgres, or leave it out for labctl's own; in"
            f" the sandbox: `labctl sandbox image postgres-{version}`); to move to PostgreSQL {image}:"
            " `labctl backup && labctl restore --into-new-major`"
        )
    elif version.isdigit():
        step = f"name an image of PostgreSQL {version}: lab.yaml: images.postgres, or leave it out for labctl's own"
    else:
        step = "restore PG_VERSION from a backup"
    raise Stop(
        "The PostgreSQL image doesn't fit the database on the volume; opening it could ruin it.",
        expected=f"PostgreSQL {version or 'of a readable version'} as {directory}/PG_VERSION says",
        found=f"an image with PostgreSQL {image or 'of unknown version'}",
        next_step=step,
    )


def _owned(cluster: Cluster, directory: str) -> None:
    """Stop where PostgreSQL would refuse its directory, or couldn't read all of it: labctl changes no owner or mode."""
    uid, gid = cluster.owner
    others = sorted(cluster.uids - {uid})
    if uid == 0 or others:
        raise Stop(
            f"{directory} belongs to {'root' if uid == 0 else 'several users'}, and PostgreSQL needs it for itself.",
            expected="one owner of the directory and all files in it, not root",
            found=f"the directory belongs to uid {uid}, files in it to {', '.join(map(str, others)) or uid}",
            next_step=f"give it to PostgreSQL's user by hand: `sudo chown -R {POSTGRES_UID}: {directory}`",
        )
    if cluster.mode & POSTGRES_FORBIDDEN_MODE:
        raise Stop(
            f"{directory} is open to others; PostgreSQL refuses to start on it.",
            expected="the mode 0700 or 0750",
            found=f"the mode {cluster.mode:04o}, owner {uid}:{gid}",
            next_step=f"`sudo chmod 0700 {directory}` on the server, then converge again",
        )


def _places(base: str, places: Iterable[str]) -> str:
    """Directories of the volume as paths, for a message."""
    return ", ".join(f"{base}/{place}" for place in sorted(places))


def _s3(state: VolumeState, wanted: Wanted, create: list[tuple[str, int, int]]) -> tuple[str, tuple[int, int]]:
    """The S3 server's folder, relative to the volume, and its owner."""
    folder = state.s3_pointer or S3_FOLDERS[wanted.s3_flavour]
    plain = wanted.s3_flavour == "rclone"
    here, other = (state.rclone, state.minio) if plain else (state.minio, state.rclone)
    if other.holds_data and not here.holds_data:
        other_name = state.s3_pointer or ("minio_data" if plain else "rclone_s3_data")
        raise Stop(
            f"The volume's objects were written by another kind of S3 server than {wanted.s3_flavour}.",
            expected=f"objects in {wanted.data_dir}/{S3_FOLDERS[wanted.s3_flavour]}, or none",
            found=f"objects in {wanted.data_dir}/{other_name} only: runs would look for their artifacts in vain",
            next_step="set mlflow_stack_s3_flavour and mlflow_stack_images.s3 to the kind that wrote them",
        )
    if not plain and state.minio.holds_data and state.minio_format not in S3_FORMATS:
        found = {None: "no .minio.sys/format.json", "": "a .minio.sys/format.json that can't be understood"}
        raise Stop(
            f"{wanted.data_dir}/{folder} is in a format that the S3 server doesn't open.",
            expected=f"nothing in it, or .minio.sys/format.json with the format {' or '.join(S3_FORMATS)}",
            found=found.get(state.minio_format) or f"the format {state.minio_format}",
            next_step="copy the objects out with a server of the time that wrote them, and in again through this one",
        )
    if not here.holds_data or here.owner is None:
        if state.s3_pointer and here.entries is None:
            raise Stop(
                "The objects that the volume's marker names aren't there.",
                expected=f"the directory {wanted.data_dir}/{folder}",
                found="none",
                next_step="bring the directory back, or restore a backup: `labctl restore`",
            )
        create.append((folder, S3_UID, 0o750))
        return folder, (S3_UID, S3_UID)
    return folder, here.owner


# -- MLflow's schema -----------------------------------------------------------------------------------------------

START, UPGRADE = "start", "upgrade"


@dataclass(frozen=True)
class Schema:
    """What a database says of MLflow's schema: the revisions in alembic_version, and whether there are runs."""

    revisions: tuple[str, ...] = ()
    has_runs: bool = False


@dataclass(frozen=True)
class Known:
    """What an MLflow image knows: its version, the newest revision, and all that it can upgrade from."""

    version: str
    head: str
    revisions: frozenset[str]


def decide_schema(found: Schema, image: Known) -> str:
    """START or UPGRADE for a database and an image of MLflow, or Stop."""
    if not found.revisions and not found.has_runs:
        return START  # MLflow makes its tables in an empty database, also in one where it was cut off while it did
    if len(found.revisions) != 1:
        raise Stop(
            "The database holds MLflow's runs, and doesn't say which version of MLflow wrote them.",
            expected="one row in the table alembic_version",
            found=", ".join(found.revisions) or "none",
            next_step="restore a backup: `labctl restore`",
        )
    (revision,) = found.revisions
    if revision == image.head:
        return START
    if revision in image.revisions:
        return UPGRADE
    raise Stop(
        "The database was written by a newer MLflow than the image; there is no way back from a newer schema.",
        expected=f"a revision that MLflow {image.version} knows (its newest is {image.head})",
        found=f"the revision {revision}",
        next_step="name an image of that newer MLflow (lab.yaml: images.mlflow), or restore a backup from before it",
    )
