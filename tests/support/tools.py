"""Checks for programs that tests need and that a machine may lack."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest


def require_program(program: str) -> str:
    """Return the path of a program; without it the test is skipped, and fails under CI."""
    path = shutil.which(program)
    if path is None:
        skip_or_fail(f"{program} is not installed")
    return path


def skip_or_fail(reason: str) -> NoReturn:
    """Skip a test that cannot run on this machine; under CI fail it, so that it is noticed."""
    if os.environ.get("CI", "").lower() in ("true", "1"):
        pytest.fail(reason)
    pytest.skip(reason)
