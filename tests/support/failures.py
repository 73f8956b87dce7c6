"""Assertions on failed calls: the status, its details, and that it carries nothing else."""

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

# The contract's table of the reasons of each status code.
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
    StatusCode.OUT_OF_RANGE: frozenset({"HISTORY_RESTORED"}),
    StatusCode.UNAUTHENTICATED: frozenset({"TOKEN_INVALID"}),
    StatusCode.PERMISSION_DENIED: frozenset({"USER_MISMATCH", "SERVICE_ONLY"}),
    StatusCode.RESOURCE_EXHAUSTED: frozenset({"OVERLOADED", "REQUEST_TOO_LARGE"}),
    StatusCode.UNAVAILABLE: frozenset(
        {"DATABASE_UNAVAILABLE", "KEYS_UNAVAILABLE", "SEARCH_UNAVAILABLE", "DRAINING"}
    ),
    StatusCode.DEADLINE_EXCEEDED: frozenset({"DEADLINE_EXCEEDED"}),
    StatusCode.INTERNAL: frozenset({"INTERNAL"}),
}
REASONS_WITH_RETRY_INFO = {"OVERLOADED", "DATABASE_UNAVAILABLE", "SEARCH_UNAVAILABLE", "DRAINING"}


class Failure(NamedTuple):
    """The details that a client receives of a failed call."""

    code: StatusCode
    message: str
    reason: str
    metadata: dict[str, str]
    fields: list[str]
    """Paths of the rejected fields, in order."""
    descriptions: list[str]
    retry_after: float | None


def read_failure(error: aio.AioRpcError) -> Failure:
    """Parse the details of a failed call and check them against the contract's rules."""
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
        "FIELD_VIOLATION names fields, and no other reason does"
    )
    assert len(retry) <= 1
    if reason in REASONS_WITH_RETRY_INFO:
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
    details = []
    for packed in status.details:
        detail = kind()
        if packed.Unpack(detail):
            details.append(detail)
    return details


async def failure_of(call: Awaitable[object]) -> Failure:
    """Await a call, assert that it fails, and return its failure."""
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    return read_failure(caught.value)


async def assert_fails(call: Awaitable[object], reason: str, **metadata: str | int) -> Failure:
    """Assert that a call fails for this reason, with at least this metadata.

    `read_failure` checks that the status code is that of the reason.
    """
    failure = await failure_of(call)
    assert failure.reason == reason, failure
    assert {key: failure.metadata.get(key) for key in metadata} == {
        key: str(value) for key, value in metadata.items()
    }
    return failure


async def assert_field_violations(call: Awaitable[object], *fields: str) -> Failure:
    """Assert that a call is rejected for exactly these fields, one entry each, in this order."""
    failure = await assert_fails(call, "FIELD_VIOLATION")
    assert failure.fields == list(fields), failure
    return failure
