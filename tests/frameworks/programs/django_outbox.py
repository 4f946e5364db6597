"""Django writes to the outbox of the database in `DATABASE_*`, and tells what is in it, as JSON."""

import json
import os
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

import django
from django.conf import settings

postgres = os.environ.get("DATABASE_HOST")
database: dict[str, Any] = (
    {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": "postgres",
        "USER": "test",
        "HOST": postgres,
    }
    if postgres
    else {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ["DATABASE_FILE"]}
)
settings.configure(
    DATABASES={"default": database},
    INSTALLED_APPS=["asyncmq_nats.contrib.django"],
    ASYNCMQ_NATS={"stalled_after": 7},
    USE_TZ=True,
)
django.setup()

from django.core.management import call_command  # noqa: E402
from django.db import transaction  # noqa: E402

from asyncmq_nats import default_backend  # noqa: E402
from asyncmq_nats.contrib.django import outbox  # noqa: E402
from asyncmq_nats.contrib.django.address import database_url  # noqa: E402
from asyncmq_nats.contrib.django.models import OutboxRow  # noqa: E402
from asyncmq_nats.contrib.outbox import add  # noqa: E402
from asyncmq_nats.contrib.outbox.rows import build_row  # noqa: E402


def parameters(function: Callable[..., Any]) -> list[Parameter]:
    """Return the parameters but those that say where the row is written."""
    found = signature(function).parameters
    return [found[name] for name in found if name not in ("session", "using")]


def refused(error: type[Exception], *args: Any, **kwargs: Any) -> bool:
    try:
        outbox.add(*args, **kwargs)
    except error:
        return True
    return False


def main() -> None:
    call_command("migrate", verbosity=0)
    call_command("makemigrations", "asyncmq_nats", check=True, dry_run=True, verbosity=0)
    told: dict[str, Any] = {"stalled_after": default_backend().settings.stalled_after}
    told["url"] = database_url("default").render_as_string()
    with transaction.atomic():
        outbox.add("note", ["first"], queue="work", order_key="k")
        outbox.add("note", ["second"], queue="work", order_key="k")
    outbox.add("note", ["alone"], queue="work", job_id="chosen")
    with transaction.atomic():
        outbox.add("note", ["never"], queue="work")
        transaction.set_rollback(True)
    told["no order without a transaction"] = refused(
        transaction.TransactionManagementError, "note", queue="work", order_key="k"
    )
    told["one signature"] = parameters(outbox.add) == parameters(add) == parameters(build_row)
    told["no queue"] = refused(ValueError, "note")
    rows = OutboxRow.objects.order_by("number")
    told["rows"] = [[row.queue, row.order_key, json.loads(row.body)["args"][0]] for row in rows]
    print(json.dumps(told))


main()
