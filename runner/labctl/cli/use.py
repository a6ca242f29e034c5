"""The commands of daily use: the mount, a shell, the services on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from labctl.cli.core import context, err, one_of, report

app = typer.Typer()


@app.command()
def mount() -> None:
    """Mount the object store on the server. Safe to run again."""
    from labctl import lifecycle

    ctx = context()
    report(lifecycle.mount(ctx))


@app.command()
def unmount() -> None:
    """Unmount the object store on the server, until `mount` or `converge`. Safe to run again."""
    from labctl import lifecycle

    ctx = context()
    report(lifecycle.unmount(ctx))


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


@app.command(name="open")
def open_service(
    service: Annotated[str, typer.Argument(metavar="SERVICE", help="mlflow, s3_console or jupyter")] = "mlflow",
) -> None:
    """Open a service in this machine's browser, through a tunnel that lasts until Ctrl-C."""
    import threading
    import webbrowser

    from labctl import lifecycle
    from labctl.ssh import forward_ports, wait_for_port

    one_of(("mlflow", "s3_console", "jupyter"), service, "SERVICE")
    ctx = context()
    port = ctx.ports[service]
    login = ctx.login(lifecycle.existing_server(ctx))
    url = f"http://127.0.0.1:{port}"

    def show() -> None:
        if wait_for_port(port):
            webbrowser.open(url)

    err.print(f"{service}: {url} (Ctrl-C ends it)", markup=False, highlight=False)
    threading.Thread(target=show, daemon=True).start()
    forward_ports(login, [port])
