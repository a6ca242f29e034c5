"""The commented lab.yaml that `labctl init` writes."""

from __future__ import annotations

import getpass
import os
import re
import tempfile
from pathlib import Path

from labctl import lab
from labctl.errors import ConfigError

TEXT = """\
# A lab of labctl. Every key but `lab` can be left out; what stands here are the defaults.
# labctl up brings it up, labctl status shows it, labctl rebuild replaces the VM and keeps the data.

lab: {lab}                # names everything: node-persist-{lab}, block-persist-{lab}, object-persist-{lab}
site: {site}              # sandbox, chameleon, or an entry of clouds.yaml

# cloud:                  # what the site is logged into with, if not by $OS_CLOUD or the environment
#   credentials: ~/kvm-openrc.sh           # files as Horizon hands them out (chmod 600), one for each site
#   object_credentials: ~/chi-openrc.sh

server:
  image: CC-Ubuntu24.04
  flavor: m1.large
  # name: node-persist-{lab}
  # availability_zone: nova         # where the volume lies in another one than the site's servers usually do
  # ssh_key: ~/.ssh/id_ed25519      # a private key; default: one that labctl makes for you

# lease:                  # on sites that have leases, such as KVM@TACC: how long a new one lasts
#   days: 7
#   hours: 0
#   name: my-lease        # one that you made yourself, instead of one that labctl makes

volume:
  size_gib: 2             # GiB; counts when the volume is made
  mount_point: /mnt/block
  # name: block-persist-{lab}
  # credentials_file: old.env       # a volume made by hand with other passwords than the tutorial's: its compose .env

object_store:
  mount_point: /mnt/object
  # container: object-persist-{lab}
  # layout: packed        # a dataset as filesystem images: ten times as fast; files: an object an image
  # dialect: auto         # swift (application credential) or s3 (EC2 key); auto: what the site allows
  # credentials_file: app-cred-openrc.sh   # one made by hand for the server, where labctl may make none; mode 0600

access:
  ssh_from: [0.0.0.0/0]   # networks that may log in (keys only)
  services_from: []       # networks that may reach the services; [] = only through labctl tunnel

services:
  mlflow_port: 8000
  s3_port: 9000
  s3_console_port: 9001
  jupyter_port: 8888

dataset: food11           # or a set of your own:
# dataset:
#   name: my-set
#   url: https://example.org/my-set.zip
#   sha256: ...           # of the archive (zip, tar, tar.gz or tar.zst)
#   splits: [training, evaluation]
#   class_rule: folder    # or prefix (<number>_ before a file's name), or csv with labels: FILE
"""


def default_name() -> str:
    """A lab name made of the user's name."""
    return re.sub(r"[^a-z0-9-]+", "-", getpass.getuser().lower()).strip("-")[:48] or "lab"


def write(path: Path, name: str, site: str) -> Path:
    """Write a lab.yaml and check it as any other. Raises ConfigError if the file exists or a value isn't allowed."""
    return write_text(path, TEXT.format(lab=name or default_name(), site=site), "NAME or --site")


def write_text(path: Path, text: str, source: str) -> Path:
    """Write a lab.yaml that isn't there yet, checked as any other. Raises ConfigError as `write` does."""
    if path.exists():
        raise ConfigError(
            f"{path} exists and was left as it is.", source=str(path), next_step="edit it, or --lab OTHER labctl init"
        )
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    try:
        lab.load(draft)
        draft.rename(path)
    except ConfigError as error:
        raise ConfigError(
            error.what.replace(f"{draft}", f"{path}"),
            error.expected,
            error.found,
            source,
            "labctl init --help",
        ) from None
    finally:
        draft.unlink(missing_ok=True)
    return path


def validated(text: str, source: str) -> lab.Lab:
    """The lab that a lab.yaml of this text describes. Raises ConfigError; nothing stays on the disk."""
    with tempfile.TemporaryDirectory(prefix="labctl-") as folder:
        draft = Path(folder) / "lab.yaml"
        draft.write_text(text, encoding="utf-8")
        try:
            return lab.load(draft)
        except ConfigError as error:
            error.what, error.source = error.what.replace(f"{draft}", source), source
            raise
