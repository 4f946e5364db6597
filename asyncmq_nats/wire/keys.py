"""Every subject, key, asset name and header is spelled here, once.

The reference for other languages is `docs/protocol.md`.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import Final

from asyncmq_nats.exceptions import InvalidJobId, InvalidQueueName
from asyncmq_nats.states import OUTCOMES, Place, State

__all__ = [
    "INDEXED",
    "LONGEST_TOKEN",
    "PRIORITY_LIMIT",
    "PROMOTER",
    "Key",
    "Kind",
    "QueueSubjects",
    "audit_bucket",
    "check_job_id",
    "check_queue_name",
    "counter_name",
    "decode_token",
    "encode_token",
    "fit_token",
    "is_token",
    "last_token",
    "metrics_bucket",
    "split_event",
    "split_metrics",
    "tier_name",
    "tier_priority",
    "workers_bucket",
]

QUEUE_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
UNSAFE_CHARACTERS: Final = re.compile(r"[\s.*>%\x00-\x1f\x7f]")
ESCAPED_BYTES: Final = re.compile(r"(?:%[0-9A-Fa-f]{2})+")
STAND_IN: Final = re.compile("%h[0-9a-f]{64}")
PLACES: Final = {str(place): place for place in Place}
ENDS: Final = {str(state): state for state in OUTCOMES}
INDEXED: Final = (State.FAILED, State.EXPIRED, State.CANCELLED)
"""Outcomes with an index entry, `index.<state>.<id>.entry`.

The state comes first: the server finds a few among a million at once.
"""
PROMOTER: Final = "promoter"
TIER: Final = "tier_"
TIER_NAME: Final = re.compile(TIER + "(-?[0-9]+)")
COUNTER: Final = "count_"
PRIORITY_LIMIT: Final = 10**200
"""The bound of priorities: integers below this and above its negative."""
LONGEST_TOKEN: Final = 1024
"""Bytes of a token.

A subject has to fit into a line of NATS's protocol (4,096 bytes by default), and some have two
tokens.
"""


def encode_token(text: str) -> str:
    """Return the text as one subject token.

    `.`, `*`, `>`, `%`, white space and control characters percent-encoded as UTF-8. A text that no
    token can hold (empty, more than `LONGEST_TOKEN` bytes, a lone surrogate) gets a hash as its
    token: see `fit_token`.

    Raises:
        TypeError: it is no text.
    """
    if not isinstance(text, str):
        raise TypeError(f"an id is a str, not {type(text).__name__}")
    if UNSAFE_CHARACTERS.search(text) is None:
        return text if text.isascii() and 0 < len(text) <= LONGEST_TOKEN else fit_token(text)
    if STAND_IN.fullmatch(text) is not None:
        return text
    return fit_token(
        UNSAFE_CHARACTERS.sub(
            lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), text
        )
    )


def is_token(token: str) -> bool:
    """Return whether a job can have this token."""
    if token.isascii() and "%" not in token:  # that of a common id
        return 0 < len(token) <= LONGEST_TOKEN
    try:
        return 0 < len(token.encode()) <= LONGEST_TOKEN and not (
            token.startswith("%h") and STAND_IN.fullmatch(token)
        )
    except UnicodeEncodeError:
        return False


def fit_token(token: str) -> str:
    """Return the token, or a hash of it if no job can have it.

    Records can be kept under the hash, such as the outcome of a foreign job.
    """
    if is_token(token) or STAND_IN.fullmatch(token):
        return token
    return f"%h{sha256(token.encode('utf-8', 'surrogatepass')).hexdigest()}"


def check_job_id(job_id: str) -> None:
    """Refuse an id that no job can have.

    Raises:
        InvalidJobId: it is empty, too long, or no Unicode.
    """
    if not is_token(encode_token(job_id)):
        raise InvalidJobId(
            job_id[:40],
            f"it must be text of 1 to {LONGEST_TOKEN:,} bytes, a blank or a dot counting as three",
        )


def decode_token(token: str) -> str:
    """Return the text that `encode_token` made the token from."""
    if "%" not in token:
        return token
    return ESCAPED_BYTES.sub(
        lambda match: bytes.fromhex(match[0].replace("%", "")).decode("utf-8", "replace"), token
    )


def last_token(subject: str) -> str:
    """Return the last token of a subject: of a ready subject and of an event, that of its job."""
    return subject.rpartition(".")[2]


def split_event(subject: str) -> tuple[str, str]:
    """Return what an event tells, and the token of its job."""
    what, token = subject.split(".")[-2:]
    return what, token


def split_metrics(key: str, begin: int) -> tuple[str, str, str, str]:
    """Return step, token of the queue, start and worker of a key of the history.

    `begin`: length of what all its keys begin with.

    Raises:
        ValueError: it is another key.
    """
    step, queue, _, start, worker = key[begin:].split(".")
    return step, queue, start, worker


def tier_name(priority: int) -> str:
    """Return the name of a tier's consumer."""
    return f"{TIER}{priority}"


