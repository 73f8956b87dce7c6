"""Commands that are run as their users run them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

TIMEOUT_S = 300
"""Seconds in which a command has ended: those that build and install fetch packages, on a new machine all of them."""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command to its end, outside of the environment that the tests run in, and return what it says."""
    unset = ("PYTHONPATH", "VIRTUAL_ENV", "UV_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout
