"""The command line: words, options, exit codes. What a command does is decided in `lifecycle`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from labctl import __version__
from labctl.errors import ConfigError, LabctlError

if TYPE_CHECKING:
    from labctl.ansible import Outcome
    from labctl.context import Context
    from labctl.lifecycle import Verification

app = typer.Typer(
    name="labctl",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Disposable compute and durable data for a machine-learning lab on Chameleon. Every command can be run again.",
)
sandbox_app = typer.Typer(no_args_is_help=True, help="A Chameleon of your own in one container, on this machine.")
app.add_typer(sandbox_app, name="sandbox")

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


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _global(
    lab: Annotated[
        Path | None, typer.Option("--lab", metavar="FILE", help="lab.yaml; else ./lab.yaml, then $LABCTL_LAB")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the result as JSON on stdout, all else on stderr")] = False,
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="say more; twice: Ansible's details")] = 0,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="answer yes to every question")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="print the version", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    del version  # its callback has answered
    options.lab_file, options.as_json, options.verbosity, options.yes = lab, as_json, verbose, yes


# -- a lab's life --------------------------------------------------------------------------------------------------


@app.command()
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="the lab's name; default: your user name")] = "",
    site: Annotated[str, typer.Option(help="sandbox, chameleon, or an entry of clouds.yaml")] = "sandbox",
) -> None:
    """Write a commented lab.yaml. Never overwrites one."""
    from labctl import template

    path = template.write(options.lab_file or Path("lab.yaml"), name, site)
    emit({"file": str(path)}, f"Wrote {path}. Next: labctl up")


@app.command()
def up() -> None:
    """Bring the whole lab up: VM, address, ports, volume, object store, services. Safe to run again: it continues."""
    from labctl import lifecycle

    ctx = context()
    _report(lifecycle.up(ctx))
    _summary(ctx)


@app.command()
def converge(
    check: Annotated[bool, typer.Option("--check", help="say what would change, change nothing")] = False,
    only: Annotated[list[str] | None, typer.Option("--only", metavar="ROLE", help="only this role; repeatable")] = None,
) -> None:
    """Bring the server to what lab.yaml says. Safe to run again: a second run changes nothing."""
    from labctl import lifecycle

    for role in only or ():
        if role not in lifecycle.ROLES:
            raise ConfigError(
                f"There is no role {role}.",
                expected=f"one of {', '.join(lifecycle.ROLES)}",
                source="--only",
                next_step="labctl converge --help",
            )
    ctx = context()
    _report(lifecycle.converge(ctx, check=check, only=only or ()), check=check)


@app.command(name="reattach-volume")
def reattach_volume() -> None:
    """After the VM was made anew: attach the volume, prove it is the lab's, mount, start, verify. Formats nothing."""
    from labctl import lifecycle

    ctx = context()
    _verified(lifecycle.reattach_volume(ctx))


Force = Annotated[bool, typer.Option("--force", help="go on where the host can't be drained")]


@app.command()
def rebuild(force: Force = False) -> None:
    """Replace the VM by a new one; volume, object store and address stay. Reads everything back. Safe to run again."""
    from labctl import lifecycle

    ctx = context()
    _verified(lifecycle.rebuild(ctx, force=force))


@app.command()
def drain(force: Force = False) -> None:
    """Stop the services, flush and unmount the volume; the VM stays. `converge` brings it back. Safe to run again."""
    from labctl import lifecycle

    drained = lifecycle.drain(context(), force=force)
    emit({"drained": drained}, "Drained: nothing uses the volume." if drained else "")


@app.command()
def down(force: Force = False) -> None:
    """Delete the VM after a drain. Volume and object store stay. Safe to run again."""
    from labctl import lifecycle

    ctx = context()
    lifecycle.down(ctx, force=force)
    emit({"down": True}, "The server is gone; the data stays. labctl up (or rebuild) brings it back.")


@app.command()
def destroy(force: Force = False) -> None:
    """Delete the lab WITH ALL ITS DATA, after asking for its name. Safe to run again."""
    from labctl import lifecycle

    ctx = context()
    doomed = lifecycle.possessions(ctx)
    for line in doomed.lines:
        err.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    if doomed and not options.yes:
        typed = _ask(f"This deletes all of it for good. Type the lab's name ({ctx.lab.lab}) to go on: ")
        if typed != ctx.lab.lab:
            raise ConfigError("That is not the lab's name: nothing was deleted.", next_step="labctl destroy")
    lifecycle.destroy(ctx, force=force)
    emit({"destroyed": list(doomed.lines)}, "The lab is gone.")


# -- looking -------------------------------------------------------------------------------------------------------


@app.command()
def status() -> None:
    """Show server, volume, object store and services. Changes nothing."""
    from labctl import observe

    found = observe.status(context())
    emit(found.as_dict(), _table(found.rows()))


@app.command()
def verify(
    read_only: Annotated[
        bool, typer.Option("--read-only", help="log no new run, only read back the earlier ones")
    ] = False,
) -> None:
    """Prove persistence: read back every probe run logged so far (by hash), and log another. Safe to run again."""
    from labctl import lifecycle

    _verified(lifecycle.verify(context(), write=not read_only))


@app.command()
def inventory(
    everything: Annotated[bool, typer.Option("--list", help="the whole inventory (default)")] = False,
    host: Annotated[str, typer.Option("--host", metavar="NAME", help="one host's variables")] = "",
) -> None:
    """Print the dynamic inventory as JSON, as Ansible asks for it. Changes nothing."""
    from labctl import lifecycle

    document = lifecycle.inventory_document(options.lab_file)
    shown = document["_meta"]["hostvars"].get(host, {}) if host and not everything else document
    typer.echo(json.dumps(shown, indent=2))


