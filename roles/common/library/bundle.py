#!/usr/bin/python
"""One remote task for the directories, files, lines, group memberships and units of a role."""

from __future__ import annotations

DOCUMENTATION = r"""
module: bundle
short_description: Bring directories, files, lines, groups and systemd units to a wanted state in one task
description:
  - Computes everything that differs, shows it as a diff, and applies it unless in check mode.
  - Files are replaced by a rename in their own directory, so that a reader never sees half of one.
  - Nothing is recursive, and only plain files are ever removed.
options:
  directories:
    description: Directories to exist; C(mode), C(owner) and C(group) are those of the directory itself.
    type: list
    elements: dict
    default: []
    suboptions:
      path: {description: Absolute path., type: path, required: true}
      mode: {description: Octal mode., type: str, default: "0755"}
      owner: {description: User name or id., type: str, default: root}
      group: {description: Group name or id., type: str, default: root}
  files:
    description: Files to have this content.
    type: list
    elements: dict
    default: []
    suboptions:
      path: {description: Absolute path., type: path, required: true}
      content: {description: The whole content., type: str, required: true}
      mode: {description: Octal mode., type: str, default: "0644"}
      owner: {description: User name or id., type: str, default: root}
      group: {description: Group name or id., type: str, default: root}
      sensitive: {description: Hide the content from the diff., type: bool, default: false}
      create_only: {description: Leave a file that exists as it is., type: bool, default: false}
  absent:
    description: Plain files that must not exist.
    type: list
    elements: path
    default: []
  lines:
    description: Lines that a file must hold; C(regexp) names the line to replace.
    type: list
    elements: dict
    default: []
    suboptions:
      path: {description: Absolute path., type: path, required: true}
      line: {description: The line without its end., type: str, required: true}
      regexp: {description: The last line that matches is replaced., type: str}
  users_in_groups:
    description: Group memberships to add; none is ever taken away.
    type: list
    elements: dict
    default: []
    suboptions:
      user: {description: User name., type: str, required: true}
      groups: {description: Group names., type: list, elements: str, required: true}
  units:
    description: systemd units and the state they should be in, in the order given; those to be stopped before all else.
    type: list
    elements: dict
    default: []
    suboptions:
      name: {description: Name with its suffix., type: str, required: true}
      enabled: {description: Start at boot. Left as it is if omitted., type: bool}
      state:
        description: Wanted state.
        type: str
        choices: [started, stopped, unmanaged]
        default: unmanaged
      restart_when:
        description: Paths of this bundle whose change restarts the unit.
        type: list
        elements: path
        default: []
author: labctl
attributes:
  check_mode: {support: full, description: Predicts.}
  diff_mode: {support: full, description: Shows what would differ.}
"""

EXAMPLES = r"""
- name: Configure | Docker
  bundle:
    files:
      - path: /etc/docker/daemon.json
        content: "{{ lookup('template', 'daemon.json.j2') }}"
    users_in_groups:
      - {user: cc, groups: [docker]}
    units:
      - {name: docker.service, enabled: true, state: started, restart_when: [/etc/docker/daemon.json]}
"""

RETURN = r"""
changed_paths:
  description: Paths that differed.
  type: list
  returned: always
restarted:
  description: Units that were restarted, or would be.
  type: list
  returned: always
"""

import grp
import os
import pwd
import re
import stat
import subprocess
import tempfile
from typing import Any

from ansible.module_utils.basic import AnsibleModule

UNIT_DIRECTORY = re.compile(r"^(/etc|/usr/lib|/lib|/run)/systemd/system/")


#: A dictionary of the module's arguments.
Item = dict[str, Any]
#: (mode, uid, gid)
Attributes = tuple[int, int, int]


class Refused(Exception):
    """What is on the host isn't what the bundle may change."""


def user_id(name: str) -> int | None:
    """The numeric id of a user, or None where there is no such user yet."""
    if name.isdigit():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


def group_id(name: str) -> int | None:
    """The numeric id of a group, or None where there is no such group yet."""
    if name.isdigit():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def attributes(path: str) -> Attributes | None:
    """(mode, uid, gid) of what is at path, or None."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid


def wanted_attributes(item: Item) -> tuple[int, int | None, int | None]:
    """(mode, uid, gid) that item asks for."""
    return int(item["mode"], 8), user_id(item["owner"]), group_id(item["group"])


def read(path: str) -> str | None:
    """The text of a file, or None where there is none."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as handle:
            return handle.read()
    except FileNotFoundError:
        return None


def describe(attrs: tuple[int, int | None, int | None] | None) -> str:
    """A line for a diff."""
    return "absent" if attrs is None else "mode={:04o} owner={} group={}".format(*attrs)


