"""The frames between the serving process and the search process: a JSON header and raw bytes.

JSON suffices, since both sides run the same version of this package. Vectors are sent as raw bytes,
without conversion to Python numbers.
"""

from __future__ import annotations

import json
import struct
from typing import Any, NamedTuple

from service.search.types import InputRejected, SearchMisconfigured, SearchUnavailable

_LENGTHS = struct.Struct("<II")
PREFIX_BYTES = _LENGTHS.size
"""Bytes of the prefix, which holds the lengths of header and blob."""
MAX_FRAME_BYTES = 48 * 1024 * 1024
"""Limit of header and blob together. A page of the indexer with the longest vectors fits."""

EMBEDDING_OPERATIONS = ("dimensions", "embed", "rerank")
"""Operations that need no index."""

ERRORS: dict[str, type[Exception]] = {
    error.__name__: error for error in (SearchUnavailable, InputRejected, SearchMisconfigured)
}
"""Errors that pass from the search process to the serving process under their own names."""


class Frame(NamedTuple):
    """A request (number, operation, argument) or a reply (number, error name, result)."""

    header: Any
    blob: bytes


def encode(header: Any, blob: bytes = b"") -> bytes:
    """Encode a frame.

    Raises:
        InputRejected: the frame exceeds MAX_FRAME_BYTES.
    """
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) + len(blob) > MAX_FRAME_BYTES:
        raise InputRejected(f"a request to the search process is larger than {MAX_FRAME_BYTES} B")
    return _LENGTHS.pack(len(text), len(blob)) + text + blob


def decode_lengths(prefix: bytes) -> tuple[int, int]:
    """Return the lengths of header and blob in bytes.

    Raises:
        ValueError: the frame exceeds MAX_FRAME_BYTES.
    """
    header_bytes, blob_bytes = _LENGTHS.unpack(prefix)
    if header_bytes + blob_bytes > MAX_FRAME_BYTES:
        raise ValueError(f"a frame is larger than {MAX_FRAME_BYTES} bytes")
    return header_bytes, blob_bytes


def decode(header: bytes, blob: bytes) -> Frame:
    """Decode a frame from its parts."""
    return Frame(json.loads(header), blob)
