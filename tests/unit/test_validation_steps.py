"""Validation of requests message by message: the same violations, and bounded work for them."""

from __future__ import annotations

from typing import Any

import protovalidate
import pytest
from chathistory.v1 import document_pb2, message_pb2, session_pb2
from google.protobuf.message import Message

from service.errors import MAX_VIOLATIONS, FieldViolation, InvalidArgument
from service.rpc.validation import RequestValidator

# Dictionaries stand for messages, which the stubs do not know.
Documents: Any = document_pb2
Messages: Any = message_pb2
Sessions: Any = session_pb2

ID = "0192d3a4-0000-7000-8000-000000000001"
BAD_MESSAGE = {"id": "x", "author": "z" * 300, "parts": [{}, {"text": "a\0"}], "token_count": -1}
VALIDATOR = RequestValidator()


async def no_pause() -> None:
    pass


async def violations_of(request: Message, *, is_large: bool) -> tuple[FieldViolation, ...]:
    try:
        if is_large:
            await VALIDATOR.validate_in_turns(request, no_pause)
        else:
            VALIDATOR.validate(request)
    except InvalidArgument as error:
        return error.violations
    return ()


def paths_by_protovalidate(request: Message) -> set[str]:
    paths: set[str] = set()
    for violation in protovalidate.collect_violations(request):
        path = ""
        for element in violation.proto.field.elements:  # type: ignore[union-attr] # it has a field
            path += f".{element.field_name}"
            if element.subscript is not None:
                path += f"[{element.subscript.value}]"
        paths.add(path[1:])
    return paths


def append(messages: list[Any], **fields: Any) -> Any:
    return Messages.AppendMessagesRequest(**{"session_id": ID, "messages": messages} | fields)


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize(
    "request_",
    [
        append([{"role": 1, "content": "x"}]),
        append([]),
        append([BAD_MESSAGE, {"role": 1}, BAD_MESSAGE], session_id="y", user_id="z"),
        append([{"role": 9, "feedback": {"comment": "c" * 5000}}]),
        Documents.CreateDocumentRequest(),
        Documents.CreateDocumentRequest(document={"size_bytes": -1}, chunks=[{"text": ""}]),
        Documents.CreateDocumentRequest(document={}, chunks=[{"text": "x"}]),
        Documents.AppendDocumentChunksRequest(document_id="", first_index=-1),
        Documents.AppendDocumentChunksRequest(
            document_id=ID, chunks=[{"text": "x", "vector": [1.0, float("nan")]}]
        ),
        Documents.SearchDocumentsRequest(document_ids=["x", ID], vector=[float("inf")]),
        Messages.UpdateMessageRequest(session_id=ID, message=BAD_MESSAGE),
        Sessions.CreateSessionRequest(session={"title": "a\0", "id": "b"}),
    ],
    ids=lambda request: type(request).__name__,
)
async def test_violations_are_those_of_the_whole_request(request_: Any, is_large: bool) -> None:
    violations = await violations_of(request_, is_large=is_large)
    assert {violation.field for violation in violations} == paths_by_protovalidate(request_)


@pytest.mark.parametrize("is_large", [False, True])
async def test_list_that_is_too_long_is_the_only_violation(is_large: bool) -> None:
    (violation,) = await violations_of(append([{"id": "x"}] * 101), is_large=is_large)
    assert violation == ("messages", "must contain no more than 100 item(s)")


@pytest.mark.parametrize("is_large", [False, True])
async def test_validation_ends_after_a_number_of_violations(
    is_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    validated: list[str] = []
    violations_in = RequestValidator._violations

    def recorded(validator: Any, path: str, message: Any) -> Any:
        validated.append(path)
        return violations_in(validator, path, message)

    monkeypatch.setattr(RequestValidator, "_violations", recorded)
    request = Documents.AppendDocumentChunksRequest(document_id=ID, chunks=[{}] * 1000)
    violations = await violations_of(request, is_large=is_large)
    assert len(violations) == MAX_VIOLATIONS
    assert len(validated) == MAX_VIOLATIONS + 2


@pytest.mark.parametrize("is_large", [False, True])
async def test_message_of_many_elements_has_one_violation(is_large: bool) -> None:
    chunk = Documents.DocumentChunk(text="x", vector=[float("nan")] * 1000)
    request = Documents.AppendDocumentChunksRequest(document_id=ID, chunks=[chunk])
    (violation,) = await violations_of(request, is_large=is_large)
    assert violation.field == "chunks[0].vector[0]"
