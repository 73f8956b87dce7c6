"""The same as convert.py, for documents."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable
from typing import Any

from chathistory.v1 import document_pb2

from service.ids import SYSTEM_USER_ID
from service.rpc.convert import canonical, loaded, struct, struct_json, time
from service.store.chunks import Chunk, ChunkRow
from service.store.rows import DocumentRow

_OUTPUT_ONLY = (
    "user_id",
    "chunk_count",
    "status",
    "status_detail",
    "create_time",
    "update_time",
    "etag",
)


def document(row: DocumentRow) -> document_pb2.Document:
    """Make the resource of a row."""
    shared = row.user_id == SYSTEM_USER_ID
    return document_pb2.Document(
        id=row.id,
        user_id=row.user_id,
        scope=document_pb2.DOCUMENT_SCOPE_SHARED if shared else document_pb2.DOCUMENT_SCOPE_PRIVATE,
        title=row.title,
        source_uri=row.source_uri,
        mime_type=row.mime_type,
        content_sha256=row.content_sha256.hex() if row.content_sha256 else "",
        size_bytes=row.size_bytes,
        chunk_count=row.chunk_count,
        status=row.status,  # type: ignore[arg-type]
        status_detail=row.status_detail,
        metadata=struct(row.metadata),
        create_time=time(row.created_us),
        update_time=time(row.updated_us),
        etag=row.etag,
    )


def chunk(row: ChunkRow) -> document_pb2.StoredDocumentChunk:
    """Make the resource of a row."""
    return document_pb2.StoredDocumentChunk(index=row.chunk_index, text=row.text)


def new_chunk(sent: document_pb2.DocumentChunk) -> Chunk:
    """Read a chunk to store."""
    return Chunk(sent.text, packed(sent.vector) if sent.vector else None)


def packed(vector: Iterable[float]) -> bytes:
    """Return a vector as it is kept and searched: 32-bit floats, little-endian."""
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def unpacked(vector: bytes) -> array[float]:
    """Return a vector that `packed` has made."""
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def document_values(
    sent: document_pb2.Document, chunks: Iterable[document_pb2.DocumentChunk], id_: str
) -> dict[str, Any]:
    """Read a document to create; its first chunks count in its fingerprint.

    Raises:
        InvalidArgument: it breaks a rule that the protos cannot say.
    """
    mark = hashlib.blake2b(canonical(sent, _OUTPUT_ONLY, id_), digest_size=16)
    for each in chunks:
        mark.update(
            hashlib.blake2b(each.SerializeToString(deterministic=True), digest_size=16).digest()
        )
    values = document_changes(sent, ("title", "source_uri", "mime_type", "metadata"))
    sha256 = bytes.fromhex(sent.content_sha256) if sent.content_sha256 else None
    return values | {
        "id": id_,
        "content_sha256": sha256,
        "size_bytes": sent.size_bytes,
        "fingerprint": mark.digest(),
    }


def document_changes(sent: document_pb2.Document, paths: Iterable[str]) -> dict[str, Any]:
    """Read those fields of a document.

    Raises:
        InvalidArgument: as `document_values`.
    """
    values = {path: getattr(sent, path) for path in paths}
    if "metadata" in values:
        values["metadata"] = loaded(struct_json(sent.metadata, "document.metadata"))
    return values
