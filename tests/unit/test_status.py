"""Statuses of errors: they fit into the trailers of a call, whatever a request holds."""

from __future__ import annotations

import base64
from urllib.parse import quote

import pytest
from chathistory.v1 import session_pb2
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc.error_details_pb2 import BadRequest
from hypothesis import example, given
from hypothesis import strategies as st

from service import errors
from service.errors import MAX_MESSAGE_BYTES, MAX_VIOLATIONS, FieldViolation, InvalidArgument
from service.rpc import field_masks, status

MAX_TRAILER_BYTES = 6 * 1024
"""Clients accept 8 KiB by default; the rest is for other trailers."""
WRITABLE = ("title", "summary", "metadata")

texts = st.text(max_size=3_000) | st.builds(
    lambda character, count: character * count,
    st.characters(exclude_categories=["Cs"]),
    st.integers(0, 100_000),
)


def trailer_bytes(error: errors.ServiceError) -> int:
    """Return the size of an error's trailers as HTTP/2 counts them."""
    _, details = status.of(error)
    encoded = base64.b64encode(details.SerializeToString())
    # grpc-message percent-encodes all bytes but the printable ASCII characters.
    message = quote(error.message, safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~")
    return sum(
        len(name) + size + 32
        for name, size in (
            ("grpc-status", 2),
            ("grpc-message", len(message)),
            ("grpc-status-details-bin", len(encoded)),
        )
    )


@pytest.mark.parametrize("kind", status.CODES)
@given(text=texts, value=texts)
@example(text="語" * 100_000, value="%" * 100_000)
@example(text="\n" * 100_000, value="é" * 100_000)
def test_status_of_every_error_is_bounded(
    kind: type[errors.ServiceError], text: str, value: str
) -> None:
    metadata = {} if kind is InvalidArgument else {"session_id": value, "id": value, "etag": value}
    error = kind(text, **metadata)  # type: ignore[arg-type]
    assert trailer_bytes(error) <= MAX_TRAILER_BYTES
    assert status.of(error)[1].message == error.message


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=200))
@example([("語" * 1000, "語" * 1000)] * 200)
@example([(f"messages[{n}].parts[0].tool_call.arguments", "x" * 300) for n in range(200)])
def test_violations_are_bounded_and_never_empty(pairs: list[tuple[str, str]]) -> None:
    error = InvalidArgument.fields(tuple(FieldViolation(*pair) for pair in pairs))
    assert 1 <= len(error.violations) <= MAX_VIOLATIONS
    assert trailer_bytes(error) <= MAX_TRAILER_BYTES
    if all(len(text.encode()) <= 20 for pair in pairs for text in pair):
        assert len(error.violations) == min(len({field for field, _ in pairs}), MAX_VIOLATIONS)


def test_twenty_usual_violations_are_all_named() -> None:
    violations = tuple(
        FieldViolation(f"messages[{n}].parts[{n}].text", "must be at most 262144 bytes")
        for n in range(30)
    )
    error = InvalidArgument.fields(violations)
    assert error.violations == violations[:MAX_VIOLATIONS]
    assert "and 29 more" in error.message


def test_problems_of_one_field_are_counted_beyond_the_first() -> None:
    violations = tuple(FieldViolation("query", f"problem {n}") for n in range(60))
    (violation,) = InvalidArgument.fields(violations).violations
    assert violation.description.startswith("problem 0; problem 1")
    assert violation.description.endswith("and 55 more")


def test_short_texts_are_not_changed() -> None:
    error = errors.NotFound.message_in("a" * 36, "b" * 36)
    assert error.message == "message not found"
    assert error.metadata == {"session_id": "a" * 36, "message_id": "b" * 36}
    assert len(errors.ServiceError("x" * MAX_MESSAGE_BYTES).message) == MAX_MESSAGE_BYTES


@given(text=texts, max_bytes=st.integers(10, 200))
def test_shortened_text_fits(text: str, max_bytes: int) -> None:
    short = errors.shorten(text, max_bytes)
    assert len(short.encode()) <= max_bytes
    assert short == text or (short.endswith("…") and text.startswith(short[:-1]))


@given(st.lists(texts, max_size=300))
@example([f"unknown_{n}" for n in range(60)])
@example([""] * 1_000)
def test_rejected_update_mask_is_bounded(paths: list[str]) -> None:
    mask = FieldMask(paths=paths)
    if set(paths) <= set(WRITABLE) and len(paths) <= field_masks.MAX_PATHS:
        assert set(field_masks.update_paths(mask, session_pb2.Session(), WRITABLE)) == set(paths)
        return
    with pytest.raises(InvalidArgument) as caught:
        field_masks.update_paths(mask, session_pb2.Session(), WRITABLE)
    (violation,) = caught.value.violations
    assert violation.field == "update_mask"
    assert trailer_bytes(caught.value) <= MAX_TRAILER_BYTES
    assert BadRequest.DESCRIPTOR.name in status.of(caught.value)[1].details[1].type_url
