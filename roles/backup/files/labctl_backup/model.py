"""What a backup set is: its name, its manifest and its contents, and how each proves that it is whole.

In the container:
    objects/<aa>/<sha256>             every object and file once, whatever names it has
    sets/<id>/postgres.dump           pg_dump's custom format
    sets/<id>/secrets.json.bin        encrypted by rclone crypt
    sets/<id>/volume.json             the volume's marker
    sets/<id>/contents.json.gz        which name has which hash
    sets/<id>/manifest.json           written last: without it the set was cut off
    lease.json                        whose backup is running
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FORMAT = 1
SETS, OBJECTS, MANIFEST, CONTENTS = "sets", "objects", "manifest.json", "contents.json.gz"
DUMP, SECRETS, VOLUME, LEASE = "postgres.dump", "secrets.json.bin", "volume.json", "lease.json"
SET_ID = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{6}")
SHA256 = re.compile(r"[0-9a-f]{64}")
STAMP = "%Y%m%dT%H%M%SZ"


class Damaged(Exception):
    """A manifest or contents file isn't what was written once; the text says in which way."""


def new_set_id(now: float) -> str:
    """A name that sorts by time and never meets another."""
    return f"{time.strftime(STAMP, time.gmtime(now))}-{secrets.token_hex(3)}"


def set_time(set_id: str) -> float:
    """Seconds since the epoch at which the set was begun."""
    import calendar

    return float(calendar.timegm(time.strptime(set_id.partition("-")[0], STAMP)))


def iso(seconds: float) -> str:
    """A time as ISO 8601 in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def object_path(sha256: str) -> str:
    """Where an object lies in the container."""
    return f"{OBJECTS}/{sha256[:2]}/{sha256}"


def key_id(key: str) -> str:
    """The name of a backup key: says which key it is, and nothing of the key."""
    return hashlib.sha256(b"labctl backup key\0" + key.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Stored:
    """One object of the container: bytes and MD5 ("" where the store doesn't say)."""

    size: int
    md5: str = ""

    def fits(self, known: Stored) -> bool:
        """Whether this is what is known of the object."""
        return self.size == known.size and (not self.md5 or not known.md5 or self.md5 == known.md5)


@dataclass(frozen=True)
class S3Object:
    """An object of the S3 server as it was read: `modified` and `etag` are what its listing said."""

    bucket: str
    key: str
    size: int
    modified: str
    etag: str
    sha256: str = ""

    def same_version(self, other: S3Object | None) -> bool:
        """Whether the listing says that nothing was written since."""
        if other is None:
            return False
        return (self.size, self.modified, self.etag) == (other.size, other.modified, other.etag)


@dataclass(frozen=True)
class WorkspaceEntry:
    """A file, folder or symbolic link of the workspace; `path` is relative to it. `changed` is ctime in ns."""

    path: str
    kind: str  # file, folder, link
    mode: int
    uid: int
    gid: int
    modified: int  # ns
    changed: int = 0  # ns
    size: int = 0
    sha256: str = ""
    target: str = ""

    def same_version(self, other: WorkspaceEntry | None) -> bool:
        """Whether a file can't have been written since."""
        if other is None or other.kind != self.kind:
            return False
        return (self.size, self.modified, self.changed) == (other.size, other.modified, other.changed)


@dataclass
class Contents:
    """Which names have which content. `objects` says of every hash how many bytes and which MD5 it has."""

    objects: dict[str, Stored] = field(default_factory=dict)
    s3: list[S3Object] = field(default_factory=list)
    workspace: list[WorkspaceEntry] = field(default_factory=list)

    def pack(self) -> bytes:
        """As a file. The same contents give the same bytes."""
        document = {
            "objects": {sha: [one.size, one.md5] for sha, one in sorted(self.objects.items())},
            "s3": [[o.bucket, o.key, o.size, o.modified, o.etag, o.sha256] for o in self.s3],
            "workspace": [vars(entry) for entry in self.workspace],
        }
        return gzip.compress(json.dumps(document, separators=(",", ":")).encode(), mtime=0)

    @staticmethod
    def unpack(data: bytes) -> Contents:
        """From a file. Damaged if it isn't one, or names an object that it doesn't describe."""
        try:
            document = json.loads(gzip.decompress(data))
            found = Contents(
                {sha: Stored(int(size), str(md5)) for sha, (size, md5) in document["objects"].items()},
                [S3Object(*row) for row in document["s3"]],
                [WorkspaceEntry(**row) for row in document["workspace"]],
            )
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"{CONTENTS} can't be read ({type(error).__name__})") from None
        named = {o.sha256 for o in found.s3} | {e.sha256 for e in found.workspace if e.kind == "file"}
        if not all(SHA256.fullmatch(sha) for sha in found.objects) or not named <= found.objects.keys():
            raise Damaged(f"{CONTENTS} names objects that it doesn't describe")
        return found


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with its own checksum."""
    return {**manifest, "checksum": _checksum(manifest)}


def _checksum(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(data: bytes, set_id: str) -> dict[str, Any]:
    """A set's manifest. Damaged if a byte differs from what was written, or if it is another set's."""
    try:
        manifest = json.loads(data)
    except ValueError:
        raise Damaged(f"{MANIFEST} isn't JSON") from None
    if not isinstance(manifest, dict) or manifest.get("checksum") != _checksum(manifest):
        raise Damaged(f"{MANIFEST} doesn't match its own checksum")
    if manifest.get("format") != FORMAT:
        raise Damaged(f"{MANIFEST} has format {manifest.get('format')}, this labctl reads {FORMAT}")
    if manifest.get("id") != set_id:
        raise Damaged(f"{MANIFEST} is that of set {manifest.get('id')}")
    if not {DUMP, CONTENTS} <= set(manifest.get("files", {})):
        raise Damaged(f"{MANIFEST} lacks a file of the set")
    return manifest
