"""What may run on a volume: a pure decision over what was read from it, made before any container starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

#: Where a PostgreSQL image may have put its cluster below postgres_data: the tutorial's place, one that images with a
#: PGDATA of their own use, and the official image's from version 18 on.
POSTGRES_PLACES = ("", "data", "18/docker")
#: The uid of the official PostgreSQL image; a new data directory gets it.
POSTGRES_UID = 999
#: The uid that the S3 server of a new volume runs as.
S3_UID = 10001
#: Each S3 flavour's folder on the volume. MinIO and silo share a format; rclone keeps plain files.
S3_FOLDERS = {"minio": "minio_data", "silo": "minio_data", "rclone": "rclone_s3_data"}
#: `format` in .minio.sys/format.json of what today's servers open; `fs` is MinIO's older layout, which they refuse.
S3_FORMATS = ("xl-single",)
#: What mkfs leaves in the root of a filesystem; no sign of data.
NOT_DATA = frozenset(["lost+found"])


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
class VolumeState:
    """Everything that was read from the volume. Unreadable files are `None` in their folder's presence: unknown."""

    mounted: bool = False
    marked: bool = False
    postgres: Folder = field(default_factory=Folder)
    #: PG_VERSION's text by place (one of POSTGRES_PLACES), with the owner of the directory that holds it.
    postgres_versions: dict[str, tuple[str, tuple[int, int]]] = field(default_factory=dict)
    minio: Folder = field(default_factory=Folder)
    #: `format` of format.json; "" where the file can't be read or understood.
    minio_format: str | None = None
    rclone: Folder = field(default_factory=Folder)
    secrets: bool = False


@dataclass(frozen=True)
class Wanted:
    """What should run: the major version of the PostgreSQL image ("" if it doesn't say) and the S3 flavour."""

    data_dir: str
    postgres_major: str
    s3_flavour: str


@dataclass(frozen=True)
class Plan:
    """What to make (path below the data directory, uid, mode) and what to run on."""

    create: tuple[tuple[str, int, int], ...]
    postgres_dir: str
    postgres_owner: tuple[int, int]
    s3_dir: str
    s3_owner: tuple[int, int]


class Stop(Exception):
    """Starting would put data at risk: what was expected, what was found, what to do."""

    def __init__(self, msg: str, expected: str, found: str, next_step: str) -> None:
        super().__init__(msg)
        self.facts = {"msg": msg, "expected": expected, "found": found, "next_step": next_step}


def decide(state: VolumeState, wanted: Wanted) -> Plan:
    """The plan for a volume, or Stop. Nothing has been written when Stop is raised."""
    base = wanted.data_dir
    if not state.mounted or not state.marked:
        raise Stop(
            f"No labctl volume is mounted at {base}; no service is started on the root disk.",
            expected=f"a mount point at {base} with the directory .labctl in it",
            found="a mount without .labctl" if state.mounted else "no mount",
            next_step="mount the lab's volume: `labctl reattach-volume`, or `labctl converge --only block_volume`",
        )
    create: list[tuple[str, int, int]] = []
    postgres_place, postgres_owner = _postgres(state, wanted, create)
    s3_folder, s3_owner = _s3(state, wanted, create)
    if not state.secrets and (state.postgres_versions or state.minio_format is not None or state.rclone.holds_data):
        raise Stop(
            f"{base} holds databases or objects, and not the credentials that they were made with.",
            expected=f"{base}/.labctl/secrets/secrets.json, which labctl writes before it starts a service",
            found="no such file: the data was made by hand or by the tutorial's commands, or the file was removed",
            next_step="bring the file back; to take over a volume that the tutorial made, see the README on adoption",
        )
    return Plan(
        create=tuple(create),
        postgres_dir="/".join(part for part in (base, "postgres_data", postgres_place) if part),
        postgres_owner=postgres_owner,
        s3_dir=f"{base}/{s3_folder}",
        s3_owner=s3_owner,
    )


def _postgres(state: VolumeState, wanted: Wanted, create: list[tuple[str, int, int]]) -> tuple[str, tuple[int, int]]:
    """The place of the cluster below postgres_data, and its owner."""
    where = f"{wanted.data_dir}/postgres_data"
    if len(state.postgres_versions) > 1:
        raise Stop(
            "There is more than one PostgreSQL cluster on the volume.",
            expected=f"one PG_VERSION below {where}",
            found=f"PG_VERSION in {_places(where, state.postgres_versions)}",
            next_step="move the ones that aren't the lab's out of postgres_data, then converge again",
        )
    if not state.postgres_versions:
        if state.postgres.holds_data:
            names = ", ".join(sorted(set(state.postgres.entries or ()) - NOT_DATA)[:5])
            raise Stop(
                f"{where} isn't empty and isn't a PostgreSQL cluster that can be recognised.",
                expected=f"nothing in it, or PG_VERSION in {_places(where, POSTGRES_PLACES)}",
                found=f"{names}, and no readable PG_VERSION",
                next_step="move it aside if it isn't needed, then converge again",
            )
        create.append(("postgres_data", POSTGRES_UID, 0o700))
        return "", (POSTGRES_UID, POSTGRES_UID)
    ((place, (version, owner)),) = state.postgres_versions.items()
    if version != wanted.postgres_major:
        raise Stop(
            "The PostgreSQL image doesn't fit the database on the volume; opening it could ruin it.",
            expected=f"PostgreSQL {version or 'of a readable version'} as {where}/{place}".rstrip("/")
            + "/PG_VERSION says",
            found=f"an image with PostgreSQL {wanted.postgres_major or 'of unknown version'}",
            next_step=f"set mlflow_stack_images.postgres to an image of PostgreSQL {version}"
            if version
            else "restore PG_VERSION from a backup",
        )
    return place, owner


def _places(where: str, places: Iterable[str]) -> str:
    """Places below postgres_data as paths, for a message."""
    return ", ".join(f"{where}/{place}".rstrip("/") for place in sorted(places))


def _s3(state: VolumeState, wanted: Wanted, create: list[tuple[str, int, int]]) -> tuple[str, tuple[int, int]]:
    """The S3 server's folder and its owner."""
    folder = S3_FOLDERS[wanted.s3_flavour]
    minio_has_objects = state.minio.holds_data
    if folder == "minio_data":
        other, other_name, here = state.rclone.holds_data, "rclone_s3_data", state.minio
    else:
        other, other_name, here = minio_has_objects, "minio_data", state.rclone
    if other and not here.holds_data:
        raise Stop(
            f"The volume's objects were written by another kind of S3 server than {wanted.s3_flavour}.",
            expected=f"objects in {wanted.data_dir}/{folder}, or none",
            found=f"objects in {wanted.data_dir}/{other_name} only: runs would look for their artifacts in vain",
            next_step="set mlflow_stack_s3_flavour and mlflow_stack_images.s3 to the kind that wrote them",
        )
    if folder == "minio_data" and minio_has_objects and state.minio_format not in S3_FORMATS:
        found = {None: "no .minio.sys/format.json", "": "a .minio.sys/format.json that can't be understood"}
        raise Stop(
            f"{wanted.data_dir}/minio_data is in a format that the S3 server doesn't open.",
            expected=f"nothing in it, or .minio.sys/format.json with the format {' or '.join(S3_FORMATS)}",
            found=found.get(state.minio_format) or f"the format {state.minio_format}",
            next_step="copy the objects out with a server of the time that wrote them, and in again through this one",
        )
    if not here.holds_data or here.owner is None:
        create.append((folder, S3_UID, 0o750))
        return folder, (S3_UID, S3_UID)
    return folder, here.owner
