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
"""RESOURCE_EXHAUSTED, and CANCELLED, which gRPC itself returns for calls beyond its queue."""
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
    """Concurrent calls, over all connections."""
    seconds: float = 3.0
    """Length of the window."""
    warmup: float = 0.5
    """Seconds of load before the window."""
    connections: int = 8
    http1: bool = False
    """Send HTTP/1.1 requests, whose bodies include the head, instead of gRPC calls."""
    cycle: bool = False
    """Send the bodies repeatedly, instead of each body once."""
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

    Args:
        program: The compiled load generator.
        address: `host:port` of the server.
        path: HTTP/2 path of the method; not used with HTTP/1.1.
        bodies: The file of request bodies.
        load: The load.

    Raises:
        BenchError: a call or the server failed.
    """
    process = await asyncio.create_subprocess_exec(
        str(program),
        *_arguments(address, path, bodies, load),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
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


def _arguments(address: str, path: str, bodies: Path, load: Load) -> list[str]:
    """Return the command line arguments of the load generator."""
    options: dict[str, object] = {
        "--address": address,
        "--bodies": bodies,
        "--in-flight": load.in_flight,
        "--warmup": load.warmup,
        "--seconds": load.seconds,
        "--connections": load.connections,
        "--pid": load.pid or os.getpid(),
    }
    if not load.http1:
        options["--path"] = path
    if load.rate:
        options["--rate"] = load.rate
    arguments = [str(word) for option in options.items() for word in option]
    for header in load.headers:
        arguments += ("--header", header)
    flags = {
        "--http1": load.http1,
        "--cycle": load.cycle,
        "--honor-retry-info": load.honors_retry_info,
    }
    return [*arguments, *(flag for flag, is_set in flags.items() if is_set)]
