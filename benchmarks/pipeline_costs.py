"""What each layer of the pipeline costs: the same calls with and without it, in this process, nothing of gRPC around them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator
from statistics import median
from typing import Any

import grpc
from chathistory.v1 import message_pb2
from prometheus_client import CollectorRegistry, Counter, Histogram

from benchmarks import workload
from benchmarks.servers.pipeline_echo import pipeline
from service.auth.caller import Caller
from service.rpc.pipeline import Pipeline
from service.rpc.servicer import DESCRIPTOR

CALLS = 5000
"""Calls in one measurement."""
ROUNDS = 9

Call = Callable[[Any, Any], Awaitable[Any]]


class _Context:
    """What the pipeline asks of a call's context."""

    @staticmethod
    def time_remaining() -> float:
        return 10.0


class _Method:
    """Answers with nothing, so that only the pipeline is measured."""

    def __init__(self) -> None:
        self._reply = message_pb2.AppendMessagesResponse()

    def __getattr__(self, name: str) -> Call:
        return self._answer

    async def _answer(self, _request: Any, _call: Any) -> Any:
        return self._reply


class _Open:
    """An admission that looks at nothing."""

    def enter(self, whose: str) -> None:
        pass

    def leave(self, whose: str) -> None:
        pass


def _unary(made: Pipeline) -> Call:
    handler = made.handlers(DESCRIPTOR, _Method())["AppendMessages"]
    assert handler.unary_unary is not None  # noqa: S101 - it is no stream
    return handler.unary_unary


def _observe() -> Callable[[str, grpc.StatusCode, float], None]:
    """Return what the metrics do with a call, without a listener."""
    registry = CollectorRegistry()
    handled = Counter("handled", "", ["grpc_method", "grpc_code"], registry=registry)
    seconds = Histogram("seconds", "", ["grpc_method"], registry=registry)

    def observe(method: str, code: grpc.StatusCode, took: float) -> None:
        handled.labels(method, code.name).inc()
        seconds.labels(method).observe(took)

    return observe


class _Anybody:
    """Something to await that is there at once, in place of the question who calls."""

    def __init__(self) -> None:
        self._caller = Caller()

    def __await__(self) -> Generator[None, None, Caller]:
        yield from ()
        return self._caller


def _variants() -> dict[str, Call]:
    """Return the pipeline whole, without each of its layers, with metrics, and the method with nothing around it."""
    anybody = _Anybody()
    unchecked = pipeline()
    unchecked._check = lambda _: lambda *_: None  # type: ignore[method-assign, assignment]  # noqa: SLF001 - the layer to leave out
    return {
        "whole": _unary(pipeline()),
        "telemetry": _unary(pipeline(observe=_observe())),
        "caller": _unary(pipeline(authenticate=lambda _context: anybody)),
        "admission": _unary(pipeline(calls=_Open())),
        "validation": _unary(unchecked),
        "bare": _Method()._answer,  # noqa: SLF001 - the method itself
    }


async def measure() -> dict[str, float]:
    """Return the CPU microseconds that a call spends in the whole pipeline and in each layer."""
    sent = workload.append_request()
    context = _Context()
    variants = _variants()
    took: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, call in variants.items():
            # New ones each time: a message that has been looked at before costs less.
            requests = [message_pb2.AppendMessagesRequest.FromString(sent) for _ in range(CALLS)]
            started = time.process_time()
            for request in requests:
                await call(request, context)
            took[name].append((time.process_time() - started) / CALLS * 1e6)
            await asyncio.sleep(0)

    def difference(one: str, other: str) -> float:
        return round(median(a - b for a, b in zip(took[one], took[other], strict=True)), 2)

    costs = {"telemetry": difference("telemetry", "whole")}
    costs |= {layer: difference("whole", layer) for layer in ("caller", "admission", "validation")}
    whole = difference("whole", "bare")
    costs["errors and deadline"] = round(
        whole - sum(costs[layer] for layer in ("caller", "admission", "validation")), 2
    )
    return {"whole": whole} | costs