def set_attributes(target: str | int, attrs: tuple[int, int | None, int | None], item: Item) -> None:
    """Apply mode and ownership to an open descriptor or a path that was just made or checked."""
    mode, uid, gid = attrs
    for what, name, number in (("user", item["owner"], uid), ("group", item["group"], gid)):
        if number is None:
            raise Refused(f"{item['path']}: there is no {what} {name}")
    assert uid is not None and gid is not None
    os.chown(target, uid, gid)
    os.chmod(target, mode)


def write(path: str, content: str, attrs: tuple[int, int | None, int | None], item: Item) -> None:
    """Replace a file by a rename within its directory, durable before it is visible."""
    directory = os.path.dirname(path)
    descriptor, temporary = tempfile.mkstemp(prefix=".labctl-", dir=directory)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape") as handle:
            set_attributes(handle.fileno(), attrs, item)
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class Bundle:
    """Collects what differs and applies it piece by piece."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.check = module.check_mode
        self.diffs: list[dict[str, str]] = []
        self.changed_paths: list[str] = []
        self.restarted: list[str] = []

    def differs(self, path: str, before: str, after: str, sensitive: bool = False) -> None:
        """Record a difference of a path."""
        if path not in self.changed_paths:
            self.changed_paths.append(path)
        if sensitive:
            before, after = "(hidden)\n", "(hidden, changed)\n"
        self.diffs.append({"before_header": path, "after_header": path, "before": before, "after": after})

    def directory(self, item: Item) -> None:
        """Make a directory, or set its own attributes; what is in it stays as it is."""
        path = item["path"]
        found, wanted = attributes(path), wanted_attributes(item)
        if found is not None and not os.path.isdir(path):
            raise Refused(f"{path} exists and is not a directory")
        if found == wanted:
            return
        self.differs(path, describe(found) + "\n", describe(wanted) + "\n")
        if self.check:
            return
        if found is None:
            os.makedirs(path)
        set_attributes(path, wanted, item)

    def file(self, item: Item) -> None:
        """Bring a file's content and attributes to the wanted ones."""
        path, content = item["path"], item["content"]
        found, wanted = attributes(path), wanted_attributes(item)
        if found is not None and not os.path.isfile(path):
            raise Refused(f"{path} exists and is not a file")
        if found is not None and item["create_only"]:
            return
        before = read(path)
        if before == content and found == wanted:
            return
        if before != content:
            self.differs(path, before or "", content, item["sensitive"])
        else:
            self.differs(path, describe(found) + "\n", describe(wanted) + "\n")
        if not self.check:
            if not os.path.isdir(os.path.dirname(path)):
                raise Refused(f"{os.path.dirname(path)} is missing: name it under directories")
            write(path, content, wanted, item)

    def line(self, item: Item) -> None:
        """Make sure that a file holds a line, in place of the last one that regexp matches."""
        path, line = item["path"], item["line"]
        before = read(path)
        lines = (before or "").splitlines()
        if line in lines:
            return
        places = [n for n, text in enumerate(lines) if item["regexp"] and re.search(item["regexp"], text)]
        if places:
            lines[places[-1]] = line
        else:
            lines.append(line)
        after = "\n".join(lines) + "\n"
        self.differs(path, before or "", after)
        if not self.check:
            mode, uid, gid = attributes(path) or (0o644, 0, 0)
            write(path, after, (mode, uid, gid), {"path": path, "owner": str(uid), "group": str(gid)})

    def absent(self, path: str) -> None:
        """Remove a plain file."""
        if not os.path.lexists(path):
            return
        if not (os.path.isfile(path) or os.path.islink(path)):
            raise Refused(f"{path} is not a plain file and is left alone")
        self.differs(path, "present\n", "absent\n")
        if not self.check:
            os.unlink(path)

    def membership(self, item: Item) -> None:
        """Add a user to groups; in check mode a missing user or group is one that a package will bring."""
        user = item["user"]
        try:
            primary = pwd.getpwnam(user).pw_gid
        except KeyError:
            if not self.check:
                raise Refused(f"there is no user {user} on this host") from None
            primary = None
        missing = []
        for name in item["groups"]:
            try:
                group = grp.getgrnam(name)
            except KeyError:
                if not self.check:
                    raise Refused(f"there is no group {name} on this host") from None
                missing.append(name)
                continue
            if user not in group.gr_mem and group.gr_gid != primary:
                missing.append(name)
        if missing:
            self.differs(f"groups of {user}", "", "\n".join(missing) + "\n")
            if not self.check:
                self.run("usermod", "-a", "-G", ",".join(missing), user)

    def run(self, *command: str) -> str:
        """Run a command or fail with its own words."""
        rc, out, err = self.module.run_command(list(command))
        if rc:
            raise Refused(f"{' '.join(command)}: {(err or out).strip()}")
        return str(out)

    def show(self, unit: str) -> dict[str, str]:
        """What systemd says of a unit."""
        try:
            done = subprocess.run(
                ["systemctl", "show", "--property=LoadState,ActiveState,SubState,UnitFileState,NeedDaemonReload", unit],
                capture_output=True,
                text=True,
                check=False,
            )
        except FileNotFoundError:
            raise Refused("systemctl is missing: this host doesn't run systemd") from None
        return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)

    def unit(self, item: Item) -> None:
        """Enable, start, stop or restart a unit."""
        name, now = item["name"], self.show(item["name"])
        absent = now.get("LoadState") == "not-found"
        if absent and item["state"] != "started" and not item["enabled"]:
            return  # what isn't there doesn't run
        if absent and not self.check:
            raise Refused(f"there is no unit {name} on this host")
        enabled = now.get("UnitFileState", "").startswith(("enabled", "static", "alias", "indirect", "generated"))
        if item["enabled"] is not None and enabled != item["enabled"]:
            self.act(name, "enable" if item["enabled"] else "disable", now.get("UnitFileState") or "absent")
        # a unit that systemd will start again after a failure doesn't run now
        waiting = now.get("SubState") == "auto-restart"
        active = not waiting and now.get("ActiveState") in ("active", "activating", "reloading")
        if item["state"] == "stopped":
            if active or waiting:
                self.act(name, "stop", "running")
        elif item["state"] == "started":
            if not active:
                self.act(name, "start", now.get("ActiveState") or "absent")
            elif set(item["restart_when"]) & set(self.changed_paths):
                self.restarted.append(name)
                self.act(name, "restart", "running with the former configuration")

    def act(self, name: str, verb: str, before: str) -> None:
        """One systemctl call, shown in the diff."""
        self.differs(name, f"{before}\n", f"{verb}\n")
        if self.check:
            return
        try:
            self.run("systemctl", verb, name)
        except Refused as refused:
            log = subprocess.run(
                ["journalctl", "-u", name, "-n", "15", "--no-pager", "-o", "cat"],
                capture_output=True,
                text=True,
                check=False,
            ).stdout
            raise Refused(f"{refused}\nThe last lines of its journal:\n{log.strip()}") from None

    def apply(self, params: Item) -> None:
        """Everything in the order in which one piece can need another."""
        leaving = [item for item in params["units"] if item["state"] == "stopped"]
        for item in leaving:  # while its files are there: systemd can't disable a unit whose file is gone
            self.unit(item)
        for item in params["directories"]:
            self.directory(item)
        for item in params["files"]:
            self.file(item)
        for item in params["lines"]:
            self.line(item)
        for path in params["absent"]:
            self.absent(path)
        for item in params["users_in_groups"]:
            self.membership(item)
        stale = any(self.show(item["name"]).get("NeedDaemonReload") == "yes" for item in params["units"])
        if not self.check and (stale or any(UNIT_DIRECTORY.match(path) for path in self.changed_paths)):
            self.run("systemctl", "daemon-reload")
        for item in params["units"]:
            if item not in leaving:
                self.unit(item)


