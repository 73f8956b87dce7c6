"""The processes of the attacker and of the other user, and how they are controlled."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from benchmarks.hostile.account import Account
from benchmarks.hostile.attacks import Attack
from benchmarks.hostile.server import Cores, pin
from benchmarks.load_generator import BenchError

_PREPARE_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 5.0
_MEASURE_TIMEOUT_S = 60.0
_CHECK_TIMEOUT_S = 600.0
_MAX_LINE_BYTES = 64 * 1024 * 1024
_ATTACKER_NICENESS = 19


class _Child:
    """A Python process that is controlled by lines on its input and answers by lines."""

    def __init__(self, process: asyncio.subprocess.Process, errors: Path) -> None:
        self._process = process
        self._errors = errors

    @classmethod
    async def start(cls, module: str, cores: Cores | None, errors: Path) -> Self:
        with errors.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", f"benchmarks.hostile.{module}"),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log,
                limit=_MAX_LINE_BYTES,
            )  # fmt: skip
        if cores is not None:
            pin(process.pid, cores.attacker)
        return cls(process, errors)

    def renice(self, niceness: int) -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._process.pid, niceness)

    def write(self, line: str) -> None:
        assert self._process.stdin is not None  # noqa: S101 - a pipe
        with suppress(OSError):
            self._process.stdin.write(line.encode() + b"\n")

    async def read(self, timeout_s: float) -> str:
        assert self._process.stdout is not None  # noqa: S101 - a pipe
        async with asyncio.timeout(timeout_s):
            return (await self._process.stdout.readline()).decode().strip()

    async def kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    def error_text(self) -> str:
        return self._errors.read_text(errors="replace")[-2000:]


class ProbeProcess:
    """The process that measures the other user's calls."""

    def __init__(self, child: _Child) -> None:
        self._child = child

    @classmethod
    async def start(
        cls, account: Account, cores: Cores | None, folder: Path, *, is_search_on: bool
    ) -> Self:
        """Start the process and wait until it is ready."""
        child = await _Child.start("probe", cores, folder / "probe.log")
        child.write(account.to_json())
        child.write("on" if is_search_on else "off")
        if await child.read(_PREPARE_TIMEOUT_S) != "ready":
            raise BenchError(f"the measuring process did not start:\n{child.error_text()}")
        return cls(child)

    def begin(self) -> None:
        """Begin a measurement."""
        self._child.write("start")

    async def end(self) -> dict[str, Any]:
        """End the measurement and return it."""
        self._child.write("stop")
        line = await self._child.read(_MEASURE_TIMEOUT_S)
        if not line:
            raise BenchError(f"the measuring process ended:\n{self._child.error_text()}")
        result: dict[str, Any] = json.loads(line)
        return result

    async def stop(self) -> None:
        """End the process."""
        await self._child.kill()


class OrdinaryProcess:
    """The process of the ordinary users of a soak."""

    def __init__(self, child: _Child) -> None:
        self._child = child

    @classmethod
    async def start(cls, accounts: Sequence[Account], cores: Cores | None, folder: Path) -> Self:
        """Start the process and let the users converse."""
        child = await _Child.start("ordinary", cores, folder / "ordinary.log")
        child.write(str(len(accounts)))
        for account in accounts:
            child.write(account.to_json())
        if await child.read(_PREPARE_TIMEOUT_S) != "ready":
            raise BenchError(f"the ordinary users did not start:\n{child.error_text()}")
        return cls(child)

    async def end(self) -> dict[str, Any]:
        """End the conversations, let the process check the stored messages, and return it all."""
        self._child.write("stop")
        line = await self._child.read(_CHECK_TIMEOUT_S)
        await self._child.kill()
        if not line:
            raise BenchError(f"the ordinary users ended:\n{self._child.error_text()}")
        result: dict[str, Any] = json.loads(line)
        return result


class AttackerProcess:
    """The process of one attack. It may be started before its attack is known."""

    def __init__(self, child: _Child) -> None:
        self._child = child

    @classmethod
    async def start(cls, cores: Cores | None, folder: Path) -> Self:
        """Start the process; it loads its modules and waits."""
        child = await _Child.start("attacker", cores, folder / "attacker.log")
        child.renice(_ATTACKER_NICENESS)
        return cls(child)

    async def prepare(self, account: Account, attack: Attack) -> bool:
        """Let it prepare an attack. False if the process failed."""
        self._child.write(account.to_json())
        self._child.write(attack.to_json())
        try:
            return await self._child.read(_PREPARE_TIMEOUT_S) == "ready"
        except TimeoutError:
            return False

    async def attack(self, seconds: float) -> dict[str, int]:
        """Attack, end the process, and return its tally; empty if the process failed."""
        self._child.write(str(seconds))
        tally: dict[str, int] = {}
        with suppress(TimeoutError, ValueError):
            tally = json.loads(await self._child.read(seconds + _END_TIMEOUT_S) or "{}")
        await self.stop()
        return tally

    async def stop(self) -> None:
        """End the process."""
        await self._child.kill()
