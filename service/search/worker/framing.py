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

EMBEDDING_OPERATIONS = ("embed", "rerank")
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
    """Encode a frame."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return _LENGTHS.pack(len(text), len(blob)) + text + blob


def decode_lengths(prefix: bytes) -> tuple[int, int]:
    """Return the lengths of header and blob in bytes."""
    header_bytes, blob_bytes = _LENGTHS.unpack(prefix)
    return header_bytes, blob_bytes


def decode(header: bytes, blob: bytes) -> Frame:
    """Decode a frame from its parts."""
    return Frame(json.loads(header), blob)
