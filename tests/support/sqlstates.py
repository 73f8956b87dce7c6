"""Errors of the driver by SQLSTATE, and the lists of the codes that PostgreSQL installs."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import asyncpg
from asyncpg.exceptions import _base

from service.embedded.programs import PACKAGE

_LINE = re.compile(r"^([0-9A-Z]{5})\s+[EWS]\s+ERRCODE_\w+", re.MULTILINE)
UNSUCCESSFUL = ("00", "01", "02")
"""Classes of success and of warnings, which no error has."""


def lists() -> Iterator[Path]:
    """Yield the lists of codes that are installed on this machine."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    yield from Path(spec.origin).parent.glob("pginstall*/share/postgresql/errcodes.txt")
    yield from Path("/usr/share/postgresql").glob("*/errcodes.txt")


def all_codes() -> set[str]:
    """Return the codes of errors in all lists, and those that the driver has a class for."""
    codes = {code for path in lists() for code in _LINE.findall(path.read_text())}
    codes |= set(vars(_base.PostgresMessageMeta)["_message_map"])
    return {code for code in codes if code[:2] not in UNSUCCESSFUL}


def error_of(code: str, severity: str = "ERROR") -> asyncpg.PostgresError:
    """Return the driver's error for a code, as it makes it of a message of the server."""
    fields = {"S": severity, "V": severity, "C": code, "M": "words of the server"}
    error: asyncpg.PostgresError = asyncpg.PostgresError.new(fields)
    return error
