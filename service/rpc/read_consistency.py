"""The metadata `read_consistency`: whether a call accepts data that may lag."""

from __future__ import annotations

from service.errors import InvalidArgument
from service.rpc.call import Call

READ_CONSISTENCY = "read_consistency"
"""Metadata of reads: `strong`, the default, or `eventual`, which a replica may serve."""


def may_lag(call: Call) -> bool:
    """Return whether a call accepts data that a replica has not received yet.

    Raises:
        InvalidArgument: the metadata has an unknown value.
    """
    value = call.metadata(READ_CONSISTENCY)
    if value in ("", "strong"):
        return False
    if value == "eventual":
        return True
    raise InvalidArgument.field(READ_CONSISTENCY, "must be strong or eventual")
