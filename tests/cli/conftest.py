"""Commands to run, in a folder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import pytest

PATIENCE = 60.0
"""Seconds in which a command has begun, or has ended: more than `serve` may take for its end."""


class Command:
    """A `chat-history` that runs in a folder, in a process group of its own, with its output in files."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        program: Sequence[str] = ("-m", "service"),
        **environment: str,
    ) -> None:
        self.folder = folder
        # Of its own also where another one of the same name still writes.
        name = f"{arguments[0]}-{len([*folder.glob('*.out')])}"
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", *program, *arguments],
                cwd=folder, env=os.environ | {"CHAT_HISTORY_LISTEN": "127.0.0.1:0"} | environment,
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for its end and return the exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it has not ended:\n{self.said}") from None

    def wait_for(self, words: str, timeout: float = PATIENCE) -> str:
        """Wait until it has said something on standard output, and return all of that."""
        give_up = time.monotonic() + timeout
        while words not in (said := self.out.read_text()):
            assert self.process.poll() is None, self.err.read_text()
            assert time.monotonic() < give_up, self.err.read_text()
            time.sleep(0.02)
        return said

    @property
    def said(self) -> str:
        """What it has said on standard error."""
        return self.err.read_text()


Start = Callable[..., Command]


@pytest.fixture
def start(folder: Path) -> Generator[Start]:
    """Give a way to start commands; those that still run at the end are killed."""
    started: list[Command] = []

    def run(
        *arguments: str, program: Sequence[str] = ("-m", "service"), **environment: str
    ) -> Command:
        started.append(Command(folder, *arguments, program=program, **environment))
        return started[-1]

    yield run
    for command in started:
        if command.process.poll() is None:
            command.process.kill()
            command.process.wait()
