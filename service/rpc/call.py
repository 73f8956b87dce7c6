"""`Call`: the caller and the deadline, which a method gets together with its request."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from service.auth.caller import Caller


@dataclass(slots=True)
class Call:
    """The caller and the deadline of one call."""

    caller: Caller
    deadline: float
    """When the reply is due, in seconds on the running loop's clock."""


UnaryMethod = Callable[[Any, Call], Awaitable[Any]]
StreamMethod = Callable[[Any, Call], AsyncGenerator[Any]]