def tier_priority(consumer: str) -> int | None:
    """Return the priority of a tier's consumer, or `None` if it is another consumer."""
    match = TIER_NAME.fullmatch(consumer)
    return None if match is None else int(match[1])


def counter_name(word: str) -> str:
    """Return the name of the consumer that counts the records of a place or an outcome."""
    return COUNTER + word


def workers_bucket(prefix: str) -> tuple[str, str]:
    """Return the log of the worker registry, and what its keys begin with."""
    return f"KV_{prefix}_workers", f"$KV.{prefix}_workers."


def metrics_bucket(prefix: str) -> tuple[str, str]:
    """Return the log of the history of what workers did, and what its keys begin with."""
    return f"KV_{prefix}_metrics", f"$KV.{prefix}_metrics."


def audit_bucket(prefix: str) -> tuple[str, str]:
    """Return the log of what operators did, and what its keys begin with."""
    return f"KV_{prefix}_audit", f"$KV.{prefix}_audit."


def check_queue_name(name: object) -> str:
    """Return the name of a queue.

    Raises:
        InvalidQueueName: it is not 1 to 64 characters out of letters, digits, `_` and `-`.
    """
    if not isinstance(name, str) or QUEUE_NAME.fullmatch(name) is None:
        raise InvalidQueueName(name)
    return name


class Kind(StrEnum):
    """The kind of a key or a ready subject."""

    READY = "ready"
    LATER = "later"
    OUTCOME = "outcome"
    CLAIM = "claim"
    EDGE = "edge"
    REPEAT = "repeat"
    TICK = "tick"
    FIRE = "fire"
    WINDOW = "dedup"
    PROGRESS = "progress"
    QUEUE = "queue"
    WAIT = "wait"
    PLAN = "plan"
    PLAN_DUE = "plan due"
    INDEX = "index"
    OTHER = "other"


SINGLE_KINDS: Final = {
    str(kind): kind
    for kind in (
        Kind.REPEAT,
        Kind.TICK,
        Kind.FIRE,
        Kind.WINDOW,
        Kind.PROGRESS,
        Kind.QUEUE,
        Kind.PLAN,
    )
}
"""Kinds whose keys are `<kind>.<token>`."""
PLAN_MARK: Final = "%p"
"""Begins the token of a plan that is due.

No encoded id begins so, a `%` is followed by two digits.
"""


@dataclass(frozen=True, slots=True)
class Key:
    """A key, read.

    `token`: of the job, the repeatable, the window or the plan; of an edge's parent.
    """

    kind: Kind
    token: str
    place: Place | None = None
    state: State | None = None
    child: str = ""
    """Token of the child of an edge."""


