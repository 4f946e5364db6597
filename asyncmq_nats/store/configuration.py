"""The settings that a queue keeps on the server, and the differences from those in force.

Settings stored by `Queue.configure` (the record `queue.config`) win over those of any process.
Without them, the server stays as the first process made it, until a process applies its own
settings (`ASYNCMQ_NATS_APPLY=true` at the start of a worker): the last one to start decides.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from pydantic import ValidationError

from asyncmq_nats._clock import brief_pause
from asyncmq_nats._logging import Throttle, get_logger
from asyncmq_nats.backends.base import Difference, Expect, Write
from asyncmq_nats.exceptions import AssetMissing, InvalidArgument, InvalidJob, WriteRefused
from asyncmq_nats.settings import Settings
from asyncmq_nats.store.commit import REPLICA_LAG_DELAYS
from asyncmq_nats.store.queue_store import QueueStore
from asyncmq_nats.store.topology import SHORTEST_LIVE_LEASE
from asyncmq_nats.wire.codec import dump_json, load_json

__all__ = ["CONFIGURABLE_SETTINGS", "Configurations"]

logger = get_logger(__name__)

CONFIGURABLE_SETTINGS: Final = (
    "stalled_after",
    "completed_ttl",
    "failed_ttl",
    "completed_keep",
    "failed_keep",
    "replicas",
    "ready_max_bytes",
    "bucket_max_bytes",
    "compression",
    "placement_cluster",
    "placement_tags",
)
"""Settings that a queue can keep on the server, for all its workers."""


class Configurations:
    """Reads, stores and applies the configuration of one queue."""

    def __init__(self, store: QueueStore) -> None:
        self._store = store
        self._keys = store.keys
        self._assets = store.assets
        self._malformed = Throttle()

    async def read(self) -> dict[str, Any]:
        """Return the settings that are stored; none if there is no such queue."""
        return (await self._read())[1]

    async def refresh(self) -> None:
        """Have this process use the stored settings: its workers call this at each heartbeat."""
        self._use(await self.read())

    def _use(self, stored: Mapping[str, Any]) -> None:
        settings = self._store.backend.settings.model_copy(update=dict(stored))
        if settings != self._assets.settings:
            names = [
                name
                for name in CONFIGURABLE_SETTINGS
                if _differ(settings, self._assets.settings, name)
            ]
            shown = ", ".join(f"{name}={getattr(settings, name)!r}" for name in names)
            logger.info("queue %s: settings in force now: %s", self._keys.queue, shown)
            self._assets.settings = settings

    async def store(self, values: Mapping[str, Any], reset: Iterable[str]) -> list[Difference]:
        """Store these settings, forget those in `reset`, and apply the outcome.

        Return what was changed on the server.

        Raises:
            InvalidArgument: a value is none of that setting, or the server could not take it.
            WriteRefused: other processes store theirs each time; nothing was stored.
        """
        checked, reset = check_values(values), check_names(reset)
        await self._assets.declare()
        for pause in REPLICA_LAG_DELAYS:
            await brief_pause(pause)
            sequence, stored = await self._read()
            wanted = {name: value for name, value in stored.items() if name not in reset} | checked
            await self._check_room(self._store.backend.settings.model_copy(update=wanted))
            write = Write(
                self._keys.configuration,
                dump_json(wanted),
                Expect(self._keys.configuration, sequence),
            )
            try:
                await self._store.write(write)
            except WriteRefused:  # another process has changed it, or a replica lags behind
                continue
            self._use(wanted)  # not read again: a replica may not know it yet
            return await self._change()
        detail = f"the configuration of queue {self._keys.queue!r} changes all the time"
        raise WriteRefused(self._keys.bucket_log, detail)

    async def apply(self) -> list[Difference]:
        """Change on the server what differs from the settings in force and can be changed.

        Return what was changed.
        """
        await self.refresh()
        await self._check_room(self._assets.settings)
        return await self._change()

    async def _change(self) -> list[Difference]:
        changed = await self._assets.change()
        for each in changed:
            logger.info(
                "%s: %s changed from %r to %r", each.asset, each.key, each.found, each.wanted
            )
        return changed

    async def compare(self) -> list[Difference]:
        """Return how the queue's assets differ from the settings in force."""
        await self.refresh()
        return await self._assets.compare()

    async def _check_room(self, settings: Settings) -> None:
        """Refuse sizes below what is stored: at its limit, the bucket would discard delayed jobs.

        A limit that the server has already, or a higher one, costs nothing.

        Raises:
            InvalidArgument: a size is too small.
        """
        for name, log in (
            ("ready_max_bytes", self._keys.ready_log),
            ("bucket_max_bytes", self._keys.bucket_log),
        ):
            limit = getattr(settings, name)
            state = None if limit is None else await self._store.backend.describe_log(log)
            if state is None or (state.max_bytes is not None and limit >= state.max_bytes):
                continue
            if state.bytes > limit * 0.9:
                raise InvalidArgument(
                    f"{name} must leave a tenth free, and {log} has {state.bytes:,} bytes already: "
                    f"at least {int(state.bytes / 0.9) + 1:,}",
                    limit,
                )

    async def _read(self) -> tuple[int, dict[str, Any]]:
        try:
            records = await self._store.last(self._keys.configuration)
        except AssetMissing:
            return 0, {}
        if not records or records[0].marker:
            return (records[0].sequence if records else 0), {}
        return records[0].sequence, self._decode(records[0].body)

    def _decode(self, body: bytes) -> dict[str, Any]:
        """Return the settings of a record, without malformed ones and those of a newer version."""
        found: dict[str, Any] = {}
        try:
            data = load_json(body)
        except InvalidJob as problem:
            self._warn_of_malformed(problem)
            return {}
        for name in filter(data.__contains__, CONFIGURABLE_SETTINGS):
            try:
                found |= check_values({name: data[name]})
            except InvalidArgument as problem:
                self._warn_of_malformed(problem)
        return found

    def _warn_of_malformed(self, problem: Exception) -> None:
        if times := self._malformed.note():
            text = "queue %s: its configuration is malformed (%d times): %s"
            logger.warning(text, self._keys.queue, times, problem)


def check_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values as the settings have them; texts are read as the environment is.

    Raises:
        InvalidArgument: a name is none that a queue can keep, or a value none of that setting.
    """
    check_names(values)
    checked: dict[str, Any] = {}
    for name, value in values.items():
        given = None if value == "none" and name != "compression" else value
        try:
            checked[name] = getattr(Settings.model_validate({name: given}), name)
        except ValidationError as error:
            raise InvalidArgument(f"{name}: {error.errors()[0]['msg']}", value) from None
    lease = checked.get("stalled_after", SHORTEST_LIVE_LEASE)
    if lease < SHORTEST_LIVE_LEASE:
        raise InvalidArgument(
            f"stalled_after of a live queue is at least {SHORTEST_LIVE_LEASE:g} s: "
            "running workers extend their leases every 0.7 s",
            lease,
        )
    return checked


def check_names(names: Iterable[str]) -> list[str]:
    """Return the names of settings that a queue can keep.

    Raises:
        InvalidArgument: one is another.
    """
    names = list(names)
    for name in names:
        if name not in CONFIGURABLE_SETTINGS:
            raise InvalidArgument(
                f"a queue can keep the settings {', '.join(CONFIGURABLE_SETTINGS)}", name
            )
    return names


def _differ(one: Settings, other: Settings, name: str) -> bool:
    return bool(getattr(one, name) != getattr(other, name))
