"""Measures the cost of each layer of the pipeline: the same calls with and without it.

The calls run in this process, without gRPC.
"""

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
    """The part of a call's context that the pipeline uses."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._on_done: Callable[[Any], None] = lambda _context: None

    async def read(self) -> bytes:
        return self._data

    @staticmethod
    def time_remaining() -> float:
        return 10.0

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._on_done = callback

    def end(self) -> None:
        self._on_done(self)


class _Method:
    """A method that returns an empty reply, so that only the pipeline is measured."""

    def __init__(self) -> None:
        self._reply = message_pb2.AppendMessagesResponse()

    def __getattr__(self, name: str) -> Call:
        return self._answer

    async def _answer(self, _request: Any, _call: Any) -> Any:
        return self._reply


class _NoAdmission:
    """An admission that admits every call without a check."""

    def enter(self, owner_id: str) -> None:
        pass

    def leave(self, owner_id: str) -> None:
        pass


def _unary(pipeline: Pipeline) -> Call:
    handler = pipeline.handlers(DESCRIPTOR, _Method())["AppendMessages"]
    serve = handler.stream_unary
    assert serve is not None  # noqa: S101 - not a stream

    async def call(request: Any, context: Any) -> Any:
        reply = await serve(request, context)
        context.end()
        return reply

    return call


def _observe() -> Callable[[str, grpc.StatusCode, float], None]:
    """Return a callback that records a call as the metrics do."""
    registry = CollectorRegistry()
    handled = Counter("handled", "", ["grpc_method", "grpc_code"], registry=registry)
    seconds = Histogram("seconds", "", ["grpc_method"], registry=registry)

    def observe(method: str, code: grpc.StatusCode, duration_s: float) -> None:
        handled.labels(method, code.name).inc()
        seconds.labels(method).observe(duration_s)

    return observe


class _KnownCaller:
    """An awaitable that returns a caller immediately, instead of authenticating a call."""

    def __init__(self) -> None:
        self._caller = Caller()

    def __await__(self) -> Generator[None, None, Caller]:
        yield from ()
        return self._caller


def _variants() -> dict[str, Call]:
    """Return the whole pipeline, pipelines without a layer or with metrics, and no pipeline."""
    caller = _KnownCaller()
    unchecked = pipeline()
    # Leaves the layer out: the check of every method does nothing.
    unchecked._request_check = lambda _: lambda *_: None  # type: ignore[method-assign, assignment]  # noqa: SLF001
    return {
        "whole": _unary(pipeline()),
        "telemetry": _unary(pipeline(observe=_observe())),
        "caller": _unary(pipeline(authenticate=lambda _context: caller)),
        "admission": _unary(pipeline(calls=_NoAdmission())),
        "validation": _unary(unchecked),
        "bare": _bare,
    }


async def _bare(_request: Any, context: _Context) -> bytes:
    """Parse the request and serialize the reply, without a pipeline."""
    message_pb2.AppendMessagesRequest.FromString(await context.read())
    return message_pb2.AppendMessagesResponse().SerializeToString()


async def measure() -> dict[str, float]:
    """Return the CPU microseconds that a call spends in the whole pipeline and in each layer."""
    body = workload.append_request()
    variants = _variants()
    costs_us: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, call in variants.items():
            contexts = [_Context(body) for _ in range(CALLS)]
            started = time.process_time()
            for context in contexts:
                await call(None, context)
            costs_us[name].append((time.process_time() - started) / CALLS * 1e6)
            await asyncio.sleep(0)

    def difference(name: str, reference: str) -> float:
        return round(
            median(a - b for a, b in zip(costs_us[name], costs_us[reference], strict=True)), 2
        )

    costs = {"telemetry": difference("telemetry", "whole")}
    costs |= {layer: difference("whole", layer) for layer in ("caller", "admission", "validation")}
    whole = difference("whole", "bare")
    costs["errors and deadline"] = round(
        whole - sum(costs[layer] for layer in ("caller", "admission", "validation")), 2
    )
    return {"whole": whole} | costs
