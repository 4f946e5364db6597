"""The options of `nats.connect`, from the settings and from the user.

The files and the package that a login needs are looked at before it is tried: nats-py (2.16) tries
again for ever without one, and reads a credentials file that is something else for ever.
"""

import importlib.util
import re
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from asyncmq_nats.exceptions import BackendError
from asyncmq_nats.settings import Settings

__all__ = ["connect_options", "server_addresses"]

LOGINS: Final = {
    "user_credentials": (
        "ASYNCMQ_NATS_CREDENTIALS",
        (rb"BEGIN NATS USER JWT-+\s+\S", rb"\bS[A-Z2-7]{57}\b"),
    ),
    "nkeys_seed": ("ASYNCMQ_NATS_NKEY_SEED", (rb"\bS[A-Z2-7]{57}\b",)),
    "nkeys_seed_str": ("", ()),
}
"""Options that need the package nkeys: their variables, and the contents of their files."""


def server_addresses(settings: Settings, options: Mapping[str, Any]) -> list[str]:
    """Return the addresses of the servers."""
    return list(options.get("servers", settings.servers))


def connect_options(settings: Settings, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of `nats.connect`.

    The user's win over the settings, and these over our defaults.

    Raises:
        BackendError: a file that they name cannot be used, or the package is missing that a login
            needs.
    """
    chosen: dict[str, Any] = {
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": 0.25,
        "connect_timeout": settings.connect_timeout,
        "ping_interval": 20,
        "pending_size": 8 * 1024 * 1024,
        "user": settings.user,
        "password": settings.password,
        "token": settings.token,
        "user_credentials": settings.credentials,
        "nkeys_seed": settings.nkey_seed,
    }
    chosen.update(options)
    chosen["servers"] = server_addresses(settings, options)
    if "tls" not in options:
        chosen["tls"] = _tls_context(settings)
    for option, (variable, contents) in LOGINS.items():
        if chosen.get(option) is not None:
            _check_login(option if option in options else variable, chosen[option], contents)
    return chosen


def _tls_context(settings: Settings) -> ssl.SSLContext | None:
    ca, certificate, key = settings.tls_ca, settings.tls_cert, settings.tls_key
    if ca is None and certificate is None:
        return None
    for name, path in (("TLS_CA", ca), ("TLS_CERT", certificate), ("TLS_KEY", key)):
        if path is not None:
            _read(f"ASYNCMQ_NATS_{name}", path)
    try:
        context = ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise _unusable("ASYNCMQ_NATS_TLS_CA", ca, error) from error
    if certificate is not None:
        try:
            context.load_cert_chain(certificate, key)
        except OSError as error:
            raise _unusable(
                "ASYNCMQ_NATS_TLS_CERT, with ASYNCMQ_NATS_TLS_KEY,", certificate, error
            ) from error
    return context


def _check_login(name: str, login: object, contents: Sequence[bytes]) -> None:
    if importlib.util.find_spec("nkeys") is None:
        raise BackendError(f"{name} needs the package nkeys: pip install 'asyncmq-nats[nkeys]'")
    if not contents or not isinstance(login, str | Path):  # it is what would be in the file
        return
    text = _read(name, login)
    if not all(re.search(part, text) for part in contents):
        raise _unusable(name, login, "it is no file of that kind")


def _read(name: str, path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _unusable(name, path, error.strerror) from error


def _unusable(name: str, path: object, reason: object) -> BackendError:
    return BackendError(f"{name} names {str(path)!r}, which cannot be used: {reason}")