# -- using ---------------------------------------------------------------------------------------------------------


@app.command()
def etl() -> None:
    """Load the dataset into the object store. Deletes nothing that is there. Safe to run again."""
    from labctl import lifecycle

    ctx = context()
    _report(lifecycle.etl(ctx))


@app.command()
def mount() -> None:
    """Mount the object store on the server. Safe to run again."""
    from labctl import lifecycle

    ctx = context()
    _report(lifecycle.mount(ctx))


@app.command()
def unmount() -> None:
    """Unmount the object store on the server, until `mount` or `converge`. Safe to run again."""
    from labctl import lifecycle

    ctx = context()
    _report(lifecycle.unmount(ctx))


@app.command(context_settings={"ignore_unknown_options": True})
def ssh(command: Annotated[list[str] | None, typer.Argument(metavar="[-- CMD]")] = None) -> None:
    """Log into the server, or run one command there."""
    from labctl import lifecycle
    from labctl.ssh import replace_process

    ctx = context()
    replace_process(ctx.login(lifecycle.existing_server(ctx)), command or [])


@app.command()
def tunnel() -> None:
    """Make the services reachable on this machine's 127.0.0.1, until Ctrl-C."""
    from labctl import lifecycle
    from labctl.ssh import forward_ports

    ctx = context()
    ports = ctx.ports
    login = ctx.login(lifecycle.existing_server(ctx))
    for name, port in ports.items():
        err.print(f"{name}: http://127.0.0.1:{port}", markup=False, highlight=False)
    err.print("Ctrl-C ends it.")
    forward_ports(login, list(ports.values()))


# -- the sandbox ---------------------------------------------------------------------------------------------------


@sandbox_app.command("up")
def sandbox_up(
    images: Annotated[str, typer.Option(help="service images: auto, pull or build")] = "auto",
) -> None:
    """Start the embedded cloud; builds what is missing. Safe to run again."""
    from labctl import sandbox

    if images not in ("auto", "pull", "build"):
        raise ConfigError(
            f"--images {images}", expected="auto, pull or build", source="--images", next_step="leave it out"
        )
    with progress().step("sandbox up") as step:
        found = sandbox.up(step.tell, images=images)  # type: ignore[arg-type]
    emit(asdict(found), f"The sandbox is {found.state}.")


@sandbox_app.command("down")
def sandbox_down() -> None:
    """Stop the embedded cloud. Volumes, objects and servers come back with `up`."""
    from labctl import sandbox

    with progress().step("sandbox down") as step:
        sandbox.down(step.tell)
    emit({"state": "stopped"}, "The sandbox is stopped; its data stays.")


@sandbox_app.command("status")
def sandbox_status() -> None:
    """Show the embedded cloud. Changes nothing."""
    from labctl import sandbox

    found = asdict(sandbox.status())
    emit(found, _table([(name, str(value)) for name, value in found.items()]))


@sandbox_app.command("destroy")
def sandbox_destroy(
    images: Annotated[bool, typer.Option("--images", help="delete the images that it was built from, too")] = False,
) -> None:
    """Delete the embedded cloud WITH ALL ITS VOLUMES AND OBJECTS, after asking."""
    from labctl import sandbox

    if not confirm("Delete the sandbox with every server, volume and object in it?"):
        raise ConfigError("Nothing was deleted.", next_step="labctl sandbox destroy")
    with progress().step("sandbox destroy") as step:
        sandbox.destroy(step.tell, images=images)
    emit({"state": "absent"}, "The sandbox is gone.")


# -- words ---------------------------------------------------------------------------------------------------------


def context() -> Context:
    """The lab that the global options name."""
    from labctl import lab
    from labctl.context import Context

    found = lab.load(lab.find_file(options.lab_file))
    return Context(found, progress(), confirm, max(0, options.verbosity - 1))


def progress() -> Any:
    """Where progress is shown."""
    from labctl.progress import Progress

    return Progress(err)


def confirm(question: str) -> bool:
    """A yes-or-no question to the person at the terminal; `--yes` answers it."""
    return options.yes or _ask(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def _ask(question: str) -> str:
    if not sys.stdin.isatty():
        raise ConfigError(
            "There is nobody at a terminal to answer a question.",
            found=question.strip(),
            next_step="run the command again with --yes (or --force), if that is what you mean",
        )
    err.print(question, end="", markup=False, highlight=False)
    return sys.stdin.readline().strip()


def emit(document: Any, text: str) -> None:
    """The result on stdout: as JSON with `--json`, else as text."""
    if options.as_json:
        typer.echo(json.dumps(document, indent=2))
    elif text:
        typer.echo(text)


def _report(outcome: Outcome, *, check: bool = False) -> None:
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


def _summary(ctx: Context) -> None:
    if options.as_json:
        return
    from labctl import observe

    typer.echo(_table(observe.status(ctx).rows()))
    typer.echo("\nNext: labctl tunnel opens the services on this machine; labctl verify proves that data persists.")


def _verified(found: Verification) -> None:
    text = f"{found.earlier_runs} earlier runs read back unchanged"
    if found.logged:
        text += f"; logged run {found.run_id} (artifact sha256 {found.artifact_sha256[:12]}…)"
    emit(asdict(found), text + ".")


def _table(rows: list[tuple[str, str]]) -> str:
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


def main() -> None:
    """Entry point of the console script."""
    sys.exit(guarded(lambda: app(standalone_mode=False)))
