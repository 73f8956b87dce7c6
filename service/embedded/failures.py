"""Explains in one line why PostgreSQL does not run, and what the operator can do."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import NamedTuple

_MIB = 1024 * 1024
_FULL_DISK_BYTES = 32 * _MIB
"""Free bytes below which a full disk explains that PostgreSQL could not even write its log."""
_FULL_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT)
_FULL_DISK = "the disk of {pgdata} is full ({free_mib} MiB free): make room there and start again"

_MESSAGE = re.compile(r"^.*?\b(?P<severity>PANIC|FATAL|ERROR|WARNING|LOG):  (?P<text>.+)$")
# Messages of processes of a server of which another one has failed.
_CONSEQUENCE = re.compile(
    r"the database system is |terminating connection |pre-existing shared memory block"
)
_BAD_CONFIGURATION = re.compile(r'configuration file ".+" contains errors')


class _Message(NamedTuple):
    severity: str
    text: str


class _Cause(NamedTuple):
    pattern: re.Pattern[str]
    advice: str
    """The damage and what to do; `pgdata` and `free_mib` are filled in."""


_CAUSES = (
    _Cause(re.compile("No space left on device|Disk quota exceeded"), _FULL_DISK),
    _Cause(
        re.compile(
            r'required WAL directory|could not open directory "pg_wal|invalid checkpoint record'
            r"|could not locate a valid checkpoint|could not locate required checkpoint"
        ),
        "the write-ahead log in {pgdata}/pg_wal is lost or damaged. Restore the data folder from a "
        "backup. Without one, pg_resetwal can open the data, and messages may be lost",
    ),
    _Cause(
        re.compile("pg_control|control file|database files are incompatible with server"),
        "{pgdata}/global/pg_control is missing or damaged, or of another build of PostgreSQL. "
        "Restore the data folder from a backup",
    ),
    _Cause(
        re.compile("is not a valid data directory|PG_VERSION"),
        "a file PG_VERSION in {pgdata} is missing or damaged. Restore the data folder from a "
        "backup",
    ),
    _Cause(_BAD_CONFIGURATION, "correct that file"),
    _Cause(
        re.compile("invalid page|checksum"),
        "a file in {pgdata} is damaged. Restore the data folder from a backup",
    ),
    _Cause(
        re.compile("Permission denied|has invalid permissions|has wrong ownership"),
        "{pgdata} and its files must belong to the user that runs PostgreSQL, with mode 0700",
    ),
    _Cause(
        re.compile("Cannot allocate memory"),
        "the machine has too little free memory: end other programs and start again",
    ),
)


def explain(output: str, pgdata: Path, *, log: Path, free_bytes: int) -> str:
    """Return in one line why PostgreSQL did not start, and what to do.

    Args:
        output: PostgreSQL's log since it was started.
        pgdata: The folder of the database.
        log: The file that holds `output`, for the operator.
        free_bytes: Free bytes on the disk of `pgdata`.
    """
    message = _decisive_message(output)
    advice = remedy(message, pgdata, free_bytes) or remedy(output, pgdata, free_bytes)
    if not output.strip() and free_bytes < _FULL_DISK_BYTES:
        advice = remedy(os.strerror(errno.ENOSPC), pgdata, free_bytes)
    reason = ": ".join(part for part in (message or _last_message(output), advice) if part)
    return f"{reason or 'it ended without a message'} (see {log})"


def explain_panic(output: str, pgdata: Path, *, log: Path, free_bytes: int) -> str:
    """Return in one line why a running PostgreSQL ended; empty when its log has no PANIC."""
    if not any(message.severity == "PANIC" for message in _messages(output)):
        return ""
    return explain(output, pgdata, log=log, free_bytes=free_bytes)


def explain_os_error(error: OSError, data_dir: Path) -> str:
    """Return in one line which file or folder cannot be used, and why."""
    if error.errno in _FULL_DISK_ERRORS:
        return f"the disk of {data_dir} is full: make room there and start again"
    return f"{error.filename or data_dir}: {error.strerror}"


def remedy(text: str, pgdata: Path, free_bytes: int) -> str:
    """Return what to do about the problem that a text names; empty when it names none of ours."""
    for cause in _CAUSES:
        if cause.pattern.search(text):
            return cause.advice.format(pgdata=pgdata, free_mib=free_bytes // _MIB)
    return ""


def _messages(output: str) -> list[_Message]:
    matches = filter(None, map(_MESSAGE.match, output.splitlines()))
    return [_Message(match["severity"], match["text"]) for match in matches]


def _decisive_message(output: str) -> str:
    """Return the message that ended the server: the first PANIC, else the first FATAL."""
    messages = _messages(output)
    for severity in ("PANIC", "FATAL"):
        for position, message in enumerate(messages):
            if message.severity != severity or _CONSEQUENCE.match(message.text):
                continue
            # Errors of the configuration are in messages of their own before this one.
            first = 0 if _BAD_CONFIGURATION.search(message.text) else position
            return ", ".join(item.text for item in messages[first : position + 1])
    return ""


def _last_message(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    if not lines:
        return ""
    match = _MESSAGE.match(lines[-1])
    return match["text"] if match else lines[-1].strip()
