"""Names: what a user calls things becomes subjects that mean only that."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncmq_nats.exceptions import InvalidQueueName
from asyncmq_nats.states import OUTCOMES, Place, State
from asyncmq_nats.wire.keys import (
    QueueSubjects,
    counter_name,
    decode_token,
    encode_token,
    fit_token,
    is_token,
    tier_name,
    tier_priority,
)

TEXT = st.text(alphabet=st.characters(codec="utf-8"), min_size=1)
ODD = st.text(alphabet=".*>% \t\n\r\x00\x7f\x85\xa0\u2028\u3000é日a0", min_size=1)
EMAIL = QueueSubjects("amq", "email")


@pytest.mark.parametrize(
    "text",
    ["", "x" * 1025, "." * 342, "\ud800", "é" * 513],
    ids=["empty", "long", "dots", "surrogate", "accents"],
)
def test_what_no_token_can_hold_gets_one_that_stands_for_it(text: str) -> None:
    token = encode_token(text)
    assert not is_token(token)
    assert token.startswith("%h")
    assert len(token) < 70
    assert encode_token(token) == encode_token(decode_token(token)) == fit_token(token) == token
    assert token != encode_token(f"{text}x")


@given(TEXT | ODD)
def test_a_token_decodes_to_what_was_encoded(text: str) -> None:
    assert decode_token(encode_token(text)) == text


@given(TEXT | ODD)
def test_a_token_is_one_token_of_a_subject(text: str) -> None:
    token = encode_token(text)
    assert token
    assert not set(token) & set(".*>")
    assert not any(
        character.isspace() or ord(character) < 32 or character == "\x7f" for character in token
    )


@given(TEXT | ODD, TEXT | ODD)
def test_different_texts_have_different_tokens(one: str, other: str) -> None:
    assert (encode_token(one) == encode_token(other)) == (one == other)


@pytest.mark.parametrize(
    "text", ["order-7", "user@example", "2f7a0c6e-5c0d-4e57-9b5c-0d5b7f6f0a11", "日本"]
)
def test_harmless_ids_are_their_own_tokens(text: str) -> None:
    assert encode_token(text) == text


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("a.b", "a%2Eb"),
        ("100%", "100%25"),
        ("a b", "a%20b"),
        ("*>", "%2A%3E"),
        ("\u3000", "%E3%80%80"),
    ],
)
def test_unsafe_characters_are_percent_encoded_as_utf8(text: str, token: str) -> None:
    assert encode_token(text) == token


@given(TEXT)
def test_any_token_of_a_foreign_producer_decodes_to_something(token: str) -> None:
    assert isinstance(decode_token(token), str)


@given(st.integers())
def test_a_tier_is_named_after_its_priority(priority: int) -> None:
    assert tier_priority(tier_name(priority)) == priority


@pytest.mark.parametrize(
    "name", ["promoter", counter_name("done_failed"), "tier_", "tier_x", "tier_5x", "tier_--5"]
)
def test_other_consumers_are_no_tiers(name: str) -> None:
    assert tier_priority(name) is None


@pytest.mark.parametrize("name", ["a", "email", "Email_2-b", "x" * 64])
def test_a_queue_name_is_part_of_its_streams_names(name: str) -> None:
    subjects = QueueSubjects("amq", name)
    assert subjects.ready_log == f"amq_{name}"
    assert subjects.bucket_log == f"KV_amq_{name}_scheduler"


@pytest.mark.parametrize(
    "name", ["", "x" * 65, "a.b", "a b", "a:b", "a*", "a>", "é", "email\n", "a/b"]
)
def test_a_name_that_no_stream_can_have_is_refused(name: str) -> None:
    with pytest.raises(InvalidQueueName, match=re.escape(repr(name))):
        QueueSubjects("amq", name)


@given(st.integers(), TEXT | ODD)
def test_a_ready_subject_splits_into_priority_and_token(priority: int, job_id: str) -> None:
    token = encode_token(job_id)
    subject = EMAIL.ready(priority, token)
    assert subject.count(".") == 4
    assert EMAIL.split_ready(subject) == (priority, token)


def test_a_foreign_ready_subject_without_a_number_is_no_priority() -> None:
    with pytest.raises(ValueError, match="high"):
        EMAIL.split_ready("amq.email.ready.high.a")


@given(TEXT | ODD)
def test_the_key_of_a_record_tells_whose_it_is(job_id: str) -> None:
    token = encode_token(job_id)
    keys = [
        EMAIL.claim(token),
        *(EMAIL.later(token, place) for place in Place),
        *(EMAIL.outcome(token, state) for state in OUTCOMES),
    ]
    assert [EMAIL.token(key) for key in keys] == [token] * len(keys)


@pytest.mark.parametrize("state", OUTCOMES)
def test_an_outcome_tells_its_state(state: State) -> None:
    key = EMAIL.outcome("a", state)
    assert EMAIL.outcome_state(key) is state
    assert not EMAIL.is_claim(key)


@pytest.mark.parametrize("place", Place)
def test_a_record_in_transit_tells_its_place(place: Place) -> None:
    key = EMAIL.later("a", place)
    assert [other for other in Place if EMAIL.is_later(key, other)] == [place]
    assert EMAIL.outcome_state(key) is None
    assert not EMAIL.is_claim(key)


def test_a_claim_is_no_outcome() -> None:
    assert EMAIL.is_claim(EMAIL.claim("a"))
    assert EMAIL.outcome_state(EMAIL.claim("a")) is None


def test_a_dependent_named_like_an_outcome_is_no_outcome() -> None:
    assert EMAIL.outcome_state("$KV.amq_email_scheduler.done.parent.awaited.completed") is None


def test_queues_whose_names_begin_alike_are_kept_apart() -> None:
    other = QueueSubjects("amq", "email2")
    assert not EMAIL.is_later(other.later("a", Place.DELAYED), Place.DELAYED)
    assert not EMAIL.is_claim(other.claim("a"))
