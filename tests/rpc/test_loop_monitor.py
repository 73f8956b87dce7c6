"""The monitor of the event loop: it names what holds the loop, once, and measures the lag."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from service.rpc import convert
from service.server import Server
from service.telemetry.loop_monitor import LoopMonitor
from tests.support.chat import Chat
from tests.support.servers import serving

Logs = list[Any]


def events(logs: Logs, event: str) -> Logs:
    return [line for line in logs if line["event"] == event]


def is_logged(logs: Logs, event: str, count: int) -> bool:
    return len(events(logs, event)) == count


def hold_until(condition: Callable[[], object]) -> None:
    """Hold the loop until another thread has made a condition true."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "the monitor did not report"
        time.sleep(0.01)


def hold_for(seconds: float) -> None:
    """Hold the loop for some time."""
    time.sleep(seconds)


async def wait_for(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def test_held_loop_is_logged_once_with_the_method_and_its_frames(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_resource = convert.session
    with capture_logs() as logs:

        def slow(row: Any) -> Any:
            hold_until(lambda: events(logs, "event loop held"))
            time.sleep(0.3)  # Long enough for another report, if there were one.
            return to_resource(row)

        monkeypatch.setattr(convert, "session", slow)
        session = await chat.create_session(title="a secret title")
        await wait_for(lambda: events(logs, "event loop released"))
    (held,), (released,) = events(logs, "event loop held"), events(logs, "event loop released")
    assert held["log_level"] == "warning"
    assert held["method"] == released["method"] == "CreateSession"
    assert any(frame.startswith("sessions.py:") for frame in held["where"])
    assert any(frame.endswith(" slow") for frame in held["where"])
    assert 0.25 <= held["seconds"] <= released["seconds"]
    for value in ("secret", session.id, chat.user_id):
        assert value not in str(logs)


async def test_every_stall_is_logged_again(server: Server) -> None:
    with capture_logs() as logs:
        for count in (1, 2):
            hold_until(partial(is_logged, logs, "event loop held", count))
            await wait_for(partial(is_logged, logs, "event loop released", count))
    held = events(logs, "event loop held")
    assert [line["method"] for line in held] == [None, None]


async def test_loop_that_waits_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle turns and long waits of tasks are no stall."""
    lags: list[float] = []
    monitor = LoopMonitor(lambda _: None, lags.append)
    reports: list[float] = []
    monkeypatch.setattr(monitor, "_report", reports.append)
    monitor.start()
    try:
        await wait_for(lambda: len(lags) >= 5)
    finally:
        monitor.stop()
    is_held = any(lag >= 0.25 for lag in lags)  # By other programs, on a busy machine.
    assert is_held or not reports
    assert all(lag >= 0 for lag in lags)


async def test_monitor_ends_with_the_server(database_url: str) -> None:
    def threads() -> set[str]:
        return {thread.name for thread in threading.enumerate()}

    assert "loop-monitor" not in threads()
    async with serving(database_url) as server:
        assert "loop-monitor" in threads()
        heartbeat = server.loop_monitor._heartbeat
        assert heartbeat is not None
    assert "loop-monitor" not in threads()
    assert server.loop_monitor._heartbeat is not None
    assert server.loop_monitor._heartbeat.cancelled()


async def test_heartbeat_uses_no_connection(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the heartbeat used the database")

    for name in ("read", "write"):
        monkeypatch.setattr(server.database, name, fail)
    due_at = server.loop_monitor._due_at
    await wait_for(lambda: server.loop_monitor._due_at > due_at)


async def test_lag_of_the_loop_is_a_metric(database_url: str) -> None:
    async with serving(database_url, metrics_listen="127.0.0.1:0") as server:
        assert server.metrics is not None
        hold_for(0.15)  # Beyond the next heartbeat.
        due_at = server.loop_monitor._due_at
        await wait_for(lambda: server.loop_monitor._due_at > due_at)
        address = f"http://127.0.0.1:{server.metrics.port}/metrics"
        async with httpx.AsyncClient(trust_env=False) as client:
            text = (await client.get(address)).text
    samples = {
        (sample.name, sample.labels.get("le")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    name = "chat_history_event_loop_lag_seconds"
    assert samples[name + "_count", None] >= 1
    assert samples[name + "_bucket", "0.025"] < samples[name + "_count", None]
