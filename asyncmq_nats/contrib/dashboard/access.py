"""Access to the dashboard: logins, roles, sessions, and requests of other origins.

Nothing here knows a queue.
"""

import base64
import binascii
import hashlib
import hmac
import inspect
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import quote, urlsplit

from anyio import to_thread
from itsdangerous import BadSignature, URLSafeTimedSerializer
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from asyncmq_nats.exceptions import InvalidArgument

__all__ = [
    "Account",
    "BasicLogin",
    "HookLogin",
    "LocalOnly",
    "Login",
    "Role",
    "SessionLogin",
    "User",
    "find_foreign_origin",
    "hash_password",
    "is_loopback",
    "make_accounts",
    "read_accounts",
]

SESSION_COOKIE: Final = "amq_session"
SESSION_LIFETIME: Final = 12 * 3600
"""How long a login lasts, in seconds."""
SCRYPT_COST: Final = {"n": 2**14, "r": 8, "p": 1}
HASH_PREFIX: Final = "scrypt$"
MAX_FAILURES: Final = 10
"""Failed logins of one client within `FAILURE_WINDOW`; further ones are refused unread."""
FAILURE_WINDOW: Final = 60.0
MAX_CLIENTS: Final = 1_000
"""Clients whose failed logins are remembered."""
MAX_CHECKED: Final = 256
"""Passwords of `BasicLogin` that are remembered as right, since each request brings one."""


class Role(StrEnum):
    """The role of a user: a viewer reads, an operator acts too."""

    VIEWER = "viewer"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class User:
    """The user of a request. `name` is written into the audit log."""

    name: str
    role: Role


@dataclass(frozen=True, slots=True)
class Account:
    """A user with a password: plain, or as `hash_password` returns it."""

    name: str
    password: str
    role: Role = Role.OPERATOR

    def __repr__(self) -> str:
        return f"Account({self.name!r}, role={self.role.value!r})"


class Login(Protocol):
    """Identifies the user of a request."""

    async def identify(self, request: Request) -> User | None:
        """Return who makes a request, `None` for a stranger."""

    def challenge(self, request: Request) -> Response:
        """Return the answer to a stranger."""


def hash_password(password: str) -> str:
    """Return a password as it can be stored in a file of accounts: salted, by scrypt."""
    salt = os.urandom(16)
    return HASH_PREFIX + "$".join((salt.hex(), _scrypt(password, salt).hex()))


def _scrypt(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, **SCRYPT_COST, dklen=32)


def _matches(password: str, stored: str) -> bool:
    if not stored.startswith(HASH_PREFIX):
        return hmac.compare_digest(password.encode(), stored.encode())
    try:
        salt, digest = (bytes.fromhex(part) for part in stored.removeprefix(HASH_PREFIX).split("$"))
    except ValueError:
        return False
    return hmac.compare_digest(_scrypt(password, salt), digest)


def make_accounts(given: Mapping[str, Any] | Iterable[Account]) -> dict[str, Account]:
    """Return accounts by name.

    A mapping has an `Account` for each name, or a password, or `(password, role)`.

    Raises:
        InvalidArgument: there is none, or one lacks a password or has an unknown role.
    """
    if isinstance(given, Mapping):
        given = [_account_of(name, value) for name, value in given.items()]
    accounts = [_account(each.name, each.password, each.role) for each in given]
    if not accounts:
        raise InvalidArgument("a login needs at least one account", accounts)
    return {account.name: account for account in accounts}


def _account_of(name: str, value: Any) -> Account:
    """Return the account of one item of a mapping; its values are not checked yet."""
    if isinstance(value, Account):
        return value
    if isinstance(value, str):
        return Account(name, value)
    try:
        password, role = value
    except (TypeError, ValueError):
        raise InvalidArgument("an account needs a password, or (password, role)", name) from None
    return Account(name, password, role)


def _account(name: str, password: str, role: str) -> Account:
    if not name or not password or ":" in name:
        raise InvalidArgument("an account needs a name without ':' and a password", name)
    if role not in set(Role):
        raise InvalidArgument(f"the role of {name!r} must be one of {', '.join(Role)}", role)
    return Account(name, password, Role(role))