class QueueSubjects:
    """The names of one queue.

    Raises:
        InvalidQueueName: see `check_queue_name`.
    """

    def __init__(self, prefix: str, queue: str) -> None:
        self.queue = check_queue_name(queue)
        self.ready_log = f"{prefix}_{queue}"
        self.bucket = f"{prefix}_{queue}_scheduler"
        self.bucket_log = f"KV_{self.bucket}"
        self.all_ready = f"{prefix}.{queue}.ready.*.*"
        self.all_bucket = f"$KV.{self.bucket}.>"
        self._bucket_key = f"$KV.{self.bucket}."
        self._ready = f"{prefix}.{queue}.ready."
        self._later = f"$KV.{self.bucket}.later."
        self._done = f"$KV.{self.bucket}.done."
        self._event = f"{prefix}.{queue}.event."
        self._control = f"{prefix}.{queue}.control."

    def parse(self, subject: str) -> Key:
        """Read a key of the bucket or a ready subject. The only place that tests what a key is.

        A key that this library does not write is `Kind.OTHER`: a job's id can be any word.
        """
        if subject.startswith(self._ready):
            return Key(Kind.READY, subject[len(self._ready) :].partition(".")[2])
        if not subject.startswith(self._bucket_key):
            return Key(Kind.OTHER, "")
        return _parse_bucket_key(subject[len(self._bucket_key) :].split("."))

    def outcome_state(self, key: str) -> State | None:
        """Return the state that the key of an outcome stands for; `None` for another key."""
        return self.parse(key).state

    def is_edge(self, key: str) -> bool:
        """Return whether this is the key of an edge."""
        return self.parse(key).kind is Kind.EDGE

    def is_claim(self, key: str) -> bool:
        """Return whether this is the key of a claim."""
        return self.parse(key).kind is Kind.CLAIM

    def is_later(self, key: str, place: Place) -> bool:
        """Return whether this is the key of a job at that place."""
        return self.parse(key).place is place

    def is_done(self, key: str) -> bool:
        """Return whether the key is about the end of a job: outcome, claim or edge."""
        return key.startswith(self._done)

    def is_repeat(self, key: str) -> bool:
        """Return whether this is the key of a repeatable's definition."""
        return self.parse(key).kind is Kind.REPEAT

    def is_fire(self, key: str) -> bool:
        """Return whether this is the key of a tick that is due."""
        return self.parse(key).kind is Kind.FIRE

    def rid(self, key: str) -> str:
        """Return the id of the repeatable that a key is about."""
        return decode_token(self.parse(key).token)

    def token(self, key: str) -> str:
        """Return the token of the job that a key of the bucket is about."""
        return self.parse(key).token

    # -- ready

    def ready(self, priority: int, token: str) -> str:
        """Return where a job waits to be run. `token`: its encoded id."""
        return f"{self._ready}{priority}.{token}"

    def ready_any(self, token: str) -> str:
        """Return the filter for a job that is ready, whatever its tier."""
        return f"{self._ready}*.{token}"

    def tier(self, priority: int) -> str:
        """Return the filter for a tier."""
        return f"{self._ready}{priority}.*"

    def split_ready(self, subject: str) -> tuple[int, str]:
        """Return priority and token of a ready subject.

        Raises:
            ValueError: the priority is no integer.
        """
        priority, _, token = subject[len(self._ready) :].partition(".")
        return int(priority), token

    def tier_of(self, subject: str) -> int | None:
        """Return the priority of a ready subject, `None` if it is none as we write them.

        No tier can match that.
        """
        word = subject[len(self._ready) :].partition(".")[0][:210]
        priority = tier_priority(TIER + word)
        return priority if str(priority) == word and abs(int(word)) < PRIORITY_LIMIT else None

    # -- later

    def later(self, token: str, place: Place) -> str:
        """Return the key of a job in transit."""
        return f"{self._later}{token}.{place}"

    def later_all(self, token: str) -> str:
        """Return the filter for a job in transit."""
        return f"{self._later}{token}.>"

    def place(self, place: Place) -> str:
        """Return the filter for all jobs at a place."""
        return f"{self._later}*.{place}"

    # -- done

    def outcome(self, token: str, state: State) -> str:
        """Return the key of an outcome."""
        return self._done + token + "." + state  # to format a `State` takes three times as long

    def claim(self, token: str) -> str:
        """Return the key of the claim on a job that was delivered again."""
        return f"{self._done}{token}.claim"

    def index(self, token: str, state: State) -> str:
        """Return the key of the index entry of an outcome.

        `completed` ones, the many, have none.
        """
        return f"{self._bucket_key}index.{state}.{token}.entry"

    def indexed(self, state: State) -> str:
        """Return the filter for the index entries of a state in `INDEXED`."""
        return f"{self._bucket_key}index.{state}.*.entry"

    def indexed_key(self, entry: str) -> str:
        """Return the key of the outcome that an index entry stands for."""
        state, token, _ = entry[len(self._bucket_key) + len("index.") :].split(".")
        return f"{self._done}{token}.{state}"

    def done_all(self, token: str) -> str:
        """Return the filter for the records of the job's end: outcome, claim, edges."""
        return f"{self._done}{token}.>"

    def outcomes(self, state: State) -> str:
        """Return the filter for all outcomes of a kind."""
        return f"{self._done}*.{state}"

    def ends(self, token: str) -> str:
        """Return the filter for the records of the job's end, without edges to its children."""
        return f"{self._done}{token}.*"

    def edge(self, parent: str, child: str) -> str:
        """Return the key that says that one job waits for another; the child may be `*`."""
        return f"{self._done}{parent}.awaited.{child}"

    # -- children with many parents, and flows

    def wait(self, child: str, place: str) -> str:
        """Return the key of one part of the parents of a child with many parents."""
        return f"{self._bucket_key}wait.{child}.{place}"

    def split_wait(self, key: str) -> tuple[str, str]:
        """Return the token of the parts and the number of one of them, out of its key."""
        token, number = key.split(".")[-2:]
        return token, number

    def wait_all(self, child: str) -> str:
        """Return the filter for all such parts; the child may be `*`."""
        return f"{self._bucket_key}wait.{child}.>"

    def plan(self, token: str) -> str:
        """Return the key of a flow that is being added, which has a timer."""
        return f"{self._bucket_key}plan.{token}"

    def plan_due(self, token: str) -> str:
        """Return the key of a flow that was not added in time: promoters finish it."""
        return f"{self._bucket_key}fire.{PLAN_MARK}{token}"

    # -- repeatables

    def repeat(self, token: str) -> str:
        """Return the key of a repeatable's definition. `token`: its encoded id."""
        return f"{self._bucket_key}repeat.{token}"

    def tick(self, token: str) -> str:
        """Return the key of its next tick, which has a timer."""
        return f"{self._bucket_key}tick.{token}"

    def fire(self, token: str) -> str:
        """Return the key of a tick that is due."""
        return f"{self._bucket_key}fire.{token}"

    # -- the queue itself

    @property
    def rate_limit(self) -> str:
        """The key of the token bucket."""
        return f"{self._bucket_key}queue.limit"

    @property
    def ballast(self) -> str:
        """The key of the record that makes room for outcomes when the store is full."""
        return f"{self._bucket_key}queue.ballast"

    @property
    def pause(self) -> str:
        """The key that says until when the queue is paused."""
        return f"{self._bucket_key}queue.pause"

    @property
    def configuration(self) -> str:
        """The key of the settings that the queue keeps for all its workers."""
        return f"{self._bucket_key}queue.config"

    @property
    def secret(self) -> str:
        """The key of the secret that message ids are made with."""
        return f"{self._bucket_key}queue.secret"

    def deduplication(self, token: str) -> str:
        """Return the key of a window in which a job is not added twice."""
        return f"{self._bucket_key}dedup.{token}"

    def progress(self, token: str) -> str:
        """Return the key of the progress of a running job."""
        return f"{self._bucket_key}progress.{token}"

    def job_log(self, token: str, attempt: int | str) -> str:
        """Return the key of the lines that an attempt kept; the attempt may be `*`."""
        return f"{self._bucket_key}log.{token}.{attempt}.lines"

    # -- signals

    def event_of(self, key: str, token: str) -> str:
        """Return where the server tells of a record of a job: an outcome, or one in transit."""
        return self.event(last_token(key), token)

    def log_of(self, subject: str) -> str:
        """Return the log that keeps a subject of the queue."""
        return self.bucket_log if subject.startswith(self._bucket_key) else self.ready_log

    def event(self, what: str, token: str) -> str:
        """Return the subject of an event of a job; both may be wildcards."""
        return f"{self._event}{what}.{token}"

    def control(self, what: str) -> str:
        """Return the subject of a signal to the queue's workers."""
        return f"{self._control}{what}"

    @property
    def republish_ready(self) -> tuple[str, str]:
        """The rule that makes an event of each job that becomes ready."""
        return self.all_ready, f"{self._event}{State.WAITING}.{{{{wildcard(2)}}}}"

    @property
    def republish_bucket(self) -> tuple[str, str]:
        """The rule that makes an event of each key `<place>.<id>.<word>`."""
        return f"$KV.{self.bucket}.*.*.*", f"{self._event}{{{{wildcard(3)}}}}.{{{{wildcard(2)}}}}"


def _parse_bucket_key(words: list[str]) -> Key:
    match words:
        case ["later", token, word] if word in PLACES:
            return Key(Kind.LATER, token, place=PLACES[word])
        case ["done", token, word] if word in ENDS:
            return Key(Kind.OUTCOME, token, state=ENDS[word])
        case ["done", token, "claim"]:
            return Key(Kind.CLAIM, token)
        case ["done", token, "awaited", child]:
            return Key(Kind.EDGE, token, child=child)
        case ["index", word, token, "entry"] if word in ENDS:
            return Key(Kind.INDEX, token)
        case _:
            return _parse_other_key(words)


def _parse_other_key(words: list[str]) -> Key:
    match words:
        case ["wait", child, _, _]:
            return Key(Kind.WAIT, child)
        case ["fire", token] if token.startswith(PLAN_MARK):
            return Key(Kind.PLAN_DUE, token[len(PLAN_MARK) :])
        case [word, token] if word in SINGLE_KINDS:
            return Key(SINGLE_KINDS[word], token)
        case [_, token, *_]:
            return Key(Kind.OTHER, token)
        case _:
            return Key(Kind.OTHER, "")
