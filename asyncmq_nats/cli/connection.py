"""The choice of the server: options, `NATS_*`, `ASYNCMQ_NATS_*`, contexts of the `nats` tool.

Each value is taken from the first that has it: an option; a context that was asked for
(`--context`); `ASYNCMQ_NATS_*`; `NATS_*`; the context in `NATS_CONTEXT`. The context that `nats
context select` chose counts only if none of these names a server: a login is not sent to a server
that it is not for.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from asyncmq_nats import NATSBackend, Settings
from asyncmq_nats.exceptions import AsyncMQError
from asyncmq_nats.schedules import parse_every

__all__ = ["ConnectionOptions", "ContextUnusable", "describe_sources", "make_backend", "resolve"]

VARIABLES: Final = {
    "NATS_URL": "servers",
    "NATS_CREDS": "credentials",
    "NATS_NKEY": "nkey_seed",
    "NATS_USER": "user",
    "NATS_PASSWORD": "password",
    "NATS_TOKEN": "token",
    "NATS_CERT": "tls_cert",
    "NATS_KEY": "tls_key",
    "NATS_CA": "tls_ca",
    "NATS_JS_DOMAIN": "domain",
}
CONTEXT_FIELDS: Final = {
    "url": "servers",
    "creds": "credentials",
    "nkey": "nkey_seed",
    "user": "user",
    "password": "password",
    "token": "token",
    "cert": "tls_cert",
    "key": "tls_key",
    "ca": "tls_ca",
    "jetstream_domain": "domain",
}
UNREAD_FIELDS: Final = ("nsc", "jetstream_api_prefix", "socks_proxy", "user_jwt", "user_seed")
"""Members of a context without which the connection would be another one."""
PATHS: Final = ("credentials", "nkey_seed", "tls_cert", "tls_key", "tls_ca")
OWN_PREFIX: Final = "ASYNCMQ_NATS_"


class ContextUnusable(AsyncMQError):
    """A context of the `nats` tool that cannot be read, or not be followed."""


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """The options of the command line. `timeout`: seconds, or a text such as `5s`."""

    server: str | None = None
    context: str | None = None
    timeout: str | None = None
    prefix: str | None = None
    declare: bool = True
    """Whether missing streams and consumers are created."""

    def or_else(self, other: "ConnectionOptions") -> "ConnectionOptions":
        """Return these options, completed by those of `other`."""
        return ConnectionOptions(
            self.server or other.server,
            self.context or other.context,
            self.timeout or other.timeout,
            self.prefix or other.prefix,
            self.declare and other.declare,
        )


@dataclass(slots=True)
class _Found:
    """Values by setting, and where each is from: the first that has one counts."""

    values: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def take(self, values: Mapping[str, str], source: Callable[[str], str]) -> None:
        for name, value in values.items():
            if name not in self.values:
                self.values[name], self.sources[name] = value, source(name)

    def take_context(self, name: str, env: Mapping[str, str]) -> None:
        values, extra = _read_context(name, env)
        self.take(values, lambda _: f"context {name}")
        self.extra = extra | self.extra


def _find(options: ConnectionOptions, env: Mapping[str, str]) -> _Found:
    found = _Found()
    if options.server:
        found.take({"servers": options.server}, lambda _: "--server")
    if options.prefix:
        found.take({"prefix": options.prefix}, lambda _: "--prefix")
    if options.context:
        found.take_context(options.context, env)
    own = {name: value for name in Settings.model_fields if (value := _own(env, name))}
    found.take(own, lambda name: OWN_PREFIX + name.upper())
    general = {name: variable for variable, name in VARIABLES.items() if env.get(variable)}
    found.take({name: env[variable] for name, variable in general.items()}, general.__getitem__)
    if not options.context and env.get("NATS_CONTEXT"):
        found.take_context(env["NATS_CONTEXT"], env)
    if "servers" not in found.values and (selected := _selected_context(env)):
        found.take_context(selected, env)
    if timeout := options.timeout or env.get("NATS_TIMEOUT"):
        source = "--timeout" if options.timeout else "NATS_TIMEOUT"
        for name in ("connect_timeout", "request_timeout"):
            found.values[name], found.sources[name] = str(parse_every(timeout)), source
    return found


def resolve(
    options: ConnectionOptions, environment: Mapping[str, str] | None = None
) -> tuple[Settings, dict[str, Any]]:
    """Return the settings, and what else `nats.connect` is given.

    Raises:
        ContextUnusable: a context that is asked for is not there, or needs what this library has
            not.
        ValueError: a value is malformed.
    """
    found = _find(options, os.environ if environment is None else environment)
    # What is from our own variables the settings read by themselves, lists and numbers too.
    given: dict[str, Any] = {
        name: value
        for name, value in found.values.items()
        if not found.sources[name].startswith(OWN_PREFIX)
    }
    return Settings(**given), found.extra


def describe_sources(options: ConnectionOptions, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the origin of each setting's value; it is the default for those that are left out."""
    return _find(options, environment).sources


def _own(env: Mapping[str, str], name: str) -> str | None:
    return env.get(OWN_PREFIX + name.upper()) or env.get((OWN_PREFIX + name).lower())


def make_backend(options: ConnectionOptions) -> NATSBackend:
    """Return a backend that is not connected yet.

    Raises:
        ContextUnusable, ValueError: as for `resolve`.
    """
    settings, extra = resolve(options)
    return NATSBackend(settings=settings, declare=options.declare, **extra)


# -- contexts of the `nats` tool


def _context_folder(env: Mapping[str, str]) -> Path:
    home = env.get("XDG_CONFIG_HOME") or os.path.join(env.get("HOME", "~"), ".config")
    return Path(home).expanduser() / "nats"


def _selected_context(env: Mapping[str, str]) -> str | None:
    try:
        return (_context_folder(env) / "context.txt").read_text().strip() or None
    except OSError:
        return None


def _read_context(context: str, env: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings in a context, and what else `nats.connect` is given."""
    data = _load_context(context, env)
    unread = [key for key in UNREAD_FIELDS if data.get(key)]
    if unread:
        raise ContextUnusable(
            f"context {context!r} has {', '.join(unread)}, which is not supported here: "
            "make a context with url and creds, nkey, user or token"
        )
    found = {name: str(data[key]) for key, name in CONTEXT_FIELDS.items() if data.get(key)}
    for name in found.keys() & PATHS:
        found[name] = os.path.expandvars(os.path.expanduser(found[name]))
    extra: dict[str, Any] = {}
    if data.get("inbox_prefix"):
        extra["inbox_prefix"] = str(data["inbox_prefix"])
    if data.get("tls_first"):
        extra["tls_handshake_first"] = True
    return found, extra


def _load_context(name: str, env: Mapping[str, str]) -> dict[str, Any]:
    path = _context_folder(env) / "context" / f"{name}.json"
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ContextUnusable(
            f"context {name!r} cannot be read: {error.strerror}: {path}; "
            "`nats context ls` lists them"
        ) from error
    except ValueError as error:
        raise ContextUnusable(f"context {name!r} is no JSON: {error}: {path}") from error
    if not isinstance(data, dict):
        raise ContextUnusable(f"context {name!r} is no JSON object: {path}")
    return data
