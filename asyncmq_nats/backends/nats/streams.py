"""Creates missing streams and consumers; does not change those with other settings."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from asyncmq_nats._clock import NANOSECONDS
from asyncmq_nats._logging import get_logger
from asyncmq_nats.backends.base import Consumer, Difference, Log
from asyncmq_nats.backends.filters import is_key
from asyncmq_nats.backends.nats.connection import Connection, format_time
from asyncmq_nats.backends.nats.errors import (
    CONSUMER_EXISTS,
    CONSUMER_MISSING,
    STREAM_EXISTS,
    STREAM_MISSING,
    TOO_MANY_CONSUMERS,
    api_error,
)
from asyncmq_nats.backends.nats.room import Ballasts, Fills
from asyncmq_nats.exceptions import BackendError
from asyncmq_nats.settings import Settings

__all__ = ["Assets", "consumer_config", "stream_config"]

logger = get_logger(__name__)

MAX_CONSUMERS: Final = 300
"""256 tiers, and some for other tools. Left out, the server stops at 1,000."""


def stream_config(log: Log, settings: Settings) -> dict[str, Any]:
    """Return the JetStream configuration of a log."""
    config: dict[str, Any] = {
        "name": log.name,
        "subjects": list(log.subjects),
        "retention": "workqueue" if log.work_queue else "limits",
        "storage": settings.storage,
        "num_replicas": settings.replicas,
        # One, too, in a bucket, but for moments: each write there replaces what it finds (see
        # `encode_headers`), and the server must not be faster, since what a limit removes may come
        # back.
        "max_msgs_per_subject": 8 if all(map(is_key, log.subjects)) else 1,
        "max_consumers": MAX_CONSUMERS,
        "discard": "old",
        "allow_direct": True,
        "allow_atomic": True,
        **_limits(log, settings),
    }
    if log.timers:
        # discard-new is refused together with schedules; without limits discard-old never discards.
        config |= {
            "allow_rollup_hdrs": True,
            "allow_msg_ttl": True,
            "allow_msg_schedules": True,
            "deny_delete": False,
        }
    if log.republish is not None:
        config["republish"] = {"src": log.republish[0], "dest": log.republish[1]}
    return config


def _limits(log: Log, settings: Settings) -> dict[str, Any]:
    """Return what the settings say of size, compression and place."""
    limits: dict[str, Any] = {}
    if log.work_queue and settings.ready_max_bytes is not None:
        # A full stream refuses new jobs. The server takes discard-new only without schedules.
        limits |= {"max_bytes": settings.ready_max_bytes, "discard": "new"}
    elif log.max_bytes is not None:
        limits["max_bytes"] = log.max_bytes
    if settings.compression != "none" and settings.storage == "file":
        limits["compression"] = settings.compression
    placement = {"cluster": settings.placement_cluster, "tags": list(settings.placement_tags)}
    if any(placement.values()):
        limits["placement"] = {key: value for key, value in placement.items() if value}
    return limits


def consumer_config(consumer: Consumer) -> dict[str, Any]:
    """Return the JetStream configuration of a consumer."""
    config: dict[str, Any] = {
        "name": consumer.name,
        "durable_name": consumer.name,
        "max_deliver": -1,
    }
    if len(consumer.filters) == 1:
        config["filter_subject"] = consumer.filters[0]
    else:
        config["filter_subjects"] = list(consumer.filters)
    if consumer.lease is None:
        # A counter: never pulled from, so its pending messages are the matching ones. One replica,
        # in memory: made again when lost.
        return config | {"ack_policy": "none", "mem_storage": True, "num_replicas": 1}
    config |= {
        "ack_policy": "explicit",
        "ack_wait": int(consumer.lease * NANOSECONDS),
        "max_ack_pending": -1,
    }
    return config


CHANGEABLE_SETTINGS: Final = (
    "num_replicas",
    "max_bytes",
    "discard",
    "compression",
    "placement",
    "republish",
    "ack_wait",
)
"""Settings that the server changes in place; all others need a new stream."""
DEFAULTS: Final = {
    "max_bytes": -1,
    "discard": "old",
    "compression": "none",
    "placement": None,
    "republish": None,
}
"""Defaults of a stream that was created without these settings.