def specification() -> Item:
    """The module's arguments."""
    text, path = {"type": "str", "required": True}, {"type": "path", "required": True}
    ownership = {
        "mode": {"type": "str", "default": "0755"},
        "owner": {"type": "str", "default": "root"},
        "group": {"type": "str", "default": "root"},
    }

    def items(**options: Any) -> Item:
        return {"type": "list", "elements": "dict", "default": [], "options": options}

    return {
        "directories": items(path=path, **ownership),
        "files": items(
            path=path,
            content={"type": "str", "required": True, "no_log": False},
            **{**ownership, "mode": {"type": "str", "default": "0644"}},
            sensitive={"type": "bool", "default": False},
            create_only={"type": "bool", "default": False},
        ),
        "absent": {"type": "list", "elements": "path", "default": []},
        "lines": items(path=path, line=text, regexp={"type": "str"}),
        "users_in_groups": items(user=text, groups={"type": "list", "elements": "str", "required": True}),
        "units": items(
            name=text,
            enabled={"type": "bool"},
            state={"type": "str", "choices": ["started", "stopped", "unmanaged"], "default": "unmanaged"},
            restart_when={"type": "list", "elements": "path", "default": []},
        ),
    }


def main() -> None:
    """Entry point."""
    module = AnsibleModule(argument_spec=specification(), supports_check_mode=True)
    bundle = Bundle(module)
    try:
        bundle.apply(module.params)
    except (Refused, OSError) as error:
        module.fail_json(
            msg=str(error),
            changed=bool(bundle.changed_paths) and not module.check_mode,
            changed_paths=bundle.changed_paths,
            restarted=bundle.restarted,
        )
    module.exit_json(
        changed=bool(bundle.changed_paths),
        diff=bundle.diffs,
        changed_paths=bundle.changed_paths,
        restarted=bundle.restarted,
    )


if __name__ == "__main__":
    main()
