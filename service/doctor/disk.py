"""Checks the free space of the data folder."""

from __future__ import annotations

from pathlib import Path

from service.doctor.findings import Finding, Verdict

_MIB = 1024 * 1024
FULL_BYTES = 64 * _MIB
"""Free bytes below which PostgreSQL may be unable to write its next file of the log (16 MiB)."""
LITTLE_BYTES = 1024 * _MIB


def check_free_space(folder: Path, free_bytes: int) -> list[Finding]:
    """Return the finding on a disk with little free space.

    Args:
        folder: The folder on the disk, for the message.
        free_bytes: The free space.
    """
    if free_bytes >= LITTLE_BYTES:
        return []
    message = f"{free_bytes // _MIB} MiB are free on the disk of {folder}: make room there"
    if free_bytes < FULL_BYTES:
        return [Finding("disk", f"{message}, or writes fail", Verdict.TODO)]
    return [Finding("disk", message, Verdict.NOTE)]
