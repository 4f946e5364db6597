"""What every part of `Queue` needs: its settings and the modules that do the work."""

from asyncmq_nats.additions import Additions
from asyncmq_nats.administration import Administration
from asyncmq_nats.assets import QueueAssets
from asyncmq_nats.backends import default_backend
from asyncmq_nats.backends.base import Backend
from asyncmq_nats.controls import Controls
from asyncmq_nats.deduplication import Deduplicator
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.hooks import Hooks
from asyncmq_nats.inspection import Inspection
from asyncmq_nats.parameters import checked_number, checked_seconds
from asyncmq_nats.registry import TASK_REGISTRY, TaskRegistry
from asyncmq_nats.repeatables import Definition, Repeatables
from asyncmq_nats.subjects import QueueSubjects

__all__ = ["QueueBase"]


class QueueBase:
    """The settings of a queue, and what its methods call."""

    def __init__(
        self,
        name: str,
        backend: Backend | None = None,
        concurrency: int = 3,
        rate_limit: int | None = None,
        rate_interval: float = 1.0,
        scan_interval: float | None = None,
        *,
        registry: TaskRegistry = TASK_REGISTRY,
    ) -> None:
        if backend is not None and not callable(getattr(backend, "declare_log", None)):
            raise InvalidArgument("backend must be a backend, such as NATSBackend('nats://localhost:4222')", backend)
        if checked_seconds(rate_interval, "rate_interval") <= 0:
            raise InvalidArgument("rate_interval must be above 0 s", rate_interval)
        self.name = name
        self.backend = backend if backend is not None else default_backend()
        self.concurrency = checked_number(concurrency, "concurrency", 1)
        self.rate_limit = rate_limit if rate_limit is None else checked_number(rate_limit, "rate_limit")
        self.rate_interval = rate_interval
        self.scan_interval = self.backend.settings.scan_interval if scan_interval is None else scan_interval
        self._subjects = QueueSubjects(self.backend.settings.prefix, name)
        self._assets = QueueAssets(self.backend, self._subjects)
        self._additions = Additions(self.backend, self._subjects, self._assets)
        self._inspection = Inspection(self.backend, self._subjects, self._assets)
        self._administration = Administration(self.backend, self._subjects, self._assets)
        self._deduplicator = Deduplicator(self.backend, self._subjects, self._additions)
        self._repeatables = Repeatables(self.backend, self._subjects, self._assets)
        self._controls = Controls(self.backend, self._subjects, self._assets)
        self._hooks = Hooks({"backend": self.backend, "queue": name})
        self._local_repeatables: list[Definition] = []
        self._registry = registry
