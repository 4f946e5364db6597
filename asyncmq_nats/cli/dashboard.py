"""`dashboard`: the web pages, served alone."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from asyncmq_nats.cli.command import CommandFailed, Session
from asyncmq_nats.cli.program import log_to_stderr, program

__all__ = ["register"]

REQUIRED_MODULES: Final = (
    "starlette",
    "jinja2",
    "sse_starlette",
    "itsdangerous",
    "multipart",
    "uvicorn",
)
GRACE_SECONDS: Final = 3
"""How long answers under way may take when the program is told to stop."""


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    program(app, "dashboard")(dashboard)


def dashboard(
    session: Session,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8080,
    accounts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Who may log in: a line name:role:password each."),
    ] = None,
    basic: Annotated[bool, typer.Option("--basic", help="Log in by HTTP, not by a page.")] = False,
    secret: Annotated[
        str | None,
        typer.Option(
            envvar="AMQ_DASHBOARD_SECRET", help="Signs the sessions, so that they outlast restarts."
        ),
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="No one may act.")] = False,
    queue: Annotated[
        list[str] | None, typer.Option(metavar="QUEUE", help="Show this queue only; repeatable.")
    ] = None,
    root_path: Annotated[
        str, typer.Option(metavar="PATH", help="Prefix that a proxy in front takes away.")
    ] = "",
    trusted_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Take actions from here too, as behind a proxy."),
    ] = None,
    hash_password: Annotated[
        bool, typer.Option("--hash-password", help="Ask for a password, print its hash, and end.")
    ] = False,
) -> None:
    """Serve the dashboard until SIGTERM or Ctrl-C (extra `dashboard`)."""
    missing = [name for name in REQUIRED_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandFailed(
            f"the dashboard needs {', '.join(missing)}: pip install 'asyncmq-nats[dashboard]'"
        )
    from asyncmq_nats.contrib.dashboard import Dashboard
    from asyncmq_nats.contrib.dashboard import hash_password as hashed
    from asyncmq_nats.contrib.dashboard.access import is_loopback

    if hash_password:
        session.output.raw(hashed(typer.prompt("Password", hide_input=True, err=True)))
        return
    if accounts is None and not is_loopback(host):
        raise CommandFailed(
            f"the dashboard does not listen on {host} without a login: give --accounts FILE with "
            "lines name:role:password, or listen on 127.0.0.1"
        )
    login = None if accounts is None else _make_login(accounts, basic=basic, secret=secret)
    app = Dashboard(
        session.backend,
        login=login,
        read_only=read_only,
        queues=queue or None,
        trusted_origins=trusted_origin or (),
    )
    log_to_stderr("warning")
    session.output.note(f"the dashboard is at http://{host}:{port}{root_path}/")
    _serve(app, host, port, root_path, behind_proxy=login is not None)


def _make_login(accounts: Path, *, basic: bool, secret: str | None) -> Any:
    from asyncmq_nats.contrib.dashboard import BasicLogin, SessionLogin, read_accounts

    found = read_accounts(accounts)
    return BasicLogin(found) if basic else SessionLogin(found, secret)


def _serve(app: Any, host: str, port: int, root_path: str, *, behind_proxy: bool) -> None:
    import uvicorn

    uvicorn.run(
        app,
        host=host,
        port=port,
        root_path=root_path,
        log_level="warning",
        lifespan="off",
        # Without a login the address of the client decides: then it must be the real one.
        proxy_headers=behind_proxy,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
