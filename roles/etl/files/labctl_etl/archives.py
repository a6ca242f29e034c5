"""Which kind of archive a URL names, by its first bytes, and how it is read: in one pass, by ranges, or spooled."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from labctl_etl import fetch
from labctl_etl.model import Dataset
from labctl_etl.sources import Source
from labctl_etl.tar_archive import Tar
from labctl_etl.zip_archive import Zip

SPOOL = "/var/lib/labctl/etl"
ZIP_MAGIC = b"PK"


class Known(Exception):
    """The source is one that the caller has already; it need not be read."""


def archive(described: Dataset, is_known: Callable[[dict[str, Any]], bool]) -> Source:
    """The archive that `url` names, by its first bytes. The caller closes it.

    Raises Known instead of reading all of an archive of which its server's word is enough.
    """
    if path := fetch.local_path(described.url):
        return _local(described, path, {})
    remote = fetch.Remote(described.url)
    extra = remote.validators()
    if described.sha256:
        extra["sha256"] = described.sha256
    if not remote.ranges:
        if extra and is_known({**extra, "bytes": remote.size}):
            raise Known
        return _without_ranges(described, remote, extra)
    with remote.open(0, 4) as answer:
        head = answer.read(4)
    stream = fetch.Stream(remote)
    if head.startswith(ZIP_MAGIC):
        return Zip(described, fetch.Seekable(remote), stream, remote.size, extra)
    return Tar(described, stream, remote.size, extra)


def _without_ranges(described: Dataset, remote: fetch.Remote, extra: dict[str, Any]) -> Source:
    """A zip's directory is at its end: it has to be on the disk first. A tar isn't asked for twice either way."""
    stream = fetch.Stream(remote)
    head = stream.read(4)
    stream.close()
    if not head.startswith(ZIP_MAGIC):
        return Tar(described, fetch.Stream(remote), remote.size, extra)
    path = fetch.spool(remote, SPOOL)
    try:
        return _local(described, path, extra)
    finally:
        os.unlink(path)  # the open file stays readable, and goes with the process


def _local(described: Dataset, path: str, extra: dict[str, Any]) -> Source:
    stream = fetch.File(path)
    found = os.stat(path)
    extra = extra or {"modified": str(found.st_mtime_ns)}
    with open(path, "rb") as file:
        if file.read(2) == ZIP_MAGIC:
            return Zip(described, open(path, "rb"), stream, found.st_size, extra)
    return Tar(described, stream, found.st_size, extra)
