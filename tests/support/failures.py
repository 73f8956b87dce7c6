"""Asserts on failed calls: the status, its details, and that nothing else is in it."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import NamedTuple, TypeVar

import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode, aio
from grpc_status import rpc_status

Detail = TypeVar("Detail", ErrorInfo, BadRequest, RetryInfo)
DOMAIN = "chathistory.v1"

# The contract's table: which reasons come with which code.
TABLE: dict[StatusCode, frozenset[str]] = {
    StatusCode.INVALID_ARGUMENT: frozenset(
        {"FIELD_VIOLATION", "BAD_PAGE_TOKEN", "MALFORMED_REQUEST"}
    ),
    StatusCode.NOT_FOUND: frozenset(
        {"USER_NOT_FOUND", "SESSION_NOT_FOUND", "MESSAGE_NOT_FOUND", "DOCUMENT_NOT_FOUND"}
    ),
    StatusCode.ALREADY_EXISTS: frozenset(
        {"EMAIL_TAKEN", "EXTERNAL_ID_TAKEN", "ID_TAKEN", "MESSAGE_ID_REUSED"}
    ),
    StatusCode.ABORTED: frozenset({"ETAG_MISMATCH", "LAST_SEQ_MISMATCH", "CONTENTION"}),
    StatusCode.FAILED_PRECONDITION: frozenset({"SESSION_ARCHIVED", "SEARCH_DISABLED"}),
    StatusCode.UNAUTHENTICATED: frozenset({"TOKEN_INVALID"}),
    StatusCode.PERMISSION_DENIED: frozenset({"USER_MISMATCH", "SERVICE_ONLY"}),
    StatusCode.RESOURCE_EXHAUSTED: frozenset({"OVERLOADED", "REQUEST_TOO_LARGE"}),
    StatusCode.UNAVAILABLE: frozenset(
        {"DATABASE_UNAVAILABLE", "KEYS_UNAVAILABLE", "SEARCH_UNAVAILABLE", "DRAINING"}
    ),
    StatusCode.DEADLINE_EXCEEDED: frozenset({"DEADLINE_EXCEEDED"}),
    StatusCode.INTERNAL: frozenset({"INTERNAL"}),
}
WAITING_HELPS = {"OVERLOADED", "DATABASE_UNAVAILABLE", "SEARCH_UNAVAILABLE", "DRAINING"}


class Failure(NamedTuple):
    """What a client is told about a call that failed."""

    code: StatusCode
    message: str
    reason: str
    metadata: dict[str, str]
    fields: list[str]
    """Paths of the refused fields, in order."""
    descriptions: list[str]
    retry_after: float | None


def read_failure(error: aio.AioRpcError) -> Failure:
    """Read the details of a failed call, and check that they are as the contract says of every error."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None, f"no google.rpc.Status: {error.code()} {error.details()}"
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    info, bad_request, retry = (
        _unpack(status, ErrorInfo),
        _unpack(status, BadRequest),
        _unpack(status, RetryInfo),
    )
    assert len(status.details) == len(info) + len(bad_request) + len(retry), (
        "a detail of another type"
    )
    assert len(info) == 1
    assert info[0].domain == DOMAIN
    reason = info[0].reason
    assert reason in TABLE[error.code()], f"{error.code()} with {reason}: {error.details()}"
    assert len(bad_request) == (reason == "FIELD_VIOLATION"), (
        "field errors name the fields, and nothing else does"
    )
    assert len(retry) <= 1
    if reason in WAITING_HELPS:
        assert retry, f"{reason} without RetryInfo"
    violations = bad_request[0].field_violations if bad_request else []
    assert reason != "FIELD_VIOLATION" or violations
    return Failure(
        error.code(),
        error.details() or "",
        reason,
        dict(info[0].metadata),
        [violation.field for violation in violations],
        [violation.description for violation in violations],
        retry[0].retry_delay.ToTimedelta().total_seconds() if retry else None,
    )


def _unpack(status: Status, kind: type[Detail]) -> list[Detail]:
    found = []
    for detail in status.details:
        unpacked = kind()
        if detail.Unpack(unpacked):
            found.append(unpacked)
    return found


async def failure_of(call: Awaitable[object]) -> Failure:
    """Wait for a call that must fail and return how."""
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    return read_failure(caught.value)


async def assert_fails(call: Awaitable[object], reason: str, **metadata: str | int) -> Failure:
    """Wait for a call that must fail for this reason; the code follows from the contract's table."""
    found = await failure_of(call)
    assert found.reason == reason, found
    assert {key: found.metadata.get(key) for key in metadata} == {
        key: str(value) for key, value in metadata.items()
    }
    return found


async def assert_field_violations(call: Awaitable[object], *fields: str) -> Failure:
    """Wait for a call that must be refused for exactly these fields, one entry each, in this order."""
    found = await assert_fails(call, "FIELD_VIOLATION")
    assert found.fields == list(fields), found
    return found
