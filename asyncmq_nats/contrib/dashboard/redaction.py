"""Hides the secrets of jobs: values under keys that look like secrets are not shown.

Pure, but for the tasks of this process, which name the positional arguments.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from asyncmq_nats.context import JobLogLine
from asyncmq_nats.events import Event
from asyncmq_nats.exceptions import InvalidArgument
from asyncmq_nats.tasks import list_tasks

__all__ = ["MASK", "SECRET_KEYS", "Redactor", "Shown", "restore_hidden"]

MASK: Final = "••••••"
"""The text in place of a hidden value."""
SECRET_KEYS: Final = (
    "password", "passwd", "passphrase", "secret", "token", "apikey", "authorization", "cookie",
    "credential", "privatekey", "accesskey", "signature", "cardnumber", "cvv", "iban", "ssn",
)  # fmt: skip
"""A key that contains one of these, whatever its case, dashes and underscores, is hidden."""
MAX_DEPTH: Final = 50
"""Deeper values are hidden."""
FIELDS: Final = ("args", "kwargs", "result", "progress_data", "deduplication", "meta")
ARGUMENTS: Final = frozenset({"arguments", "args", "kwargs", "kwarg"})
"""Options of a command that are arguments of a job, as text: the audit log has them."""


@dataclass(frozen=True, slots=True)
class Shown:
    """Where a value is shown: one field of a job."""

    queue: str
    task: str
    field: str
    """`args`, `kwargs`, `result`, `progress_data`, `deduplication`, `meta`, `error`, `traceback`,
    `log`."""


Hook = Callable[[Any, Shown], Any]


class Redactor:
    """Hides secrets in jobs.

    Args:
        keys: patterns; a value under a key that contains one is hidden.
        hook: called with each field of a job, after the patterns, and where it is shown; returns
            what to show. It sees errors and tracebacks too.

    Raises:
        InvalidArgument: a pattern has neither letters nor digits.
    """

    def __init__(self, keys: Iterable[str] = SECRET_KEYS, hook: Hook | None = None) -> None:
        self._patterns = tuple(_plain(key) for key in keys)
        if not all(self._patterns):
            raise InvalidArgument("a pattern of keys to hide needs letters or digits", list(keys))
        self._hook = hook

    def job(self, queue: str, job: Mapping[str, Any]) -> dict[str, Any]:
        """Return the job as it may be shown."""
        task = str(job.get("task", ""))
        shown = dict(job)
        for field in FIELDS:
            if job.get(field) is not None:
                value = self.hide(job[field])
                if field == "args" and isinstance(value, list):
                    value = self._hide_named(value, _parameters(job))
                shown[field] = self._ask(value, Shown(queue, task, field))
        for field, what in (("last_error", "error"), ("error_traceback", "traceback")):
            if job.get(field) is not None:
                shown[field] = self._ask(job[field], Shown(queue, task, what))
        if job.get("errors"):
            shown["errors"] = [self._failure(each, queue, task) for each in job["errors"]]
        return shown

    def log_line(self, queue: str, task: str, line: JobLogLine) -> JobLogLine:
        """Return a line of a job's log as it may be shown."""
        if self._hook is None:
            return line
        return replace(line, message=str(self._ask(line.message, Shown(queue, task, "log"))))

    def event(self, event: Event) -> Event:
        """Return an event as it may be shown."""
        return replace(event, data=self.job(event.queue, event.data))

    def details(self, details: Mapping[str, Any]) -> dict[str, Any]:
        """Return the details of an entry of the audit log as they may be shown."""
        shown = self.hide(details)
        return {name: MASK if name in ARGUMENTS else each for name, each in shown.items()}

    def hide(self, value: Any, depth: int = 0) -> Any:
        """Return a value without what is under a secret key."""
        if depth > MAX_DEPTH:
            return MASK
        if isinstance(value, Mapping):
            return {
                key: MASK if self.is_secret(str(key)) else self.hide(each, depth + 1)
                for key, each in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.hide(each, depth + 1) for each in value]
        return value

    def is_secret(self, key: str) -> bool:
        """Return whether what is under this key is hidden."""
        plain = _plain(key)
        return any(pattern in plain for pattern in self._patterns)

    def _hide_named(self, args: list[Any], names: tuple[str, ...]) -> list[Any]:
        secret = {index for index, name in enumerate(names) if self.is_secret(name)}
        return [MASK if index in secret else value for index, value in enumerate(args)]

    def _failure(self, failure: Any, queue: str, task: str) -> Any:
        if not isinstance(failure, Mapping):
            return self.hide(failure)
        return dict(failure) | {
            field: self._ask(failure[field], Shown(queue, task, field))
            for field in ("error", "traceback")
            if field in failure
        }

    def _ask(self, value: Any, where: Shown) -> Any:
        return value if self._hook is None else self._hook(value, where)


def _plain(key: str) -> str:
    return "".join(char for char in key.lower() if char.isalnum())


def _parameters(job: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the parameters of a job's positional arguments, if this process knows its task."""
    task = list_tasks().get(str(job.get("task", "")))
    if task is None:
        return ()
    return task.arguments.positions(len(job["args"]), job.get("kwargs") or ())


def restore_hidden(edited: Any, shown: Any, stored: Any) -> Any:
    """Return edited arguments, with what was not shown as it is stored.

    `shown`: the stored ones as the form had them, by the patterns and by the hook.

    Raises:
        InvalidArgument: something is hidden that is not stored at that place.
    """
    if isinstance(edited, dict):
        if isinstance(shown, dict) and isinstance(stored, dict):
            kept = {key: value for key, value in stored.items() if key not in shown}
        else:
            kept, shown, stored = {}, {}, {}
        return kept | {
            key: restore_hidden(value, shown.get(key), stored.get(key))
            for key, value in edited.items()
        }
    if isinstance(edited, list):
        if not (isinstance(shown, list) and isinstance(stored, list)):
            shown, stored = [], []
        missing = [None] * len(edited)
        return [
            restore_hidden(*each)
            for each in zip(edited, [*shown, *missing], [*stored, *missing], strict=False)
        ]
    if edited == shown and shown != stored:
        return stored
    if edited == MASK:
        raise InvalidArgument("a hidden value can only stay where it was", edited)
    return edited
