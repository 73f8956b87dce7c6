"""Documents: what a chatbot answers from, in chunks that search finds.

Without `user_id` a service caller is about the shared documents alone.
"""

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

from chathistory_client.connection import DELETE_TIMEOUT_S, Connection
from chathistory_client.fields import UNSET, Metadata, Unset, set_fields, struct
from chathistory_client.ids import new_id
from chathistory_client.paging import Pager

MAX_CHUNKS = 1000
MAX_CHUNK_BYTES = 1024 * 1024 - 64 * 1024
"""What the chunks of one request may take: the service's 1 MiB, with room for the rest."""


class Documents(Connection):
    """Creates, reads, changes, erases and searches documents. A user caller may leave `user_id` out."""

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
        """Create a document with its chunks; more of them than one request takes go in several.

        The same `content_sha256` and `source_uri` again return the document that is there, so loading twice stores once.

        >>> document = await client.create_document(
        ...     user_id=user_id, title="Herons", chunks=["Herons wade.", "They eat fish."], source_uri="file:herons.md"
        ... )
        >>> document.title, document.chunk_count
        ('Herons', 2)
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
        first = next(batches, [])
        request = document_pb2.CreateDocumentRequest(
            user_id=user_id, document=document, chunks=first
        )
        stored = (await self._call(self._stub.CreateDocument, request, timeout)).document
        done = len(first)
        for batch in batches:
            stored = await self.append_document_chunks(
                user_id=user_id,
                document_id=stored.id,
                first_index=done,
                chunks=batch,
                timeout=timeout,
            )
            done += len(batch)
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
        """Store more chunks of a document; the same chunk again changes nothing."""
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
        """Read one document, the user's own or a shared one."""
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
        timeout: float | None = None,
    ) -> Pager[document_pb2.ListDocumentsResponse, Document]:
        """List a user's own documents and the shared ones, newest first: `async for` gives all of them, `await` one page.

        >>> _ = await client.create_document(user_id=user_id, title="Herons", mime_type="text/markdown")
        >>> documents = client.list_documents(user_id=user_id, mime_type="text/markdown")
        >>> [document.title async for document in documents]
        ['Herons']
        """

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
            return await self._call(self._stub.ListDocuments, request, timeout)

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
        """Change the fields that are given.

        Raises:
            Conflict: `etag` is given and is not that of the stored document (ETAG_MISMATCH).
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
        """Erase a document with its chunks and vectors."""
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
        """List a document's chunks in order: what a citation points to.

        >>> document = await client.create_document(user_id=user_id, chunks=["Herons wade.", "They eat fish."])
        >>> chunks = client.list_document_chunks(user_id=user_id, document_id=document.id)
        >>> [(chunk.index, chunk.text) async for chunk in chunks]
        [(0, 'Herons wade.'), (1, 'They eat fish.')]
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
        timeout: float | None = None,
    ) -> Sequence[DocumentHit]:
        """Find the chunks nearest in meaning, best first, in the user's own documents and the shared ones.

        Raises:
            FailedPrecondition: search is switched off (SEARCH_DISABLED).
            Unavailable: the search index does not answer (SEARCH_UNAVAILABLE).
        """
        request = document_pb2.SearchDocumentsRequest(
            user_id=user_id, query=query, vector=vector, limit=limit, document_ids=document_ids
        )
        return (await self._call(self._stub.SearchDocuments, request, timeout)).hits


def _chunk(given: str | DocumentChunk) -> DocumentChunk:
    return DocumentChunk(text=given) if isinstance(given, str) else given


def _batches(chunks: Iterable[str | DocumentChunk]) -> Iterator[list[DocumentChunk]]:
    """Cut chunks into what one request takes."""
    batch: list[DocumentChunk] = []
    size = 0
    for chunk in map(_chunk, chunks):
        added = chunk.ByteSize() + 8
        if batch and (len(batch) == MAX_CHUNKS or size + added > MAX_CHUNK_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(chunk)
        size += added
    if batch:
        yield batch
