"""What passes between the serving process and its child: frames of a JSON header and raw bytes.

No pickle and no third party: both sides are this package in one version, and vectors pass as they are, without a number being made.
"""

from __future__ import annotations

import json
import struct
from typing import Any, NamedTuple

_LENGTHS = struct.Struct("<II")
HEAD_BYTES = _LENGTHS.size
"""Bytes that come first and say how long the rest is."""

OF_TEXTS = ("embed", "rerank")
"""Operations of the embeddings, which need no index."""


class Frame(NamedTuple):
    """One request or answer."""

    header: Any
    blob: bytes


def encode(header: Any, blob: bytes = b"") -> bytes:
    """Make a frame."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return _LENGTHS.pack(len(text), len(blob)) + text + blob


def lengths(head: bytes) -> tuple[int, int]:
    """Return how many bytes of header and blob follow."""
    header, blob = _LENGTHS.unpack(head)
    return header, blob


def decode(header: bytes, blob: bytes) -> Frame:
    """Make a frame of its parts."""
    return Frame(json.loads(header), blob)