def read_accounts(path: str | Path) -> dict[str, Account]:
    """Return the accounts of a file: a line `name:role:password` each, `#` begins a comment.

    The password is plain, or what `hash_password` returns.

    Raises:
        InvalidArgument: the file cannot be read, or a line is malformed; the message names it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"the file of accounts cannot be read ({error})", str(path)) from None
    accounts = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = line.strip().split(":", 2)
        if len(parts) != 3:
            where = f"{path}, line {number}"
            raise InvalidArgument(f"{where} must be name:role:password", line.partition(":")[0])
        accounts.append(_account(parts[0].strip(), parts[2], parts[1].strip()))
    return make_accounts(accounts)


class _Passwords:
    """Checks passwords, and slows down those who guess."""

    def __init__(self, accounts: Mapping[str, Any] | Iterable[Account]) -> None:
        self._accounts = make_accounts(accounts)
        self._failures: dict[str, list[float]] = {}
        hashed = any(a.password.startswith(HASH_PREFIX) for a in self._accounts.values())
        self._stand_in = hash_password("-") if hashed else secrets.token_hex(16)

    def find(self, name: str) -> Account | None:
        return self._accounts.get(name)

    def is_blocked(self, client: str) -> bool:
        """Return whether a client has failed too often lately."""
        start = time.monotonic() - FAILURE_WINDOW
        recent = [at for at in self._failures.get(client, ()) if at > start]
        if recent:
            self._failures[client] = recent
        else:
            self._failures.pop(client, None)
        return len(recent) >= MAX_FAILURES

    async def check(self, name: str, password: str, client: str) -> User | None:
        account = self._accounts.get(name)
        # An unknown name takes as long as a wrong password.
        stored = self._stand_in if account is None else account.password
        right = await to_thread.run_sync(_matches, password, stored)
        if self.is_blocked(client):  # by now: guesses made at the same time count as well
            return None
        if account is not None and right:
            return User(account.name, account.role)
        if client not in self._failures and len(self._failures) >= MAX_CLIENTS:
            self._failures.pop(next(iter(self._failures)))
        self._failures.setdefault(client, []).append(time.monotonic())
        return None


def _client(request: Request) -> str:
    return "" if request.client is None else request.client.host


def _too_many() -> Response:
    return PlainTextResponse(
        "Too many failed logins: try again in a minute.\n", 429, {"Retry-After": "60"}
    )


class BasicLogin:
    """Accounts by HTTP basic authentication. Use it behind TLS only.

    Args:
        accounts: `{"ada": ("password", "operator")}`, or `Account`s, or what `read_accounts`
            returns.

    Raises:
        InvalidArgument: there is no account, or one is malformed.
    """

    def __init__(self, accounts: Mapping[str, Any] | Iterable[Account]) -> None:
        self._passwords = _Passwords(accounts)
        self._key = os.urandom(32)
        self._checked: dict[bytes, User] = {}

    async def identify(self, request: Request) -> User | None:
        """See `Login`."""
        scheme, _, value = request.headers.get("authorization", "").partition(" ")
        client = _client(request)
        if scheme.lower() != "basic" or self._passwords.is_blocked(client):
            return None
        try:
            text = base64.b64decode(value.strip(), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            return None
        digest = hmac.digest(self._key, text.encode(), "sha256")
        user = self._checked.get(digest)
        if user is None:
            name, _, password = text.partition(":")
            user = await self._passwords.check(name, password, client)
            if user is not None:
                if len(self._checked) >= MAX_CHECKED:
                    self._checked.clear()
                self._checked[digest] = user
        return user

    def challenge(self, request: Request) -> Response:
        """See `Login`."""
        if self._passwords.is_blocked(_client(request)):
            return _too_many()
        realm = 'Basic realm="asyncmq-nats", charset="UTF-8"'
        return PlainTextResponse("Log in first.\n", 401, {"WWW-Authenticate": realm})


class SessionLogin:
    """Accounts by a page with a form; the session is a signed cookie.

    Args:
        accounts: as for `BasicLogin`.
        secret: signs the cookies. Several processes need the same one; by default it is random, and
            a restart ends all sessions.
        lifetime: how long a login lasts, in seconds.

    Raises:
        InvalidArgument: there is no account, or one is malformed.
    """

    def __init__(
        self,
        accounts: Mapping[str, Any] | Iterable[Account],
        secret: str | None = None,
        *,
        lifetime: float = SESSION_LIFETIME,
    ) -> None:
        self._passwords = _Passwords(accounts)
        self._signer = URLSafeTimedSerializer(
            secret or secrets.token_hex(32),
            salt="asyncmq-nats dashboard session",
            signer_kwargs={"digest_method": hashlib.sha256},
        )
        self._lifetime = lifetime

    async def identify(self, request: Request) -> User | None:
        """See `Login`."""
        try:
            data = self._signer.loads(
                request.cookies.get(SESSION_COOKIE, ""), max_age=int(self._lifetime)
            )
        except BadSignature:
            return None
        # Looked up each time: an account that is gone, or has a new password, is out at once.
        account = self._passwords.find(str(data.get("name")))
        if account is None or not hmac.compare_digest(str(data.get("of")), self._mark(account)):
            return None
        return User(account.name, account.role)

    def _mark(self, account: Account) -> str:
        """Return what changes with the password of an account, and does not tell it."""
        key = str(self._signer.secret_key).encode()
        return hmac.digest(key, f"{account.name}\0{account.password}".encode(), "sha256").hex()[:16]

    def challenge(self, request: Request) -> Response:
        """See `Login`."""
        prefix = request.scope.get("root_path", "")
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        login = f"{prefix}/login?next={quote(target)}"
        if "hx-request" in request.headers:
            return Response(status_code=401, headers={"HX-Redirect": login})
        if request.method != "GET" or request.url.path.endswith("/live"):
            return PlainTextResponse("Log in first.\n", 401)
        return RedirectResponse(login, 303)

    async def log_in(self, request: Request, name: str, password: str) -> str | Response | None:
        """Return the value of a new cookie, or the answer to one who guesses; `None`: refused."""
        client = _client(request)
        if self._passwords.is_blocked(client):
            return _too_many()
        user = await self._passwords.check(name, password, client)
        account = None if user is None else self._passwords.find(user.name)
        if account is None:
            return None
        return self._signer.dumps({"name": account.name, "of": self._mark(account)})

    def set_cookie(self, request: Request, response: Response, value: str | None) -> None:
        """Give the browser its cookie, or with `None` take it away."""
        options: dict[str, Any] = {
            "path": request.scope.get("root_path", "") or "/",
            "secure": request.url.scheme == "https",
            "httponly": True,
            "samesite": "lax",
        }
        if value is None:
            response.delete_cookie(SESSION_COOKIE, **options)
        else:
            response.set_cookie(SESSION_COOKIE, value, max_age=int(self._lifetime), **options)


Identify = Callable[[Request], User | Awaitable[User | None] | None]


class HookLogin:
    """A login of one's own, such as a session of the app around or a header of a proxy.

    Args:
        identify: called with each request, sync or async; returns a `User`, or `None` for a
            stranger.
        login_url: where a stranger's browser is sent; without one it is answered 403.
    """

    def __init__(self, identify: Identify, *, login_url: str | None = None) -> None:
        self._identify = identify
        self._login_url = login_url

    async def identify(self, request: Request) -> User | None:
        """See `Login`."""
        user = self._identify(request)
        if inspect.isawaitable(user):
            user = await user
        if user is not None and not isinstance(user, User):
            raise InvalidArgument("a login hook must return a User or None", type(user).__name__)
        return user

    def challenge(self, request: Request) -> Response:
        """See `Login`."""
        if self._login_url is None:
            return PlainTextResponse("You have no access to this dashboard.\n", 403)
        if "hx-request" in request.headers:
            return Response(status_code=401, headers={"HX-Redirect": self._login_url})
        return RedirectResponse(self._login_url, 303)


class LocalOnly:
    """No login: only programs on this machine are answered, all as operator.

    A browser may be made to ask us by a page of another name that points to this address (DNS
    rebinding): so the name it asked for has to be one of this machine. Requests of a proxy are
    refused, since the user is not on this machine.
    """

    async def identify(self, request: Request) -> User | None:
        """See `Login`."""
        name = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
        passed_on = any(
            header in request.headers for header in ("forwarded", "x-forwarded-for", "x-real-ip")
        )
        if passed_on or not (is_loopback(_client(request)) and is_loopback(name)):
            return None
        return User("local", Role.OPERATOR)

    def challenge(self, request: Request) -> Response:
        """See `Login`."""
        return PlainTextResponse(
            "This dashboard has no login, so it answers on this machine only, as localhost. "
            "Give it one: Dashboard(login=…), or asyncmq-nats dashboard --accounts FILE.\n",
            403,
        )


def is_loopback(host: str) -> bool:
    """Return whether a name or an address is that of this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ip_address(host.strip("[]"))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def find_foreign_origin(request: Request, trusted: Iterable[str] = ()) -> str | None:
    """Return why an action does not come from a page of this dashboard; `None` if it does.

    A browser says where a request comes from, and a page cannot change it: `Sec-Fetch-Site` on
    https and localhost, `Origin` otherwise. `trusted`: origins such as `https://jobs.example.org`,
    for a proxy that changes the Host header.
    """
    origin = request.headers.get("origin")
    if origin is not None and origin in trusted:
        return None
    site = request.headers.get("sec-fetch-site")
    if site is not None and site != "same-origin":
        return f"the browser says that it comes from {site}"
    if site == "same-origin":
        return None
    if origin is None:
        return "it has no Origin header"
    try:
        host = urlsplit(origin).netloc
    except ValueError:
        host = ""
    if not host or host.lower() != request.headers.get("host", "").lower():
        return f"it comes from {origin}"
    return None
