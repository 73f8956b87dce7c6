"""The fixture `start`, which runs `chat-history` commands in a folder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import pytest

TIMEOUT_S = 60.0
"""Seconds in which a command must start, or end: more than a shutdown of `serve` may take."""


class Command:
    """A `chat-history` process in a folder, in a process group of its own, with output in files."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        program: Sequence[str] = ("-m", "service"),
        **environment: str,
    ) -> None:
        self.folder = folder
        # An earlier command with the same arguments may still be writing to its files.
        name = f"{arguments[0]}-{len([*folder.glob('*.out')])}"
        self._stdout_file = folder / f"{name}.out"
        self._stderr_file = folder / f"{name}.err"
        with self._stdout_file.open("wb") as stdout, self._stderr_file.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", *program, *arguments],
                cwd=folder,
                env=os.environ | {"CHAT_HISTORY_LISTEN": "127.0.0.1:0"} | environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )

    @property
    def stdout(self) -> str:
        """The standard output so far."""
        return self._stdout_file.read_text()

    @property
    def stderr(self) -> str:
        """The standard error so far."""
        return self._stderr_file.read_text()

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Wait for the end of the process and return its exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the command has not ended:\n{self.stderr}") from None

    def wait_for(self, words: str, timeout_s: float = TIMEOUT_S) -> str:
        """Wait until standard output contains the words, and return all of it."""
        deadline = time.monotonic() + timeout_s
        while words not in (output := self.stdout):
            assert self.process.poll() is None, self.stderr
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.02)
        return output


Start = Callable[..., Command]


@pytest.fixture
def start(folder: Path) -> Generator[Start]:
    """Provide a function that starts a command; commands that run at the end are killed."""
    commands: list[Command] = []

    def start_command(
        *arguments: str, program: Sequence[str] = ("-m", "service"), **environment: str
    ) -> Command:
        commands.append(Command(folder, *arguments, program=program, **environment))
        return commands[-1]

    yield start_command
    for command in commands:
        if command.process.poll() is None:
            command.process.kill()
            command.process.wait()
