"""Ids: UUIDs in canonical text form. A leaf: imports nothing of ours."""

from __future__ import annotations

import re

import uuid_utils

SYSTEM_USER_ID = "00000000-0000-0000-0000-000000000000"
"""Owner of the shared documents, the nil UUID; no caller can be it."""

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def new_id() -> str:
    """Return a new id, version 7: ids of rows created together are close in an index."""
    return str(uuid_utils.uuid7())


def is_uuid(text: str) -> bool:
    """Return whether a text is a UUID in canonical form: lower case, with hyphens."""
    return _UUID.fullmatch(text) is not None
