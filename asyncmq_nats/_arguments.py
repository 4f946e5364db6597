"""Checks the arguments of `Queue` methods, and builds the job."""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from operator import is_
from typing import Any, Final

from asyncmq_nats._new_jobs import Addition, JobTemplate, NewJob
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.jobs import (
    LATEST_TIME,
    Backoff,
    Job,
    new_job,
    new_job_id,
    validate_custom_job_id,
)
from asyncmq_nats.schedules import parse_every
from asyncmq_nats.states import State
from asyncmq_nats.wire.arguments import write_by_class

__all__ = [
    "WriteArguments",
    "build_addition",
    "checked_args",
    "checked_call",
    "checked_mapping",
    "checked_meta",
    "checked_number",
    "checked_seconds",
    "job_of_payload",
    "write_plainly",
]

NOT_IN_PAYLOADS: Final = ("delay", "debounce", "jobId")
"""Parameters of `add` that a job as a dict does not have: they are refused, not dropped."""
TEMPLATES_KEPT: Final = 256
META_LIMIT: Final = 8_192
"""How many bytes (UTF-8) the names and values of a job's `meta` may have together."""
FIELDS: Final = frozenset({field.name for field in fields(Job)} | {"id", "task"})


WriteArguments = Callable[[str, Sequence[Any], Mapping[str, Any]], tuple[list[Any], dict[str, Any]]]
"""Encodes the arguments of a task as plain data that arrives equal: `TaskRegistry.write`."""


