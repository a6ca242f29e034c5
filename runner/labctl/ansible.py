"""Runs a playbook through ansible-runner: variables in, typed events and one outcome out.

Secrets travel in a 0600 file that is gone as soon as Ansible has read it. The environment of the run is built from an
allow-list, because ansible-runner writes all of it into its artifacts; the artifacts themselves are removed at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labctl import resources
from labctl.errors import ConvergeFailed, HostUnreachable, LabctlError, SafetyStop

#: Variables of the caller's environment that a run may see; everything else could be a secret.
ENVIRONMENT = ("HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TERM", "TZ", "SSH_AUTH_SOCK", "TMPDIR")
#: Actions that never leave the controller; all others cost a round trip to the host.
LOCAL_ACTIONS = frozenset(
    [
        "add_host",
        "assert",
        "debug",
        "fail",
        "group_by",
        "import_role",
        "import_tasks",
        "include_role",
        "include_tasks",
        "include_vars",
        "meta",
        "pause",
        "set_fact",
        "set_stats",
        "validate_argument_spec",
    ]
)
#: How many logs of runs are kept in the lab's state directory.
LOGS_KEPT = 20
#: How the name of a run's folder begins; the id of its process follows.
FOLDER = "labctl-run-"
#: Seconds between looks at whether the run was interrupted.
POLL_SECONDS = 1


class SecretNeeded(ConvergeFailed):
    """The host lacks a secret that only whoever makes a new credential can know."""


class UnmountNeeded(ConvergeFailed):
    """The host can't do it while the volume is mounted and in use."""


#: What a module's failure may carry, and the error that it becomes.
_MARKS: dict[str, type[LabctlError]] = {
    "safety_stop": SafetyStop,
    "needs_secret": SecretNeeded,
    "needs_unmount": UnmountNeeded,
}


@dataclass(frozen=True)
class Step:
    """A task that starts: its role (or "" outside roles) and its name."""

    role: str
    name: str


@dataclass
class Outcome:
    """What a run did. `changed` counts tasks that changed something (in check mode: would change)."""

    ok: int = 0
    changed: int = 0
    remote_tasks: int = 0
    seconds: float = 0.0
    changed_tasks: list[str] = field(default_factory=list)
    diffs: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    log: Path | None = None


@dataclass(frozen=True)
class Run:
    """One playbook to run. `variables` and `secrets` reach Ansible in a 0600 file that goes once it is read."""

    playbook: str
    inventory: dict[str, Any]
    log_directory: Path
    variables: dict[str, Any] = field(default_factory=dict)
    secrets: dict[str, Any] = field(default_factory=dict, repr=False)
    tags: tuple[str, ...] = ()
    check: bool = False
    verbosity: int = 0


def run(what: Run, on_step: Callable[[Step], None]) -> Outcome:
    """Run a playbook and wait for its end.

    Raises HostUnreachable, SafetyStop (a module refused: nothing was written) or ConvergeFailed (with the failing
    task's own message), and KeyboardInterrupt once the run has been stopped.
    """
    started = time.monotonic()
    place = _runtime_directory()
    _remove_leftovers(place)
    with tempfile.TemporaryDirectory(prefix=f"{FOLDER}{os.getpid()}-", dir=place) as folder:
        listener = _Listener(on_step)
        status = _execute(what, Path(folder), listener)
        outcome = listener.outcome
        outcome.seconds = time.monotonic() - started
        outcome.log = _keep_log(Path(folder), what)
    if listener.failure is not None:
        raise listener.failure
    if status == "canceled":
        raise KeyboardInterrupt
    if status != "successful":
        raise ConvergeFailed(
            f"Ansible could not run {what.playbook}.",
            found=f"status {status}",
            detail=_tail(outcome.log),
            next_step="run the command again with --verbose",
        )
    return outcome


