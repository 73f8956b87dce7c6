"""Measures the lag of the event loop, and reports what holds it for long.

A heartbeat runs on the loop. A thread notices when it is late, and reads the stack of the loop's
thread, so that nothing needs to be recorded while calls run.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import structlog

BEAT_S = 0.1
"""Seconds between two heartbeats."""
HELD_S = 0.25
"""Seconds that a heartbeat must be late to be reported."""
MAX_FRAMES = 20
"""Innermost frames of the stack that are reported."""

_log = structlog.get_logger(__name__)


class LoopMonitor:
    """Watches the loop on which it is started. Call `start` and then `stop`, once each."""

    def __init__(
        self,
        find_method: Callable[[FrameType], str | None],
        observe_lag: Callable[[float], None] | None = None,
    ) -> None:
        """Take the callbacks.

        Args:
            find_method: Returns the RPC that a frame serves; None for other frames.
            observe_lag: Takes the lag in seconds at each heartbeat.
        """
        self._find_method = find_method
        self._observe_lag = observe_lag
        self._loop = asyncio.get_running_loop()
        self._loop_thread_id = threading.get_ident()
        self._due_at = 0.0
        """When the next heartbeat is due, on the monotonic clock."""
        self._heartbeat: asyncio.TimerHandle | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="loop-monitor", daemon=True)

    def start(self) -> None:
        """Start the heartbeat and the thread."""
        self._schedule_heartbeat()
        self._thread.start()

    def stop(self) -> None:
        """Stop the heartbeat and the thread."""
        if self._heartbeat is None:
            return
        self._heartbeat.cancel()
        self._stopping.set()
        self._thread.join()

    def _schedule_heartbeat(self) -> None:
        self._due_at = time.monotonic() + BEAT_S
        self._heartbeat = self._loop.call_later(BEAT_S, self._beat)

    def _beat(self) -> None:
        if self._observe_lag is not None:
            self._observe_lag(max(0.0, time.monotonic() - self._due_at))
        self._schedule_heartbeat()

    def _watch(self) -> None:
        while not self._stopping.wait(BEAT_S):
            due_at = self._due_at
            if time.monotonic() - due_at >= HELD_S:
                self._report(due_at)

    def _report(self, due_at: float) -> None:
        """Log what holds the loop, wait until the heartbeat that was due at a time has run."""
        method, frames = self._read_stack()
        _log.warning(
            "event loop held",
            method=method,
            seconds=round(time.monotonic() - due_at, 3),
            where=frames,
        )
        while self._due_at == due_at:
            if self._stopping.wait(BEAT_S / 10):
                return
        held_s = self._due_at - BEAT_S - due_at
        _log.info("event loop released", method=method, seconds=round(held_s, 3))

    def _read_stack(self) -> tuple[str | None, list[str]]:
        """Return the RPC that the loop's thread serves, and its frames, without any values."""
        method = None
        frames: list[str] = []
        frame = sys._current_frames().get(self._loop_thread_id)  # noqa: SLF001 - documented
        while frame is not None:
            method = method or self._find_method(frame)
            if len(frames) < MAX_FRAMES:
                file_name = frame.f_code.co_filename.rsplit("/", 1)[-1]
                frames.append(f"{file_name}:{frame.f_lineno} {frame.f_code.co_name}")
            frame = frame.f_back
        return method, frames[::-1]