A comparison shows them, a declaration does not.
"""


def _find_differences(
    asset: str, wanted: Mapping[str, Any], found: Mapping[str, Any]
) -> list[Difference]:
    return [
        Difference(asset, key, found.get(key), value, key in CHANGEABLE_SETTINGS)
        for key, value in wanted.items()
        if not _same(found.get(key), value)
    ]


class Assets:
    """Declares streams and consumers, each once per connection."""

    def __init__(self, settings: Settings, *, declare: bool) -> None:
        self._connection: Connection
        self._ballasts: Ballasts
        self._fills: Fills
        self._settings = settings
        self._declare = declare
        self._logs: dict[str, Log] = {}
        self._declared_logs: set[str] = set()
        self._consumers: dict[tuple[str, str], Consumer] = {}
        self._declared: set[tuple[str, str]] = set()

    def use(self, connection: Connection, ballasts: Ballasts, fills: Fills) -> None:
        """Declare over this connection from now on.

        Declare everything again: the server may have lost its store.
        """
        self._connection, self._ballasts, self._fills = connection, ballasts, fills
        self._declared_logs.clear()
        self._declared.clear()

    async def declare_log(self, log: Log) -> None:
        """See `Backend.declare_log`."""
        self._logs[log.name] = log
        self._ballasts.note(log)
        if not self._declare or log.name in self._declared_logs:
            return
        wanted = stream_config(log, self._settings)
        answer = await self._connection.call(f"STREAM.CREATE.{log.name}", wanted)
        if "error" in answer:
            if answer["error"].get("err_code") != STREAM_EXISTS:
                raise api_error(log.name, answer["error"])
            answer = await self._connection.require(f"STREAM.INFO.{log.name}")
        warn_of_difference(f"stream {log.name}", wanted, answer["config"])
        self._fills.learn(log.name, answer["config"])
        self._declared_logs.add(log.name)
        if answer.get("did_create"):
            await self._ballasts.lay(log.name)

    async def declare_consumer(self, log: str, consumer: Consumer) -> None:
        """See `Backend.declare_consumer`."""
        key = (log, consumer.name)
        self._consumers[key] = consumer
        if not self._declare or key in self._declared:
            return
        await self._create_consumer(log, consumer)
        self._declared.add(key)

    async def _create_consumer(self, log: str, consumer: Consumer) -> None:
        wanted = consumer_config(consumer)
        payload: dict[str, Any] = {"stream_name": log, "config": wanted, "action": "create"}
        if consumer.paused_until is not None:
            payload["config"] = wanted | {"pause_until": format_time(consumer.paused_until)}
        subject = _create_subject(log, consumer)
        answer = await self._connection.call(subject, payload)
        if "error" not in answer:
            return
        if answer["error"].get("err_code") == TOO_MANY_CONSUMERS:
            raise BackendError(
                f"stream {log} has as many consumers as it may have ({MAX_CONSUMERS}): "
                f"{answer['error']['description']}"
            )
        if answer["error"].get("err_code") not in CONSUMER_EXISTS:
            raise api_error(subject, answer["error"])
        info = await self._connection.require(f"CONSUMER.INFO.{log}.{consumer.name}")
        warn_of_difference(f"consumer {consumer.name} of {log}", wanted, info["config"])

    async def compare(
        self, log: Log, consumers: Sequence[Consumer], settings: Settings
    ) -> list[Difference]:
        """See `Backend.compare`."""
        return [
            difference
            for _, _, differences in await self._examine(log, consumers, settings)
            for difference in differences
        ]

    async def change(
        self, log: Log, consumers: Sequence[Consumer], settings: Settings
    ) -> list[Difference]:
        """See `Backend.change`."""
        changed: list[Difference] = []
        for subject, found, differences in await self._examine(log, consumers, settings):
            todo = [each for each in differences if each.can_change]
            if todo:
                config = {**found, **{each.key: each.wanted for each in todo}}
                payload: dict[str, Any] = config
                if subject.startswith("CONSUMER"):
                    payload = {"stream_name": log.name, "config": config, "action": "update"}
                await self._connection.require(subject, payload)
                changed += todo
        if changed:
            self._fills.learn(log.name, stream_config(log, settings))
        return changed

    async def _examine(
        self, log: Log, consumers: Sequence[Consumer], settings: Settings
    ) -> list[tuple[str, dict[str, Any], list[Difference]]]:
        """Return for each asset that is there: what changes it, its configuration, differences."""
        info = await self._connection.call(f"STREAM.INFO.{log.name}")
        if info.get("error", {}).get("err_code") == STREAM_MISSING:
            return []
        if "error" in info:
            raise api_error(log.name, info["error"])
        wanted = DEFAULTS | stream_config(log, settings)
        found = info["config"]
        differences = _find_differences(f"stream {log.name}", wanted, found)
        examined = [(f"STREAM.UPDATE.{log.name}", found, differences)]
        for consumer in consumers:
            info = await self._connection.call(f"CONSUMER.INFO.{log.name}.{consumer.name}")
            if "error" in info:
                if info["error"].get("err_code") == CONSUMER_MISSING:
                    continue
                raise api_error(log.name, info["error"])
            asset = f"consumer {consumer.name} of {log.name}"
            differences = _find_differences(asset, consumer_config(consumer), info["config"])
            subject = _create_subject(log.name, consumer)
            examined.append((subject, info["config"], differences))
        return examined

    async def restore_consumer(self, log: str, name: str) -> None:
        """Declare a consumer again that vanished, and its log if that vanished too.

        Do so only if this process has declared them.

        Raises:
            AssetMissing: the log is gone, and it is not one of this process's.
        """
        consumer = self._consumers.get((log, name))
        if consumer is None or not self._declare:
            return
        info = await self._connection.call(f"CONSUMER.INFO.{log}.{name}")
        if "error" not in info:
            return
        if info["error"].get("err_code") == STREAM_MISSING and log in self._logs:
            self.forget(log)
            await self.declare_log(self._logs[log])
            logger.error(
                "stream %s was gone with all that was in it, and has been declared again", log
            )
        elif info["error"].get("err_code") != CONSUMER_MISSING:
            raise api_error(log, info["error"])
        await self._create_consumer(log, consumer)
        self._declared.add((log, name))
        logger.warning("consumer %s of %s was gone and has been declared again", name, log)

    def forget(self, log: str) -> None:
        """Declare the log and its consumers again when next asked: it was deleted."""
        self._declared_logs.discard(log)
        self._declared = {key for key in self._declared if key[0] != log}

    def forget_consumer(self, log: str, name: str) -> None:
        """Declare the consumer again when next asked: it is missing."""
        self._declared.discard((log, name))


def _create_subject(log: str, consumer: Consumer) -> str:
    subject = f"CONSUMER.CREATE.{log}.{consumer.name}"
    return f"{subject}.{consumer.filters[0]}" if len(consumer.filters) == 1 else subject


def warn_of_difference(asset: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Log how an existing asset differs from its declaration.

    It is not changed: others may rely on it.
    """
    different = {
        key: (found.get(key), value)
        for key, value in wanted.items()
        if not _same(found.get(key), value)
    }
    if different:
        what = "; ".join(
            f"{key} is {found!r}, wanted {value!r}" for key, (found, value) in different.items()
        )
        logger.warning("%s exists with other settings and is used as it is: %s", asset, what)


def _same(found: object, wanted: object) -> bool:
    return found == wanted or (not found and not wanted)
