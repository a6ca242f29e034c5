"""What every command shares: the global options, the lab they name, questions, results, errors and exit codes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from labctl.errors import ConfigError, LabctlError

if TYPE_CHECKING:
    from labctl.ansible import Outcome
    from labctl.context import Context
    from labctl.lifecycle import Verification

#: What a wrong option raises: an error of click, which Typer may carry a copy of.
_UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
#: Exit code of a process that Ctrl-C ended, by the shells' convention.
INTERRUPTED = 130


@dataclass
class Options:
    """The global options."""

    lab_file: Path | None = None
    as_json: bool = False
    verbosity: int = 0
    yes: bool = False


options = Options()
err = Console(stderr=True)


def context(accept_volumes: Sequence[str] | None = None) -> Context:
    """The lab that the global options name. `accept_volumes`: identities that are taken over on purpose."""
    from labctl import lab
    from labctl.context import Context

    found = lab.load(lab.find_file(options.lab_file))
    ctx = Context(found, progress(), confirm, max(0, options.verbosity - 1))
    ctx.accept_volumes = tuple(accept_volumes or ())
    ctx.prompt = prompt if sys.stdin.isatty() else None
    return ctx


def progress() -> Any:
    """Where progress is shown."""
    from labctl.progress import Progress

    return Progress(err, verbose=options.verbosity > 0)


def confirm(question: str) -> bool:
    """A yes-or-no question to the person at the terminal; `--yes` answers it."""
    return options.yes or ask(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def prompt(question: str, hidden: bool) -> str:
    """What the person at the terminal types; `hidden` doesn't show it."""
    import getpass

    return getpass.getpass(question, stream=sys.stderr) if hidden else ask(question)


def one_of(known: Iterable[str], given: str, source: str) -> None:
    """Raises ConfigError unless what was given is one of the known words."""
    words = tuple(known)
    if given not in words:
        raise ConfigError(f"{source} can't be {given}.", expected=f"one of {', '.join(words)}", source=source)


def ask(question: str) -> str:
    """What the person at the terminal answers. Raises ConfigError where there is nobody."""
    if not sys.stdin.isatty():
        raise ConfigError(
            "There is nobody at a terminal to answer a question.",
            found=question.strip(),
            next_step="run the command again with --yes (or --force), if that is what you mean",
        )
    err.print(question, end="", markup=False, highlight=False)
    return sys.stdin.readline().strip()


def whose(lab: str) -> str:
    """Who made something, by the lab that it is tagged with."""
    return f"made for the lab {lab}" if lab else "not made by labctl"


def confirm_by_name(kind: str, name: str, described: str, confirmed: str) -> None:
    """Have the name of what is to be deleted typed, unless `--confirm` gave it. Raises ConfigError otherwise."""
    if confirmed == name:
        return
    err.print(f"  {described}", markup=False, highlight=False, soft_wrap=True)
    try:
        typed = ask(f"This deletes its data for good. Type the {kind}'s name ({name}) to go on: ")
    except ConfigError as nobody:
        nobody.next_step = f"labctl {kind} delete {name} --confirm {name}"
        raise
    if typed != name:
        raise ConfigError(f"That is not the {kind}'s name: nothing was deleted.", next_step=f"labctl {kind} list")


def emit(document: Any, text: str) -> None:
    """The result on stdout: as JSON with `--json`, else as text."""
    if options.as_json:
        typer.echo(json.dumps(document, indent=2))
    elif text:
        typer.echo(text)


def report(outcome: Outcome, *, check: bool = False) -> None:
    """The outcome of a playbook; with --verbose or --check its diffs, too."""
    if options.verbosity or check:
        for diff in outcome.diffs:
            err.print(diff, markup=False, highlight=False, soft_wrap=True)
    document = {
        "ok": outcome.ok,
        "changed": outcome.changed,
        "remote_tasks": outcome.remote_tasks,
        "changed_tasks": outcome.changed_tasks,
        "seconds": round(outcome.seconds, 2),
        "check": check,
        "log": str(outcome.log or ""),
    }
    verb = "would change" if check else "changed"
    emit(document, "\n".join([*(f"{verb}: {name}" for name in outcome.changed_tasks), f"changed={outcome.changed}"]))


def summary(ctx: Context) -> None:
    """What is there now, and what to do next."""
    if options.as_json:
        return
    from labctl import observe

    typer.echo(table(observe.status(ctx).rows()))
    typer.echo("\nNext: labctl tunnel opens the services on this machine; labctl verify proves that data persists.")


def verified(found: Verification) -> None:
    """What `verify` proved."""
    text = f"{found.earlier_runs} earlier runs read back unchanged"
    if found.logged:
        text += f"; logged run {found.run_id} (artifact sha256 {found.artifact_sha256[:12]}…)"
    emit(asdict(found), text + ".")


def table(rows: list[tuple[str, str]]) -> str:
    """Rows of a name and a text, as aligned lines."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def fail(error: LabctlError) -> None:
    """Tell an error: what, expected, found, where from, what next; as JSON on stdout with `--json`."""
    if options.as_json:
        typer.echo(json.dumps({"error": error.as_dict()}, indent=2))
    err.print(f"Error: {error.what}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    for label, text in (
        ("expected", error.expected),
        ("found", error.found),
        ("from", error.source),
        ("", error.detail),
        ("next", error.next_step),
    ):
        if text:
            err.print(f"  {label + ': ' if label else ''}{text}", markup=False, highlight=False, soft_wrap=True)


def guarded(command: Callable[[], Any]) -> int:
    """Run a command; every error that labctl raises on purpose becomes a message and an exit code."""
    try:
        return int(command() or 0)
    except LabctlError as error:
        fail(error)
        return error.exit_code
    except _UsageError as error:
        error.show()
        return int(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        err.print("Interrupted. Run the same command again: it continues.", markup=False)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
