"""Describes the machine, the versions and the commit of a run."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.environment import ROOT, Environment

_PACKAGES = (
    "grpcio",
    "protobuf",
    "asyncpg",
    "sqlalchemy",
    "uvloop",
    "protovalidate",
    "fastapi",
    "uvicorn",
)


def cpu_percent_in_use() -> float:
    """Return the CPU usage of other processes, before the benchmark starts any."""
    return psutil.cpu_percent(interval=1.0)


async def describe(environment: Environment, busy_percent: float) -> dict[str, Any]:
    """Return the description of the machine and the measured software."""
    return {
        "at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "postgresql": re.sub(r" .*", "", environment.postgres_version),
        "packages": {name: version(name) for name in _PACKAGES},
        "busy_before_percent": round(busy_percent),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    def git(*arguments: str) -> str:
        process = subprocess.run(  # noqa: S603 - fixed arguments
            ["git", *arguments],  # noqa: S607
            cwd=ROOT,
            check=False,
            capture_output=True,
            text=True,
        )
        return process.stdout.strip()

    changed = git(
        "status", "--porcelain", "--", "service", "generated", "benchmarks", "requirements"
    )
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")
