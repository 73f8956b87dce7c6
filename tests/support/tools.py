"""What the tests need of the machine."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest


def require_program(program: str) -> str:
    """Return the path of a program; a test that lacks it is skipped, and under CI it fails."""
    found = shutil.which(program)
    if found is None:
        skip_or_fail(f"{program} is not installed")
    return found


def skip_or_fail(what: str) -> NoReturn:
    """Skip a test that cannot run here; under CI it fails, so that nothing goes unnoticed."""
    if os.environ.get("CI", "").lower() in ("true", "1"):
        pytest.fail(what)
    pytest.skip(what)
