"""The address of one of Django's databases, for a relay."""

from typing import Final

from django.db import connections
from sqlalchemy import URL

from asyncmq_nats.exceptions import InvalidArgument

__all__ = ["database_url"]

VENDORS: Final = ("postgresql", "sqlite")


def database_url(alias: str) -> URL:
    """Return the address of one of `settings.DATABASES`, for a relay.

    Raises:
        InvalidArgument: it is neither PostgreSQL nor SQLite.
    """
    connection = connections[alias]
    if connection.vendor not in VENDORS:
        raise InvalidArgument(
            "the outbox needs a database of PostgreSQL or SQLite", connection.vendor
        )
    given = connection.settings_dict
    if connection.vendor == "sqlite":
        return URL.create("sqlite", database=str(given["NAME"]))
    options = given.get("OPTIONS") or {}
    # What libpq takes; Django's own options, such as `pool`, are none of its.
    query = {name: str(options[name]) for name in LIBPQ_OPTIONS if name in options}
    host = given.get("HOST") or None
    if host is not None and host.startswith("/"):  # the directory of a socket
        query["host"], host = host, None
    return URL.create(
        "postgresql",
        username=given.get("USER") or None,
        password=given.get("PASSWORD") or None,
        host=host,
        port=int(given["PORT"]) if given.get("PORT") else None,
        database=given.get("NAME") or None,
        query=query,
    )


LIBPQ_OPTIONS: Final = (
    "service",
    "passfile",
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "options",
    "connect_timeout",
    "target_session_attrs",
)
