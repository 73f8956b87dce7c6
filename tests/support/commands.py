"""Runs commands as users run them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

TIMEOUT_S = 300
"""Limit for one command: on a new machine, builds and installations download every package."""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command outside the tests' environment; return its output, and fail if it fails."""
    unset = ("PYTHONPATH", "VIRTUAL_ENV", "UV_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    completed = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert completed.returncode == 0, f"{command}\n{completed.stdout}{completed.stderr}"
    return completed.stdout