def environment(folder: Path) -> dict[str, str]:
    """The settings that labctl runs Ansible with, as environment variables."""
    root = resources.root()
    return {
        "ANSIBLE_CONFIG": str(root / "playbooks" / "ansible.cfg"),
        "ANSIBLE_ROLES_PATH": str(root / "roles"),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_LOCAL_TEMP": str(folder / "local"),
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))),
    }


def _runtime_directory() -> str | None:
    """Memory rather than disk for what is secret, where there is such a place."""
    for place in (os.environ.get("XDG_RUNTIME_DIR"), "/dev/shm"):  # noqa: S108 (the folder made in it is 0700)
        if place and os.access(place, os.W_OK | os.X_OK):
            return place
    return None


def _remove_leftovers(place: str | None) -> None:
    """The folders of runs that were killed: a secret may still lie there. Those of living processes stay."""
    for folder in Path(place or tempfile.gettempdir()).glob(f"{FOLDER}*-*"):
        pid = folder.name.removeprefix(FOLDER).partition("-")[0]
        if pid.isdigit() and folder.lstat().st_uid == os.getuid() and not _lives(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _execute(what: Run, folder: Path, listener: _Listener) -> str:
    from ansible_runner import Runner, RunnerConfig

    inventory, variables = folder / "inventory.json", folder / "variables.json"
    _write_private(inventory, as_static(what.inventory))
    _write_private(variables, {**what.variables, **what.secrets})
    listener.on_start = variables.unlink
    settings = environment(folder)
    config = RunnerConfig(
        private_data_dir=str(folder),
        ident="run",
        playbook=str(resources.root() / "playbooks" / what.playbook),
        inventory=str(inventory),
        cmdline=f"-e @{variables} --diff" + (" --check" if what.check else ""),
        tags=",".join(what.tags) or None,
        verbosity=what.verbosity or None,
        envvars=settings,
        settings={"pexpect_timeout": POLL_SECONDS},
        quiet=True,
    )
    config.prepare()
    config.env = {
        name: value
        for name, value in config.env.items()
        if name in ENVIRONMENT or name in settings or os.environ.get(name) != value  # ansible-runner's own
    }
    with _interruptible() as interrupted:
        runner = Runner(config=config, event_handler=listener.handle, cancel_callback=interrupted)
        runner.run()
    return str(runner.status)


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C into a wish that the runner asks for, so that Ansible ends before labctl does."""
    wished = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield wished.is_set
        return
    former = {sign: signal.signal(sign, lambda *_: wished.set()) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wished.is_set
    finally:
        for sign, handler in former.items():
            signal.signal(sign, handler)


def as_static(inventory: dict[str, Any]) -> dict[str, Any]:
    """A dynamic inventory's document (`_meta.hostvars`) as the file that Ansible's YAML plugin reads."""
    variables = inventory.get("_meta", {}).get("hostvars", {})
    groups = {
        name: {
            "hosts": {host: variables.get(host, {}) for host in group.get("hosts", [])},
            "vars": group.get("vars", {}),
        }
        for name, group in inventory.items()
        if name not in ("_meta", "all")
    }
    return {"all": {"children": groups}}


def _write_private(path: Path, data: Any) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
        json.dump(data, handle)


class _Listener:
    """Turns ansible-runner's events into steps (of tasks that reach the host), counts and at most one failure."""

    def __init__(self, on_step: Callable[[Step], None]) -> None:
        self.outcome = Outcome()
        self.failure: LabctlError | None = None
        self.on_start: Callable[[], None] | None = None
        self._item: dict[str, Any] = {}
        self._on_step = on_step

    def handle(self, event: dict[str, Any]) -> bool:
        """One event; the answer False keeps ansible-runner from writing it to disk."""
        data = event.get("event_data", {})
        match event.get("event"):
            case "playbook_on_play_start" if self.on_start:
                self.on_start()  # by now the variables have been read
                self.on_start = None
            case "playbook_on_task_start" if _action_of(data) not in LOCAL_ACTIONS:
                self._on_step(Step(data.get("role", ""), data.get("task", "")))
            case "runner_on_ok":
                self._ok(data)
            case "runner_item_on_failed":
                self._item = data
            case "runner_on_failed" if not data.get("ignore_errors"):
                # of a loop, the item that failed says why; the task only that one did
                item = self._item if self._item.get("task_uuid") == data.get("task_uuid") else {}
                self.failure = self.failure or failure_of({**data, "res": item.get("res") or data.get("res", {})})
            case "runner_on_unreachable":
                self.failure = unreachable(data)
            case "playbook_on_stats":
                self.outcome.data.update(data.get("artifact_data") or {})
        return False

    def _ok(self, data: dict[str, Any]) -> None:
        result = data.get("res", {})
        self.outcome.ok += 1
        if _action_of(data) not in LOCAL_ACTIONS:
            self.outcome.remote_tasks += 1
        if result.get("changed"):
            self.outcome.changed += 1
            role = data.get("role", "")
            self.outcome.changed_tasks.append(f"{role} : {data.get('task')}" if role else str(data.get("task")))
            self.outcome.diffs.extend(_diff_texts(result.get("diff")))


def _action_of(data: dict[str, Any]) -> str:
    """The name of a task's module or action, without its collection."""
    return str(data.get("task_action", "")).rpartition(".")[2]


def failure_of(data: dict[str, Any]) -> LabctlError:
    """The error of a failing task: its own message once and whole, and exit 6 where a module stopped for safety."""
    result = data.get("res", {})
    where = " : ".join(part for part in (data.get("role"), data.get("task")) if part)
    message = str(result.get("msg") or result.get("censored") or "the task failed without a message")
    parts = [str(result[key]).strip() for key in ("stderr", "stdout", "module_stderr") if result.get(key)]
    if data.get("task_action", "").endswith("apt") and "stderr" in result:
        message = message.splitlines()[0]
    error = next((kind for key, kind in _MARKS.items() if result.get(key)), ConvergeFailed)
    return error(
        message if error is SafetyStop else f"{where}: {message}",
        expected=str(result.get("expected") or ""),
        found=str(result.get("found") or ""),
        source=str(result.get("source") or f"task {where} on {data.get('host', 'the host')}"),
        next_step=str(result.get("next_step") or "mend the cause and run the same command again: it continues"),
        detail="\n".join(part for part in parts if part not in message),
    )


def unreachable(data: dict[str, Any]) -> HostUnreachable:
    """The error of a host that can't be logged into."""
    return HostUnreachable(
        f"{data.get('host', 'The host')} can't be logged into.",
        found=str(data.get("res", {}).get("msg", "")).strip(),
        next_step="labctl status shows the server; labctl doctor checks key and address",
    )


def _diff_texts(diff: Any) -> list[str]:
    import difflib

    texts = []
    for item in diff if isinstance(diff, list) else [diff] if diff else []:
        if not isinstance(item, dict) or "prepared" in item:
            texts.extend([item["prepared"]] if isinstance(item, dict) else [])
            continue
        before, after = (
            text if isinstance(text, str) else json.dumps(text, indent=1, sort_keys=True) + "\n"
            for text in (item.get("before", ""), item.get("after", ""))
        )
        names = item.get("before_header") or "before", item.get("after_header") or "after"
        texts.append("".join(difflib.unified_diff(before.splitlines(True), after.splitlines(True), *names)))
    return [text for text in texts if text]


def _keep_log(folder: Path, what: Run) -> Path | None:
    """Keep Ansible's own output (never its environment or events) where --verbose and a bug report can find it."""
    produced = folder / "artifacts" / "run" / "stdout"
    if not produced.exists():
        return None
    what.log_directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    name = f"{time.strftime('%Y%m%dT%H%M%S')}-{Path(what.playbook).stem}-{os.getpid()}.log"
    kept = what.log_directory / name
    with os.fdopen(os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as handle:
        handle.write(produced.read_bytes())
    for old in sorted(what.log_directory.glob("*.log"))[:-LOGS_KEPT]:
        old.unlink(missing_ok=True)
    return kept


def _tail(log: Path | None, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log else ""
