"""Conversions between rows and the generated code, for documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from chathistory.v1 import document_pb2

from service.ids import SYSTEM_USER_ID
from service.rpc.convert import (
    FINGERPRINT_BYTES,
    canonical_fingerprint,
    parse_json,
    timestamp,
)
from service.rpc.convert_structs import metadata_json
from service.search.types import pack_vector
from service.store.document_chunks import Chunk, ChunkRow
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
    """Return the resource of a row."""
    is_shared = row.user_id == SYSTEM_USER_ID
    return document_pb2.Document(
        id=row.id,
        user_id=row.user_id,
        scope=(
            document_pb2.DOCUMENT_SCOPE_SHARED if is_shared else document_pb2.DOCUMENT_SCOPE_PRIVATE
        ),
        title=row.title,
        source_uri=row.source_uri,
        mime_type=row.mime_type,
        content_sha256=row.content_sha256.hex() if row.content_sha256 else "",
        size_bytes=row.size_bytes,
        chunk_count=row.chunk_count,
        status=row.status,  # type: ignore[arg-type]
        status_detail=row.status_detail,
        metadata=parse_json(row.metadata),
        create_time=timestamp(row.created_us),
        update_time=timestamp(row.updated_us),
        etag=row.etag,
    )


def chunk(row: ChunkRow) -> document_pb2.StoredDocumentChunk:
    """Return the resource of a row."""
    return document_pb2.StoredDocumentChunk(index=row.chunk_index, text=row.text)


def new_chunk(chunk: document_pb2.DocumentChunk) -> Chunk:
    """Return a chunk to store."""
    return Chunk(chunk.text, pack_vector(chunk.vector) if chunk.vector else None)


def document_values(
    document: document_pb2.Document, chunks: Iterable[document_pb2.DocumentChunk], id_: str
) -> dict[str, Any]:
    """Return the columns of a document to create; the fingerprint covers its first chunks too.

    Raises:
        InvalidArgument: it breaks a rule that the protos cannot express.
    """
    # Before the fingerprint, which sorts the keys of the metadata: this checks its size.
    values = document_changes(document, ("title", "source_uri", "mime_type", "metadata"))
    fingerprint = hashlib.blake2b(
        canonical_fingerprint(document, _OUTPUT_ONLY, id_), digest_size=FINGERPRINT_BYTES
    )
    for chunk in chunks:
        serialized = chunk.SerializeToString(deterministic=True)
        fingerprint.update(hashlib.blake2b(serialized, digest_size=FINGERPRINT_BYTES).digest())
    sha256 = bytes.fromhex(document.content_sha256) if document.content_sha256 else None
    return values | {
        "id": id_,
        "content_sha256": sha256,
        "size_bytes": document.size_bytes,
        "fingerprint": fingerprint.digest(),
    }


def document_changes(document: document_pb2.Document, paths: Iterable[str]) -> dict[str, Any]:
    """Return the columns of the given fields of a document.

    Raises:
        InvalidArgument: as `document_values`.
    """
    values = {path: getattr(document, path) for path in paths}
    if "metadata" in values:
        values["metadata"] = parse_json(metadata_json(document.metadata, "document.metadata"))
    return values
