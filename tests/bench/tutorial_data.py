"""The tutorial's way to load Food-11 and to mount the object store: its compose file's stages, its rclone commands.

Its images come from Docker Hub and its archive from Box; here the images are the site's own and the URL a local one.
"""

from __future__ import annotations

from collections.abc import Mapping

MOUNT = "/mnt/tutorial"
CONF = "/srv/bench/rclone.conf"
FLAGS = "--transfers=32 --checkers=16 --multi-thread-streams=4 --fast-list"
#: The tutorial's transform: files `<i>_*` of each split into `class_<ii>`.
TRANSFORM = """
import os, shutil
for split in ("training", "validation", "evaluation"):
    folder = os.path.join("/data/Food-11", split)
    for i in range(11):
        os.makedirs(os.path.join(folder, f"class_{i:02d}"), exist_ok=True)
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            shutil.move(path, os.path.join(folder, f"class_{int(name.split('_')[0]):02d}", name))
"""
#: The same tree for the loads that measure nothing else: arguments are the URL and where.
UNPACK = """
import io, os, sys, urllib.request, zipfile
archive = zipfile.ZipFile(io.BytesIO(urllib.request.urlopen(sys.argv[1]).read()))
for name in archive.namelist():
    if name.endswith(".jpg"):
        split, file = name.split("/")
        folder = os.path.join(sys.argv[2], split, f"class_{int(file.split('_')[0]):02d}")
        os.makedirs(folder, exist_ok=True)
        open(os.path.join(folder, file), "wb").write(archive.read(name))
"""
#: curl and unzip in the tutorial; the site's python image has neither, and this is no slower.
EXTRACT = """
import os, shutil, urllib.request, zipfile
os.makedirs("/data/Food-11", exist_ok=True)
with urllib.request.urlopen("{url}") as source, open("/data/{archive}", "wb") as target:
    shutil.copyfileobj(source, target, 1 << 20)
zipfile.ZipFile("/data/{archive}").extractall("/data/Food-11")
os.unlink("/data/{archive}")
"""


def indented(program: str) -> str:
    """A program as it stands in the compose file."""
    return "\n".join(f"        {line}" for line in program.strip().splitlines())


def compose(url: str, archive: str, container: str, images: Mapping[str, str]) -> str:
    """The tutorial's docker-compose-etl.yaml."""
    return f"""\
name: food11-etl
volumes: {{food11: }}
services:
  extract-data:
    image: {images["python"]}
    volumes: [food11:/data]
    command:
      - python3
      - -c
      - |
{indented(EXTRACT.format(url=url, archive=archive))}
  transform-data:
    image: {images["python"]}
    volumes: [food11:/data]
    command:
      - python3
      - -c
      - |
{indented(TRANSFORM)}
  load-data:
    image: {images["rclone"]}
    volumes: ["food11:/data", "{CONF}:/root/.config/rclone/rclone.conf:ro"]
    entrypoint: /bin/sh
    command:
      - -c
      - |
        rclone delete chi_tacc:{container} --rmdirs
        rclone copy /data/Food-11 chi_tacc:{container} {FLAGS}
"""


def etl() -> str:
    """The three stages one after the other, then the staging volume removed."""
    run = "docker compose -f docker-compose-etl.yaml run --rm -T"
    stages = " && ".join(f"{run} {stage}" for stage in ("extract-data", "transform-data", "load-data"))
    return f"{stages} && docker volume rm food11-etl_food11"


def load(image: str, tree: str, container: str, *, keep: bool = False) -> str:
    """The load stage alone, of a tree that is ready. `keep`: without the deletion before it."""
    delete = "" if keep else f"rclone delete chi_tacc:{container} --rmdirs;"
    mounts = f"-v {tree}:/data:ro -v {CONF}:/root/.config/rclone/rclone.conf:ro"
    copy = f"rclone copy /data chi_tacc:{container} {FLAGS}"
    return f"docker run --rm {mounts} --entrypoint /bin/sh {image} -c '{delete} {copy}'"


def mount(container: str) -> str:
    """The tutorial's mount."""
    return (
        f"mkdir -p {MOUNT}; rclone --config {CONF} mount chi_tacc:{container} {MOUNT}"
        " --read-only --allow-other --daemon </dev/null >/dev/null 2>&1"
    )


def unmount() -> str:
    """And its end."""
    return f"fusermount3 -u {MOUNT}"
