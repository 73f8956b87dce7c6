"""The service under attack, as a process with default settings, and the resources that it uses."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import socket
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.environment import ROOT
from benchmarks.hostile.account import AUDIENCE
from benchmarks.load_generator import BenchError

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 40.0
_METRICS_TIMEOUT_S = 5.0
_CALM_GAUGES = ("calls_in_flight", "watches_open", "appends_waiting", "connections_in_use")
"""Gauges of the service that show whether an attack still occupies it."""
_HOT_CONNECTIONS = 6
"""Connections that the hot statements keep while there is traffic."""
MIB = 1024 * 1024


@dataclass(frozen=True)
class Cores:
    """The cores of the two sides.

    The service's process is alone on its core, and the attacker and the measuring process share the
    other one, where the attacker has the lowest priority. PostgreSQL and the search process may
    use both: in production they have cores of their own, and a third core is not always here. They
    take the time of the attacker before that of the service, because the attacker is the process
    with the lowest priority.
    """

    service: frozenset[int]
    attacker: frozenset[int]
    all: frozenset[int]

    @classmethod
    def of_this_machine(cls) -> Cores | None:
        """Return the cores, or None where processes cannot be pinned."""
        if not hasattr(os, "sched_getaffinity"):
            return None
        available = sorted(os.sched_getaffinity(0))
        if len(available) == 1:
            return None
        return cls(frozenset(available[:1]), frozenset(available[1:]), frozenset(available))


def pin(pid: int, cores: frozenset[int]) -> None:
    """Pin all threads of a process. Threads and processes that it starts later inherit it."""
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                os.sched_setaffinity(int(thread.name), cores)


class HostileServer:
    """A running service."""

    def __init__(self, process: asyncio.subprocess.Process, address: str, metrics: str) -> None:
        self.process = process
        self.address = address
        self.pid = process.pid
        self._metrics_url = f"http://{metrics}/metrics"

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self.process.returncode is None

    def pin(self, cores: Cores | None) -> None:
        """Pin the service, and let PostgreSQL and the search process use all cores."""
        if cores is None:
            return
        pin(self.pid, cores.service)
        for pid in self._other_pids():
            pin(pid, cores.all)

    def _other_pids(self) -> list[int]:
        with suppress(psutil.Error):
            return [child.pid for child in psutil.Process(self.pid).children(recursive=True)]
        return []

    def reset_peak(self) -> None:
        """Begin a new measurement of the peak of the resident memory."""
        with suppress(OSError):
            Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def peak_mib(self) -> float:
        """Return the peak of the service's resident memory since `reset_peak`."""
        return self._status_mib("VmHWM")

    def resident_mib(self) -> float:
        """Return the service's resident memory."""
        return self._status_mib("VmRSS")

    def _status_mib(self, name: str) -> float:
        with suppress(OSError):
            status = Path(f"/proc/{self.pid}/status").read_text()
            if match := re.search(rf"^{name}:\s*(\d+) kB", status, re.MULTILINE):
                return int(match[1]) / 1024
        return 0.0

    def other_memory_mib(self) -> tuple[float, float]:
        """Return the memory of PostgreSQL and of the search process, shared pages counted once."""
        postgres = search = 0.0
        for pid in self._other_pids():
            with suppress(OSError, psutil.Error):
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                match = re.search(r"^Pss:\s*(\d+) kB", rollup, re.MULTILINE)
                mib = int(match[1]) / 1024 if match else 0.0
                if "postgres" in psutil.Process(pid).name():
                    postgres += mib
                else:
                    search += mib
        return postgres, search

    async def gauges(self) -> dict[str, float]:
        """Return the service's gauges without their prefix, or nothing while it does not answer."""

        def read() -> str:
            with urllib.request.urlopen(  # noqa: S310 - a constant scheme
                self._metrics_url, timeout=_METRICS_TIMEOUT_S
            ) as reply:
                return str(reply.read().decode())

        try:
            text = await asyncio.to_thread(read)
        except OSError:
            return {}
        values = re.findall(r"^chat_history_(\w+) ([\d.e+-]+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in values}

    async def is_calm(self) -> bool:
        """Return whether no call occupies the service."""
        gauges = await self.gauges()
        if not gauges:
            return False
        limits = {"connections_in_use": _HOT_CONNECTIONS}
        return all(gauges.get(name, 0.0) <= limits.get(name, 0) for name in _CALM_GAUGES)


@asynccontextmanager
async def serving(
    folder: Path, key: str, *, is_search_on: bool, **settings: str
) -> AsyncIterator[HostileServer]:
    """Run the service with its embedded PostgreSQL in a folder.

    Everything is as by default but for the identity of callers, the listeners, and search in the
    phase without it. The log goes to `server.log` in the folder.
    """
    address, metrics = _free_address(), _free_address()
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("CHAT_HISTORY_", "PG", "NEON_", "QDRANT_", "DATABASE_URL"))
    }
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "CHAT_HISTORY_LISTEN": address,
        "CHAT_HISTORY_METRICS_LISTEN": metrics,
        "CHAT_HISTORY_DATA_DIR": str(folder / "data"),
        "CHAT_HISTORY_LOG_FORMAT": "json",
        "CHAT_HISTORY_LOG_LEVEL": "warning",
        "CHAT_HISTORY_SEARCH": "on" if is_search_on else "off",
        "CHAT_HISTORY_AUTH": "jwt",
        "CHAT_HISTORY_JWT_KEY": key,
        "CHAT_HISTORY_JWT_AUDIENCE": AUDIENCE,
        **settings,
    }
    log_path = folder / "server.log"
    with log_path.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "service", "serve"),
            cwd=folder, env=inherited | environment, stdin=asyncio.subprocess.DEVNULL,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    server = HostileServer(process, address, metrics)
    try:
        await _wait_until_ready(server, log_path)
        yield server
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_S)
            except TimeoutError:
                process.kill()
                await process.wait()


async def _wait_until_ready(server: HostileServer, log: Path) -> None:
    deadline = asyncio.get_running_loop().time() + _START_TIMEOUT_S
    while server.is_running and asyncio.get_running_loop().time() < deadline:
        if (await server.gauges()).get("ready"):
            return
        await asyncio.sleep(0.1)
    raise BenchError(f"the service did not become ready:\n{_log_end(log)}")


def _log_end(path: Path) -> str:
    return path.read_text(errors="replace")[-2000:]


def new_key() -> str:
    """Return a secret with which tokens are signed."""
    return secrets.token_urlsafe(48)


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def log_events(path: Path, start: int) -> dict[str, int]:
    """Count the events that the service has logged since a position of its log."""
    counts: dict[str, int] = {}
    with path.open("rb") as log:
        log.seek(start)
        for line in log:
            try:
                event = json.loads(line)["event"]
            except (ValueError, KeyError, TypeError):
                continue
            counts[event] = counts.get(event, 0) + 1
    return counts
