"""The Django app: `settings.ASYNCMQ_NATS` becomes the default backend of queues."""

from django.apps import AppConfig
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from pydantic import ValidationError

from asyncmq_nats import NATSBackend, Settings, set_default_backend

__all__ = ["AsyncMQConfig"]


class AsyncMQConfig(AppConfig):
    """`asyncmq_nats.contrib.django` in `INSTALLED_APPS`."""

    name = "asyncmq_nats.contrib.django"
    label = "asyncmq_nats"
    verbose_name = "Jobs"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Take the settings.

        Raises:
            ImproperlyConfigured: `ASYNCMQ_NATS` is no dict of settings.
        """
        given = getattr(settings, "ASYNCMQ_NATS", None)
        if given is None:
            return
        if not isinstance(given, dict):
            raise ImproperlyConfigured("ASYNCMQ_NATS must be a dict, as {'servers': 'nats://…'}")
        try:
            chosen = Settings(**given)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in ("ASYNCMQ_NATS", *problem["loc"]))
            raise ImproperlyConfigured(f"{where}: {problem['msg']}") from None
        set_default_backend(NATSBackend(settings=chosen))