def write_plainly(
    task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Write the arguments of a task that is not known here."""
    return write_by_class(args, kwargs, task_id)


def build_addition(
    now: float,
    latest: float | None = None,
    *,
    write: WriteArguments = write_plainly,
    task_id: str,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    retries: int = 0,
    ttl: float | None = None,
    backoff: float | Backoff | None = None,
    priority: int = 5,
    delay: float | None = None,
    job_id: str | None = None,
    timeout: float | None = None,
    depends_on: Sequence[str] | None = None,
    on_parent_failure: str = "wait",
    repeat_every: float | str | None = None,
    meta: Mapping[str, str] | None = None,
) -> Addition:
    """Return a new job from the parameters of `Queue.add`.

    `now`: in Unix seconds. `latest`: the time from which `delay` counts, by default `now`; see
    `Backend.now_at_most`.

    Options that were valid for an earlier job are not checked again.

    Raises:
        NotSerializable: an argument would not arrive equal; the message names it.
        InvalidArgument: a value is of the wrong kind; the message names it.
        TypeError: the job_id is no string.
        InvalidJobId: it is outside AsyncMQ's rules.
    """
    if isinstance(depends_on, str):
        depends_on = [depends_on]
    delay = None if delay is None else checked_seconds(delay, "delay")
    args, kwargs = checked_call(write, task_id, args, kwargs)
    own_id = new_job_id() if job_id is None else validate_custom_job_id(job_id)
    delay_until = None
    if delay is not None and delay > 0:
        delay_until = (now if latest is None else latest) + delay
    options = (
        task_id,
        retries,
        backoff,
        ttl,
        timeout,
        priority,
        on_parent_failure,
        repeat_every,
        job_id is None,
    )
    template = None if depends_on is not None else _templates.find(options)
    if template is not None and (delay_until is None or delay_until <= LATEST_TIME):
        return NewJob(template, own_id, args, kwargs, now, delay_until, checked_meta(meta))
    job = new_job(
        task_id=task_id,
        args=args,
        kwargs=kwargs,
        max_retries=retries,
        backoff=backoff,
        ttl=ttl,
        timeout=timeout,
        job_id=own_id,
        created_at=now,
        priority=priority,
        delay_until=delay_until,
        custom_id=job_id is not None,
        depends_on=checked_args(depends_on, "depends_on"),
        on_parent_failure=on_parent_failure,
        repeat_every=None if repeat_every is None else parse_every(repeat_every),
        meta=checked_meta(meta),
    )
    if depends_on is None:
        _templates.keep(options, job)
    return job


class Templates:
    """The templates of kinds of jobs that were added: by their options, all but the arguments."""

    def __init__(self) -> None:
        self._known: dict[Hashable, JobTemplate] = {}
        self._latest: tuple[tuple[object, ...], JobTemplate] | None = None
        """The options of the last job, and its template: as a rule the next one is like it."""

    def find(self, options: tuple[object, ...]) -> JobTemplate | None:
        """Return the template of jobs with these options, if one was kept."""
        # The very same objects are found four times as fast as equal ones.
        if self._latest is not None and all(map(is_, self._latest[0], options)):
            return self._latest[1]
        try:
            found = self._known.get(self._key(options))
        except TypeError:  # a value that cannot be hashed
            return None
        if found is not None:
            self._latest = options, found
        return found

    def keep(self, options: tuple[object, ...], job: Job) -> None:
        """Keep the template of a job."""
        if len(self._known) >= TEMPLATES_KEPT:
            self._known.clear()
        with suppress(TypeError):  # see above
            self._known[self._key(options)] = JobTemplate(job)

    @staticmethod
    def _key(options: tuple[object, ...]) -> Hashable:
        return options, tuple(map(type, options))  # 1, 1.0 and True are equal


_templates = Templates()


def checked_call(
    write: WriteArguments,
    task_id: Any,
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any] | None,
) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of a call as plain data.

    Raises:
        InvalidArgument: they are no list and no dict.
        NotSerializable: one would not arrive equal; the message names it.
    """
    named: dict[Any, Any] = {} if kwargs is None else checked_mapping(kwargs, "kwargs")
    for name in named:
        if not isinstance(name, str):
            raise InvalidArgument("kwargs: the name of an argument must be a text", name)
    return write(task_id, checked_args(args, "args"), named)


def job_of_payload(
    payload: Mapping[str, Any], now: float, write: WriteArguments = write_plainly
) -> Job:
    """Return a new job from the dict that `Queue.enqueue` is given.

    It has the keys of `Job.to_dict` or the fields of `Job`. `now`: Unix seconds.

    Raises:
        InvalidArgument: it is no dict, has no task, or a value of the wrong kind.
    """
    given = checked_mapping(payload, "a job")
    for name in NOT_IN_PAYLOADS:
        if given.get(name) is not None:
            raise InvalidArgument(
                f"a job given as a dict takes no {name!r}: use Queue.add, or delay_until, a time",
                given[name],
            )
    values = {"max_retries": given.get("retries", 0), "backoff": None, "created_at": now} | given
    if values.get("repeat_every") is not None:
        values["repeat_every"] = parse_every(values["repeat_every"])
    values |= {
        "retries": 0,
        "status": State.WAITING,
        "custom_id": given.get("id", given.get("job_id")) is not None,
    }
    values["meta"] = checked_meta(values.get("meta"))
    task_id = values.get("task", values.get("task_id", ""))
    values["args"], values["kwargs"] = checked_call(
        write, task_id, values.get("args"), values.get("kwargs")
    )
    return new_job(**{name: value for name, value in values.items() if name in FIELDS})


def checked_args(args: object, name: str) -> list[Any]:
    """Return the items of a list, a tuple or an ordered iterable as a list.

    `None` makes an empty list.

    Raises:
        InvalidArgument: it is none of these. A text is one argument, not its letters.
    """
    if type(args) is list:
        return args.copy()
    if args is None:
        return []
    if isinstance(args, list | tuple) or (
        isinstance(args, Sequence | Iterator) and not isinstance(args, str | bytes | bytearray)
    ):
        return list(args)
    raise InvalidArgument(
        f"{name} must be a list or a tuple, also of a single one: {name}=[…]", args
    )


def checked_mapping(value: object, name: str) -> dict[str, Any]:
    """Return a mapping as a dict.

    Raises:
        InvalidArgument: it is none.
    """
    if isinstance(value, Mapping):
        return dict(value)
    raise InvalidArgument(f"{name} must be a dict", value)


def checked_meta(value: object) -> dict[str, str]:
    """Return the `meta` of a job: a dict of strings, of 8,192 bytes at most; none is an empty one.

    Raises:
        InvalidArgument: it is none, or larger.
    """
    if value is None:
        return {}
    meta: dict[Any, Any] = checked_mapping(value, "meta")
    size = 0
    for name, text in meta.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise InvalidArgument("meta must be a dict of strings", {name: text})
        try:
            size += len(name.encode()) + len(text.encode())
        except UnicodeEncodeError:
            raise InvalidArgument("meta must be of valid Unicode", {name: text}) from None
    if size > META_LIMIT:
        raise InvalidArgument(
            f"meta must have {META_LIMIT:,} bytes at most, names and values together", size
        )
    return meta


def checked_seconds(value: object, name: str) -> float:
    """Return a number of seconds.

    Raises:
        InvalidArgument: it is no finite number. Pass `total_seconds()` of a `timedelta`.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            seconds = float(value)
        except OverflowError:
            seconds = math.inf
        if math.isfinite(seconds):
            return seconds
    raise InvalidArgument(f"{name} must be a number of seconds", value)


def checked_number(value: object, name: str, least: int = 0) -> int:
    """Return an integer.

    Raises:
        InvalidArgument: it is none, or less than `least`.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return value
    raise InvalidArgument(f"{name} must be an integer, {least} or more", value)
