"""The load generator: driver.c, compiled when first needed, run as a process of its own."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("load_generator.c")
_REFUSED = {"8", "1"}
"""RESOURCE_EXHAUSTED, and CANCELLED: how gRPC itself ends calls when too many wait to be taken up."""
_COMPILE = ("-O2", "-Wall", "-Wextra", "-Werror")


class BenchError(Exception):
    """The benchmark cannot go on; the text says why."""


@dataclass(frozen=True)
class LoadResult:
    """What the driver found."""

    refused: int
    """Replies in the window that were not good."""
    replies: int
    """Good ones."""
    seconds: float
    bytes: int
    sent: int
    load_generator_cpu_s: float
    p50: int
    p90: int
    p99: int
    max: int
    cpu: list[float]
    statuses: dict[str, int]


@dataclass(frozen=True)
class Load:
    """How a server is loaded."""

    in_flight: int = 1
    seconds: float = 3.0
    warmup: float = 0.5
    connections: int = 8
    http1: bool = False
    cycle: bool = False
    headers: Sequence[str] = ()
    """What calls carry beside the usual, each as `name:value`."""
    patient: bool = False
    """Whether a caller that is refused waits for as long as it is told."""
    rate: float = 0.0
    """Calls a second, whatever is answered; 0: as many as `in_flight` callers ask one after the other."""
    refusable: bool = False
    """Whether calls may be refused for their number."""
    pid: int = 0
    """The process whose processor time is read."""


def compile_load_generator(folder: Path) -> Path:
    """Compile the driver, unless that is done.

    Raises:
        BenchError: there is no compiler or no libnghttp2.
    """
    source = SOURCE.read_bytes()
    program = folder / f"load_generator-{hashlib.blake2b(source, digest_size=6).hexdigest()}"
    if program.exists():
        return program
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise BenchError(
            "the load generator needs a C compiler: apt-get install gcc libc6-dev libnghttp2-dev"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("load_generator-*"):
        earlier.unlink()
    unfinished = program.with_suffix(".new")
    command = [compiler, *_COMPILE, "-o", str(unfinished), str(SOURCE), "-lnghttp2"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise BenchError(
            f"the load generator does not compile (apt-get install libnghttp2-dev):\n{done.stderr}"
        )
    unfinished.rename(program)
    return program


async def generate_load(
    program: Path, address: str, path: str, bodies: Path, load: Load
) -> LoadResult:
    """Load a server.

    Raises:
        BenchError: a call failed, or the server did.
    """
    command = [
        *(
            str(program),
            "--address",
            address,
            "--bodies",
            str(bodies),
            "--in-flight",
            str(load.in_flight),
        ),
        *(
            "--warmup",
            str(load.warmup),
            "--seconds",
            str(load.seconds),
            "--connections",
            str(load.connections),
        ),
        *(["--http1"] if load.http1 else ["--path", path]),
        *(["--cycle"] if load.cycle else []),
        *(["--patient"] if load.patient else []),
        *(["--rate", str(load.rate)] if load.rate else []),
        *(word for header in load.headers for word in ("--header", header)),
        *("--pid", str(load.pid or os.getpid())),
    ]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        output, errors = await process.communicate()
    except BaseException:
        process.kill()
        raise
    if process.returncode:
        raise BenchError(
            errors.decode(errors="replace").strip() or f"the driver ended with {process.returncode}"
        )
    answer = LoadResult(**json.loads(output))
    good = {"200" if load.http1 else "0"}
    if set(answer.statuses) - (_REFUSED if load.refusable else set()) != good:
        raise BenchError(
            f"calls of {path} failed, by status: {answer.statuses}\n{errors.decode(errors='replace')}"
        )
    return answer
