"""Extract: download the archive, prove that it is the one described and that nothing in it leads elsewhere, unpack it.

Arguments: the dataset's description (JSON), the staging directory. The last line of output is JSON: archive_sha256,
archive_bytes. Anything odd ends here, before a byte is unpacked and long before the load.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import sys
import time
import urllib.error
import urllib.request
import zipfile

CHUNK = 1 << 20
#: Seconds without a byte from the server until an attempt counts as failed, and attempts in all.
TIMEOUT, ATTEMPTS = 60, 3
#: A tenth of the disk stays free: the same disk holds Docker.
KEEP_FREE = 0.1


class Bad(Exception):
    """The archive isn't what it should be."""


def download(url, path):
    """Fetch url into path. Returns (SHA-256, bytes). OSError after the last attempt."""
    for attempt in range(1, ATTEMPTS + 1):
        digest, size = hashlib.sha256(), 0
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, open(path, "wb") as file:
                announced = answer.headers.get("Content-Length")
                while block := answer.read(CHUNK):
                    digest.update(block)
                    size += len(block)
                    file.write(block)
            if announced and int(announced) != size:
                raise OSError(f"the server announced {announced} bytes and sent {size}")
            return digest.hexdigest(), size
        except OSError as error:
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if refused or attempt == ATTEMPTS:
                raise
            print(f"attempt {attempt} of {ATTEMPTS}: {error}", flush=True)
            time.sleep(2**attempt)
    raise AssertionError("unreachable")


def inspect(archive, free):
    """Refuse an archive with an entry that would land, or point, outside the staging directory. Bad names the entry."""
    seen, total = set(), 0
    for entry in archive.infolist():
        # The name as it is in the file: zipfile's own has been cut at a NUL, and its separators may be changed.
        name = entry.orig_filename
        parts = name.rstrip("/").split("/")
        if name.startswith(("/", "\\")) or name[1:2] == ":" or "\\" in name or "\0" in name:
            raise Bad(f"the entry {name!r} has an absolute or foreign name")
        if any(part in ("", ".", "..") for part in parts):
            raise Bad(f"the entry {name!r} leads out of the archive's own folder")
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise Bad(f"the entry {name!r} is a symbolic link or a special file")
        if entry.flag_bits & 1:
            raise Bad(f"the entry {name!r} is encrypted")
        if not entry.is_dir():
            if name in seen:
                raise Bad(f"the entry {name!r} is there twice")
            seen.add(name)
            total += entry.file_size
    if not seen:
        raise Bad("the archive holds no file")
    if total > free:
        raise Bad(f"unpacked it takes {total} bytes, and {free} are free for it")


def unpack(archive, directory):
    """Write the files, with the archive's times, so that a second load finds the same."""
    for entry in archive.infolist():
        archive.extract(entry, directory)
        if not entry.is_dir():
            with contextlib.suppress(ValueError, OverflowError):
                then = time.mktime((*entry.date_time, 0, 0, -1))
                os.utime(os.path.join(directory, entry.filename), (then, then))


def main():
    """Download, check, unpack."""
    with open(sys.argv[1], encoding="utf-8") as file:
        dataset = json.load(file)
    staging = sys.argv[2]
    path, target = os.path.join(staging, "archive.zip"), os.path.join(staging, "unpacked")
    try:
        digest, size = download(dataset["url"], path)
        if dataset["sha256"] and digest != dataset["sha256"]:
            raise Bad(f"its SHA-256 is {digest}, and the dataset's description says {dataset['sha256']}")
        with zipfile.ZipFile(path) as archive:
            disk = shutil.disk_usage(staging)
            inspect(archive, disk.free - int(disk.total * KEEP_FREE))
            unpack(archive, target)
    except (Bad, zipfile.BadZipFile, NotImplementedError) as error:
        sys.exit(f"The archive at {dataset['url']} is refused: {error}. Nothing was loaded.")
    except OSError as error:
        sys.exit(f"{dataset['url']} can't be fetched or unpacked: {error}. Nothing was loaded.")
    os.unlink(path)
    print(json.dumps({"archive_sha256": digest, "archive_bytes": size}))


if __name__ == "__main__":
    main()
