"""`Dashboard`: an ASGI application, to serve alone or to mount in another one."""

from collections.abc import Iterable, Sequence
from typing import Final
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncmq_nats.backends.base import Backend
from asyncmq_nats.contrib.dashboard.access import (
    LocalOnly,
    Login,
    find_foreign_origin,
)
from asyncmq_nats.contrib.dashboard.pages import ROUTES
from asyncmq_nats.contrib.dashboard.redaction import SECRET_KEYS, Hook, Redactor
from asyncmq_nats.contrib.dashboard.site import PACKAGE, Site, site_of
from asyncmq_nats.exceptions import (
    AsyncMQError,
    BackendError,
    InvalidArgument,
    JobNotFound,
    PermissionRefused,
)
from asyncmq_nats.settings import mask_login
from asyncmq_nats.telemetry.logs import get_logger

__all__ = ["Dashboard"]

logger = get_logger(__name__)

SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
OPEN_PATHS: Final = frozenset({"/health", "/ready", "/login", "/logout"})
"""Paths without a login: a probe has none."""
MAX_BODY_BYTES: Final = 4 * 1024 * 1024
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class Dashboard:
    """The dashboard, an ASGI application: `uvicorn module:app`, or mount it under any prefix.

    Args:
        backend: where the queues are; by default that of the settings.
        login: who may use it: `SessionLogin`, `BasicLogin`, `HookLogin`, or an object of your own
            (see `Login`). Without one it answers programs on this machine only.
        read_only: no one may change anything.
        queues: names of the queues to show; by default all.
        redact: values under keys that contain one of these are hidden.
        redact_hook: called with each field of a job that is shown, and where; returns what to show.
        trusted_origins: origins such as `https://jobs.example.org` from which actions are taken
            although the Host header is another: for a proxy that changes it.
        prefix: the path below which it answers, such as `/jobs`, where the application around does
            not tell it by `root_path` (Litestar; a proxy that takes it away).
        title: shown at the top.
        refresh: how often an open page is brought up to date, in seconds.

    Raises:
        InvalidArgument: a value is of the wrong kind.
    """

    def __init__(
        self,
        backend: Backend | None = None,
        *,
        login: Login | None = None,
        read_only: bool = False,
        queues: Iterable[str] | None = None,
        redact: Sequence[str] = SECRET_KEYS,
        redact_hook: Hook | None = None,
        trusted_origins: Iterable[str] = (),
        prefix: str | None = None,
        title: str = "asyncmq-nats",
        refresh: float = 2.0,
    ) -> None:
        if isinstance(redact, str) or isinstance(queues, str):
            raise InvalidArgument("redact and queues must be lists of texts", redact)
        if not 0.5 <= refresh <= 3600:
            raise InvalidArgument("refresh must be from 0.5 to 3600 s", refresh)
        self.login = LocalOnly() if login is None else login
        self.site = Site(
            backend,
            Redactor(redact, redact_hook),
            title=title,
            read_only=read_only,
            queues=None if queues is None else frozenset(queues),
            refresh=refresh,
        )
        self._prefix = None if prefix is None else "/" + prefix.strip("/")
        self._trusted = frozenset(trusted_origins)
        self._app = Starlette(
            routes=ROUTES,
            exception_handlers={
                HTTPException: _show_refusal,
                AsyncMQError: _show_error,
                ValueError: _show_error,
                Exception: _show_failure,
            },
        )
        self._app.mount("/static", StaticFiles(packages=[(PACKAGE, "static")]), name="static")
        self._app.state.site = self.site
        self._app.state.login = self.login

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request (ASGI)."""
        if scope["type"] == "http":
            await self._answer(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        else:  # no page opens a websocket
            await send({"type": "websocket.close", "code": 1000})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope = dict(scope)
        scope["state"] = dict(scope.get("state", {}))
        if self._prefix is not None:
            _set_prefix(scope, self._prefix.rstrip("/"))
        request = Request(scope, receive)
        guarded = _with_headers(send, is_static=_path(scope).startswith("/static/"))
        refusal = await self._refuse(request)
        app: ASGIApp = self._app if refusal is None else refusal
        await app(scope, receive, guarded)

    async def _refuse(self, request: Request) -> Response | None:
        """Return why a request is not answered; `None` if it is. Notes who makes it."""
        path = _path(request.scope)
        changes = request.method not in SAFE_METHODS
        if changes and (problem := self._find_problem(request)) is not None:
            return problem
        if path.startswith("/static/"):
            return None
        user = request.state.user = await self.login.identify(request)
        if path in OPEN_PATHS:
            return None
        if user is None:
            return self.login.challenge(request)
        if changes and not self.site.may_act(user):
            why = "is read-only" if self.site.read_only else "lets viewers look only"
            return _say(403, f"This dashboard {why}.")
        return None

    def _find_problem(self, request: Request) -> Response | None:
        """Return why this action is refused to every user."""
        foreign = find_foreign_origin(request, self._trusted)
        if foreign is not None:
            return _say(403, f"Refused, it is no action of this dashboard: {foreign}.")
        length = request.headers.get("content-length", "")
        if not length.isdecimal():
            return _say(411, "The request must say how long it is.")
        if int(length) > MAX_BODY_BYTES:
            return _say(413, f"At most {MAX_BODY_BYTES:,} bytes can be sent.")
        return None


def _set_prefix(scope: Scope, prefix: str) -> None:
    """Have a request look as one of an application that is mounted there."""
    path = scope["path"]
    if path != prefix and not path.startswith(prefix + "/"):
        path = prefix + path
    if path != prefix + "/":
        path = path.rstrip("/")
    scope["path"], scope["raw_path"], scope["root_path"] = path, quote(path).encode(), prefix


def _path(scope: Scope) -> str:
    """Return the path below the prefix at which the dashboard is mounted."""
    path, prefix = str(scope["path"]), str(scope.get("root_path", ""))
    if prefix and (path == prefix or path.startswith(prefix + "/")):
        path = path[len(prefix) :]
    return path or "/"


def _with_headers(send: Send, *, is_static: bool) -> Send:
    """Return a `send` that adds the headers of `HEADERS`, and has nothing but files kept."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
            if is_static:
                headers["Cache-Control"] = "no-cache"
            elif "cache-control" not in headers:
                headers["Cache-Control"] = "no-store"
        await send(message)

    return send_with_headers


def _say(status: int, text: str) -> Response:
    return PlainTextResponse(text + "\n", status)


async def _show_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error_page(request, error.status_code, error.detail)


async def _show_error(request: Request, error: Exception) -> Response:
    """Answer with what the library says of a request that it refused or could not carry out."""
    if isinstance(error, JobNotFound):
        status = 404
    elif isinstance(error, PermissionRefused):
        status = 403
    elif isinstance(error, BackendError):
        status = 503
    else:
        status = 400
    if status == 503:
        logger.warning("the dashboard could not answer %s: %s", request.url.path, error)
    return _error_page(request, status, mask_login(str(error)))


async def _show_failure(request: Request, error: Exception) -> Response:
    logger.exception("the dashboard failed at %s", request.url.path, exc_info=error)
    return _error_page(request, 500, "The dashboard made a mistake; its log has the traceback.")


def _error_page(request: Request, status: int, text: str) -> Response:
    changes = request.method not in SAFE_METHODS
    if "hx-request" in request.headers:
        return PlainTextResponse(text, status)
    site = site_of(request)
    return site.page(
        request,
        "error.html",
        {"status": status, "text": text, "retry": not changes, "now": 0},
        status,
    )
