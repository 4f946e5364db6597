"""Events of what leaves no record of its own: told to whoever listens, at most once, and to the listeners of this process."""

from typing import Any

from asyncmq_nats.backends.base import Backend
from asyncmq_nats.encoding import dump_json
from asyncmq_nats.events import PREFIX, event_emitter
from asyncmq_nats.subjects import QueueSubjects, encode_token

__all__ = ["announce"]


async def announce(backend: Backend, subjects: QueueSubjects, what: str, job_id: str, **data: Any) -> None:
    """Tell that something happened to a job. `what`: one of the words in `events.ANNOUNCED`."""
    fields = {"id": job_id, "job_id": job_id, **data}
    backend.signal(subjects.event(what, encode_token(job_id)), dump_json(fields))
    await event_emitter.emit(PREFIX + what, fields | {"queue": subjects.queue})
