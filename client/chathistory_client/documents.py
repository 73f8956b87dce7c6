"""RPCs of documents: the texts that a chatbot answers from, in searchable chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from chathistory.v1 import document_pb2
from chathistory.v1.document_pb2 import (
    Document,
    DocumentChunk,
    DocumentHit,
    DocumentScope,
    DocumentStatus,
)

from chathistory_client.connection import (
    DELETE_TIMEOUT_S,
    Connection,
    ReadConsistency,
    read_metadata,
)
from chathistory_client.fields import UNSET, Metadata, Unset, set_fields, struct
from chathistory_client.ids import new_id
from chathistory_client.paging import Pager

MAX_BATCH_CHUNKS = 1000
MAX_BATCH_BYTES = 1024 * 1024 - 64 * 1024
"""Maximum serialized chunks in one request: the service's limit of 1 MiB, less a margin."""


class Documents(Connection):
    """Creates, reads, updates, deletes and searches documents."""

    async def create_document(
        self,
        *,
        chunks: Iterable[str | DocumentChunk] = (),
        user_id: str = "",
        document_id: str = "",
        title: str = "",
        scope: DocumentScope.ValueType = DocumentScope.DOCUMENT_SCOPE_PRIVATE,
        source_uri: str = "",
        mime_type: str = "",
        content_sha256: str = "",
        size_bytes: int = 0,
        metadata: Metadata | None = None,
        timeout: float | None = None,
    ) -> Document:
        """Create a document with its chunks, in several requests if they exceed the size of one.

        Retries send the same id, so the document is created once. If `content_sha256` is set and
        the owner has a document with the same `content_sha256` and `source_uri`, that document is
        returned instead.

        >>> document = await client.create_document(
        ...     user_id=user_id,
        ...     title="Herons",
        ...     chunks=["Herons wade.", "They eat fish."],
        ...     source_uri="file:herons.md",
        ... )
        >>> document.title, document.chunk_count
        ('Herons', 2)

        Args:
            chunks: The text, as strings or as chunks with vectors of your own.
            user_id: Id of the owner. Services must set it for a private document; user callers may
                leave it empty.
            document_id: UUID of the document. Empty for a new one.
            title: Display title, at most 512 characters.
            scope: Private, or shared with all users. Services only may share.
            source_uri: Location of the original.
            mime_type: Media type of the original.
            content_sha256: SHA-256 of the original, in hexadecimal digits.
            size_bytes: Size of the original in bytes.
            metadata: JSON object of your own, at most 16 KiB.
            timeout: Seconds for each request, including retries. None for the client's default.

        Returns:
            The stored document.

        Raises:
            AlreadyExists: The owner has another document with this id, or other chunks are stored
                (ID_TAKEN).
            NotFound: The owner does not exist (USER_NOT_FOUND).
            PermissionDenied: A user caller creates a shared document (SERVICE_ONLY).
        """
        document = Document(
            id=document_id or new_id(),
            title=title,
            scope=scope,
            source_uri=source_uri,
            mime_type=mime_type,
            content_sha256=content_sha256,
            size_bytes=size_bytes,
            metadata=struct(metadata),
        )
        batches = _batches(chunks)
        first_batch = next(batches, [])
        request = document_pb2.CreateDocumentRequest(
            user_id=user_id, document=document, chunks=first_batch
        )
        stored = (await self._call(self._stub.CreateDocument, request, timeout)).document
        next_index = len(first_batch)
        for batch in batches:
            stored = await self.append_document_chunks(
                user_id=user_id,
                document_id=stored.id,
                first_index=next_index,
                chunks=batch,
                timeout=timeout,
            )
            next_index += len(batch)
        return stored

    async def append_document_chunks(
        self,
        *,
        document_id: str,
        first_index: int,
        chunks: Sequence[str | DocumentChunk],
        user_id: str = "",
        timeout: float | None = None,
    ) -> Document:
        """Store further chunks of a document. Chunks that are stored already are not stored again.

        Args:
            document_id: Id of the document.
            first_index: Index of the first chunk, at most the document's `chunk_count`.
            chunks: 1 to 1000 chunks, at most 1 MiB together.
            user_id: Id of the user whose own documents the call covers, next to the shared ones.
                User callers may leave it empty. From services, an empty value covers the shared
                documents only.
            timeout: Seconds for the call, including retries. None for the client's default.

        Returns:
            The stored document.

        Raises:
            NotFound: Neither the user's own documents nor the shared ones have this id
                (DOCUMENT_NOT_FOUND).
            AlreadyExists: Another chunk is stored at one of the indexes (ID_TAKEN).
            PermissionDenied: The document is shared, and the caller is a user (SERVICE_ONLY).
        """
        request = document_pb2.AppendDocumentChunksRequest(
            user_id=user_id,
            document_id=document_id,
            first_index=first_index,
            chunks=map(_chunk, chunks),
        )
        return (await self._call(self._stub.AppendDocumentChunks, request, timeout)).document

    async def get_document(
        self, *, user_id: str = "", document_id: str, timeout: float | None = None
    ) -> Document:
        """Return one document, without its chunks.

        Args:
            user_id: Id of the user whose own documents the call covers, next to the shared ones.
                User callers may leave it empty. From services, an empty value covers the shared
                documents only.
            document_id: Id of the document.
            timeout: Seconds for the call, including retries. None for the client's default.

        Returns:
            The stored document.

        Raises:
            NotFound: Neither the user's own documents nor the shared ones have this id
                (DOCUMENT_NOT_FOUND).
        """
        request = document_pb2.GetDocumentRequest(user_id=user_id, document_id=document_id)
        return (await self._call(self._stub.GetDocument, request, timeout)).document

    def list_documents(
        self,
        *,
        user_id: str = "",
        status: DocumentStatus.ValueType = DocumentStatus.DOCUMENT_STATUS_UNSPECIFIED,
        source_uri: str = "",
        mime_type: str = "",
        scope: DocumentScope.ValueType = DocumentScope.DOCUMENT_SCOPE_UNSPECIFIED,
        page_size: int = 0,
        page_token: str = "",
        read_consistency: ReadConsistency = "strong",
        timeout: float | None = None,
    ) -> Pager[document_pb2.ListDocumentsResponse, Document]:
        """List a user's own documents and the shared ones, newest first.

        >>> _ = await client.create_document(
        ...     user_id=user_id, title="Herons", mime_type="text/markdown"
        ... )
        >>> documents = client.list_documents(user_id=user_id, mime_type="text/markdown")
        >>> [document.title async for document in documents]
        ['Herons']

        Args:
            user_id: Id of the user whose own documents the call covers, next to the shared ones.
                User callers may leave it empty. From services, an empty value covers the shared
                documents only.
            status: Only documents with this status. Unspecified for any.
            source_uri: Only documents with exactly this URI. Empty for any.
            mime_type: Only documents with exactly this media type. Empty for any.
            scope: Only documents of this scope. Unspecified for any.
            page_size: Maximum number of items in a page. 0 means 50, values over 1000 mean 1000.
            page_token: `next_page_token` of the page to continue after. Empty for the first page.
            read_consistency: `strong`, or `eventual` to accept the data of a replica that lags.
            timeout: Seconds for each page, including retries. None for the client's default.

        Returns:
            A pager: `async for` iterates over all items, `await` returns one page.
        """
        metadata = read_metadata(read_consistency)

        async def fetch(token: str) -> document_pb2.ListDocumentsResponse:
            request = document_pb2.ListDocumentsRequest(
                user_id=user_id,
                status=status,
                source_uri=source_uri,
                mime_type=mime_type,
                scope=scope,
                page_size=page_size,
                page_token=token,
            )
            return await self._call(self._stub.ListDocuments, request, timeout, metadata=metadata)

        return Pager(fetch, lambda page: page.documents, page_token)

    async def update_document(
        self,
        *,
        user_id: str = "",
        document_id: str,
        title: str | Unset = UNSET,
        source_uri: str | Unset = UNSET,
        mime_type: str | Unset = UNSET,
        metadata: Metadata | Unset | None = UNSET,
        etag: str = "",
        timeout: float | None = None,
    ) -> Document:
        """Update fields of a document. The chunks cannot be updated.

        Fields that are left `UNSET` keep their value; None and empty values clear a field.

        Args:
            user_id: Id of the user whose own documents the call covers, next to the shared ones.
                User callers may leave it empty. From services, an empty value covers the shared
                documents only.
            document_id: Id of the document.
            title: Display title, at most 512 characters.
            source_uri: Location of the original.
            mime_type: Media type of the original.
            metadata: JSON object of your own; replaces the stored one.
            etag: If set, the update succeeds only while this is the etag of the stored document.
            timeout: Seconds for the call, including retries. None for the client's default.

        Returns:
            The stored document after the update.

        Raises:
            ValueError: No field was passed.
            Conflict: `etag` is not that of the stored document (ETAG_MISMATCH).
            NotFound: Neither the user's own documents nor the shared ones have this id
                (DOCUMENT_NOT_FOUND).
            AlreadyExists: Another document has the same content and the new `source_uri`
                (ID_TAKEN).
            PermissionDenied: The document is shared, and the caller is a user (SERVICE_ONLY).
        """
        document = Document(id=document_id, etag=etag)
        mask = set_fields(
            document, title=title, source_uri=source_uri, mime_type=mime_type, metadata=metadata
        )
        request = document_pb2.UpdateDocumentRequest(
            user_id=user_id, document=document, update_mask=mask
        )
        return (await self._call(self._stub.UpdateDocument, request, timeout)).document

    async def delete_document(
        self,
        *,
        user_id: str = "",
        document_id: str,
        allow_missing: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Delete a document permanently, with its chunks and vectors.

        Args:
            user_id: Id of the user whose own documents the call covers, next to the shared ones.
                User callers may leave it empty. From services, an empty value covers the shared
                documents only.
            document_id: Id of the document.
            allow_missing: True to succeed when the document does not exist.
            timeout: Seconds for the call, including retries. None for 60 s.

        Raises:
            NotFound: Neither the user's own documents nor the shared ones have this id
                (DOCUMENT_NOT_FOUND).
            PermissionDenied: The document is shared, and the caller is a user (SERVICE_ONLY).
        """
        request = document_pb2.DeleteDocumentRequest(
            user_id=user_id, document_id=document_id, allow_missing=allow_missing
        )
        await self._call(self._stub.DeleteDocument, request, timeout, DELETE_TIMEOUT_S)

    def list_document_chunks(
        self,
        *,
        user_id: str = "",
        document_id: str,
        page_size: int = 0,
        page_token: str = "",
        timeout: float | None = None,
    ) -> Pager[document_pb2.ListDocumentChunksResponse, document_pb2.StoredDocumentChunk]:
        """List the chunks of a document, ordered by index.

        >>> document = await client.create_document(
        ...     user_id=user_id, chunks=["Herons wade.", "They eat fish."]
        ... )
        >>> chunks = client.list_document_chunks(user_id=user_id, document_id=document.id)
        >>> [(chunk.index, chunk.text) async for chunk in chunks]
        [(0, 'Herons wade.'), (1, 'They eat fish.')]

        Args:
            user_id: Id of the user whose own documents the call covers, next to the shared ones.
                User callers may leave it empty. From services, an empty value covers the shared
                documents only.
            document_id: Id of the document.
            page_size: Maximum number of items in a page. 0 means 50, values over 1000 mean 1000.
            page_token: `next_page_token` of the page to continue after. Empty for the first page.
            timeout: Seconds for each page, including retries. None for the client's default.

        Returns:
            A pager: `async for` iterates over all items, `await` returns one page.

        Raises:
            NotFound: Neither the user's own documents nor the shared ones have this id
                (DOCUMENT_NOT_FOUND).
        """

        async def fetch(token: str) -> document_pb2.ListDocumentChunksResponse:
            request = document_pb2.ListDocumentChunksRequest(
                user_id=user_id, document_id=document_id, page_size=page_size, page_token=token
            )
            return await self._call(self._stub.ListDocumentChunks, request, timeout)

        return Pager(fetch, lambda page: page.chunks, page_token)

    async def search_documents(
        self,
        *,
        user_id: str = "",
        query: str = "",
        vector: Sequence[float] = (),
        limit: int = 0,
        document_ids: Sequence[str] = (),
        read_consistency: ReadConsistency = "strong",
        timeout: float | None = None,
    ) -> Sequence[DocumentHit]:
        """Find the chunks nearest in meaning to a text or a vector, best first.

        Exactly one of `query` and `vector` is required.

        Args:
            user_id: Id of the user whose own documents the call covers, next to the shared ones.
                User callers may leave it empty. From services, an empty value covers the shared
                documents only.
            query: Text to search for, at most 8 KiB.
            vector: Embedding to search for, of the search index's dimension.
            limit: Maximum number of hits, up to 100. 0 means 10.
            document_ids: Only chunks of these documents, at most 100. Empty for all.
            read_consistency: `strong`, or `eventual` to accept the data of a replica that lags.
            timeout: Seconds for the call, including retries. None for the client's default.

        Returns:
            The hits, best first.

        Raises:
            FailedPrecondition: Search is off (SEARCH_DISABLED).
            Unavailable: The search index does not answer (SEARCH_UNAVAILABLE).
        """
        metadata = read_metadata(read_consistency)
        request = document_pb2.SearchDocumentsRequest(
            user_id=user_id, query=query, vector=vector, limit=limit, document_ids=document_ids
        )
        return (
            await self._call(self._stub.SearchDocuments, request, timeout, metadata=metadata)
        ).hits


def _chunk(chunk: str | DocumentChunk) -> DocumentChunk:
    return DocumentChunk(text=chunk) if isinstance(chunk, str) else chunk


def _batches(chunks: Iterable[str | DocumentChunk]) -> Iterator[list[DocumentChunk]]:
    """Split chunks into the batches that one request can hold."""
    batch: list[DocumentChunk] = []
    batch_bytes = 0
    for chunk in map(_chunk, chunks):
        chunk_bytes = chunk.ByteSize() + 8  # The field's tag and length.
        if batch and (
            len(batch) == MAX_BATCH_CHUNKS or batch_bytes + chunk_bytes > MAX_BATCH_BYTES
        ):
            yield batch
            batch, batch_bytes = [], 0
        batch.append(chunk)
        batch_bytes += chunk_bytes
    if batch:
        yield batch
