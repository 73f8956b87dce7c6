"""Runs the load generator, load_generator.c, which is compiled at its first use."""

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
_REFUSAL_STATUSES = {"8", "1"}
"""RESOURCE_EXHAUSTED, and CANCELLED, with which gRPC itself rejects calls beyond its queue."""
_COMPILE = ("-O2", "-Wall", "-Wextra", "-Werror")


class BenchError(Exception):
    """The benchmark cannot continue, for the reason in the message."""


@dataclass(frozen=True)
class LoadResult:
    """Measurements of the load generator. The window is the time after the warm-up."""

    refused: int
    """Replies in the window with another status than OK."""
    replies: int
    """Replies in the window with status OK."""
    seconds: float
    """Length of the window."""
    bytes: int
    """Size of the replies in the window."""
    sent: int
    load_generator_cpu_s: float
    p50: int
    """Quantiles of the latency, in microseconds."""
    p90: int
    p99: int
    max: int
    cpu: list[float]
    """CPU seconds of each watched process, in the window."""
    statuses: dict[str, int]
    """Replies by gRPC status, including those outside the window."""


@dataclass(frozen=True)
class Load:
    """The load on a server."""

    in_flight: int = 1
    seconds: float = 3.0
    warmup: float = 0.5
    connections: int = 8
    http1: bool = False
    cycle: bool = False
    headers: Sequence[str] = ()
    """Additional metadata of the calls, each as `name:value`."""
    honors_retry_info: bool = False
    """Whether a refused caller waits for the time in the reply's RetryInfo."""
    rate: float = 0.0
    """Calls per second of an open loop; 0 for a closed loop of `in_flight` callers."""
    allows_refusals: bool = False
    """Whether refused calls are expected. Otherwise they fail the run."""
    pid: int = 0
    """The process whose CPU time is measured."""


def compile_load_generator(folder: Path) -> Path:
    """Compile the load generator, unless this version is compiled already, and return its path.

    Raises:
        BenchError: the compiler or libnghttp2 is missing.
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
    for old_program in folder.glob("load_generator-*"):
        old_program.unlink()
    temporary = program.with_suffix(".new")
    command = [compiler, *_COMPILE, "-o", str(temporary), str(SOURCE), "-lnghttp2"]
    process = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
    if process.returncode:
        raise BenchError(
            f"cannot compile the load generator (apt-get install libnghttp2-dev):\n{process.stderr}"
        )
    temporary.rename(program)
    return program


async def generate_load(
    program: Path, address: str, path: str, bodies: Path, load: Load
) -> LoadResult:
    """Load a server and return the measurements.

    Raises:
        BenchError: a call or the server failed.
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
        *(["--honor-retry-info"] if load.honors_retry_info else []),
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
            errors.decode(errors="replace").strip()
            or f"the load generator exited with {process.returncode}"
        )
    result = LoadResult(**json.loads(output))
    ok_status = {"200" if load.http1 else "0"}
    if set(result.statuses) - (_REFUSAL_STATUSES if load.allows_refusals else set()) != ok_status:
        details = errors.decode(errors="replace")
        raise BenchError(f"calls of {path} failed, by status: {result.statuses}\n{details}")
    return result
