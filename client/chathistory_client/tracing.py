"""Propagation of the W3C trace context.

Calls send the context set with `trace_context`, else OpenTelemetry's current context if the program
uses OpenTelemetry.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Headers = tuple[tuple[str, str], ...]

_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)
_PRINTABLE = re.compile(r"[\x20-\x7e]{1,512}")

_context: ContextVar[Headers] = ContextVar("chathistory_trace_context", default=())


@contextmanager
def trace_context(traceparent: str | None, tracestate: str | None = None) -> Iterator[None]:
    """Send the given trace context with every call in the block. Malformed headers are ignored.

    >>> with trace_context("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"):
    ...     session = await client.create_session(user_id=user_id)

    Args:
        traceparent: The `traceparent` header of an incoming request. None for no context.
        tracestate: The `tracestate` header that belongs to it.
    """
    headers: list[tuple[str, str]] = []
    if traceparent is not None and _TRACEPARENT.fullmatch(traceparent):
        headers.append(("traceparent", traceparent))
        if tracestate is not None and _PRINTABLE.fullmatch(tracestate):
            headers.append(("tracestate", tracestate))
    token = _context.set(tuple(headers))
    try:
        yield
    finally:
        _context.reset(token)


def headers() -> Headers:
    """Return the trace headers for a call that starts now."""
    if explicit := _context.get():
        return explicit
    # Looked up instead of imported, so that programs without OpenTelemetry do not load it.
    propagate = sys.modules.get("opentelemetry.propagate")
    if propagate is None:
        return ()
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple(
        (key.lower(), value) for key, value in carrier.items() if _PRINTABLE.fullmatch(value)
    )
