"""Log records that say which job they are of: for `logging`, without any other package."""

import json
import logging
from datetime import UTC, datetime
from typing import Any, Final

from asyncmq_nats._logging import get_logger
from asyncmq_nats.context import JobContext, running_job
from asyncmq_nats.exceptions import InvalidJob

__all__ = ["FIELDS", "JSONFormatter", "JobFields", "JobLogHandler", "get_logger"]

FIELDS: Final = ("job_id", "task", "queue", "attempt", "worker")
"""The fields that `JobFields` adds to each record."""
TRACE_FIELDS: Final = ("trace_id", "span_id")
STANDARD_FIELDS: Final = frozenset(
    {*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName", *FIELDS, *TRACE_FIELDS}
)
"""The standard fields of a record, which are not its caller's."""
PACKAGE_PREFIX: Final = "asyncmq_nats."


class JobFields(logging.Filter):
    """Puts `job_id`, `task`, `queue`, `attempt` and `worker` into each record that a job logs.

    Add it to a handler: `handler.addFilter(JobFields())`. Records from elsewhere have `""`, so a
    format such as `%(job_id)s` is always filled in. Existing fields of a record stay.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Fill in the fields."""
        context = running_job.get(None)
        for name in FIELDS:
            if not hasattr(record, name):
                setattr(record, name, "" if context is None else _field(context, name))
        return True


def _field(context: JobContext, name: str) -> Any:
    if name == "job_id":
        return context.id
    try:
        return context.task_id if name == "task" else getattr(context, name)
    except InvalidJob:  # a part of it is malformed that is not needed to run it
        return ""


class JSONFormatter(logging.Formatter):
    """Makes one JSON object of each record: a line for collectors of logs.

    `time` (ISO 8601, UTC), `level`, `logger`, `message`, then the job's fields, the trace's, what
    the caller gave as `extra`, and `exception`. Empty ones are left out.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name in (*FIELDS, *TRACE_FIELDS):
            if (value := getattr(record, name, "")) not in ("", None):
                fields[name] = value
        fields |= {key: value for key, value in vars(record).items() if key not in STANDARD_FIELDS}
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        if record.exc_text:
            fields["exception"] = record.exc_text
        if record.stack_info:
            fields["stack"] = self.formatStack(record.stack_info)
        return json.dumps(fields, default=str, ensure_ascii=False)


class JobLogHandler(logging.Handler):
    """Keeps what a job logs with the job, as `current_job().log` does; see `Queue.job_logs`.

    Add it to the root logger, or to those of your tasks. Records from elsewhere are passed over,
    and those of this library.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        context = running_job.get(None)
        if context is None or record.name.startswith(PACKAGE_PREFIX):
            return
        try:
            context.log(self.format(record), record.levelname)
        except Exception:  # as every handler: a line that cannot be kept ends no task
            self.handleError(record)
