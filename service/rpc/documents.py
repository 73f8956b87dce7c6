"""The RPCs of documents.

Callers read a user's own documents and the shared ones. Only services write shared ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TypeVar

from chathistory.v1 import document_pb2

from service.errors import InvalidArgument, NotFound
from service.ids import SYSTEM_USER_ID, new_id
from service.rpc import convert_documents as convert
from service.rpc import field_masks, paging
from service.rpc.call import Call
from service.rpc.handler import Handler
from service.rpc.page_reads import read_page
from service.rpc.page_tokens import parse_id, parse_index, parse_time_us
from service.store import documents
from service.store.bounded_reads import Connection, Page
from service.store.db.database import Work
from service.store.document_chunks import Chunk, ChunkRow
from service.store.documents import DocumentCursor
from service.store.rows import DocumentRow
from service.store.slices import chunk_slices

T = TypeVar("T")

MAX_CHUNKS_BYTES = 1024 * 1024
"""Limit of the serialized chunks of one request, added up."""
PAUSE_NUMBERS = 16 * 1024
"""Numbers of vectors that are converted between two pauses: one millisecond of work."""
_WRITABLE = ("title", "source_uri", "mime_type", "metadata")


class Documents(Handler):
    """Creates, reads, updates and deletes documents."""

    async def CreateDocument(
        self, request: document_pb2.CreateDocumentRequest, call: Call
    ) -> document_pb2.CreateDocumentResponse:
        """Create a document; a retry, or the same content and source, returns the existing one."""
        document = request.document
        if document.scope == document_pb2.DOCUMENT_SCOPE_SHARED:
            call.caller.require_service()
            user_id = SYSTEM_USER_ID
        else:
            user_id = call.caller.resolve_user_id(request.user_id)
        _require_owner(document, user_id)
        document_id = document.id.lower() or new_id()
        values = convert.document_values(document, request.chunks, document_id)
        values["user_id"] = user_id
        chunks = await self._new_chunks(request.chunks, call)
        row = await self._write_and_wake(
            lambda connection: documents.create(
                connection, values, chunks, search_enabled=self.search.is_enabled
            ),
            user_id,
            call,
        )
        return document_pb2.CreateDocumentResponse(document=convert.document(row))

    async def AppendDocumentChunks(
        self, request: document_pb2.AppendDocumentChunksRequest, call: Call
    ) -> document_pb2.AppendDocumentChunksResponse:
        """Append chunks; repeating a request changes nothing."""
        document_id = request.document_id.lower()
        chunks = await self._new_chunks(request.chunks, call)
        owner_id = await self._writable_owner_id(request.user_id, document_id, call)
        row = await self._write_and_wake(
            lambda connection: documents.append_chunks(
                connection,
                [owner_id],
                document_id,
                request.first_index,
                chunks,
                search_enabled=self.search.is_enabled,
            ),
            owner_id,
            call,
        )
        return document_pb2.AppendDocumentChunksResponse(document=convert.document(row))

    async def GetDocument(
        self, request: document_pb2.GetDocumentRequest, call: Call
    ) -> document_pb2.GetDocumentResponse:
        """Read one document."""
        owner_ids = call.caller.document_owner_ids(request.user_id)
        row = await self.database.read(
            lambda connection: documents.get(connection, owner_ids, request.document_id.lower()),
            owner_id=owner_ids[0],
            deadline=call.deadline,
        )
        return document_pb2.GetDocumentResponse(document=convert.document(row))

    async def ListDocuments(
        self, request: document_pb2.ListDocumentsRequest, call: Call
    ) -> document_pb2.ListDocumentsResponse:
        """List the documents that the caller may read, newest first."""
        owner_ids = call.caller.document_owner_ids(request.user_id)
        owner_id = owner_ids[0]
        filters = {
            name: value
            for name in ("status", "source_uri", "mime_type")
            if (value := getattr(request, name))  # Zero and the empty string do not filter.
        }
        tokens = await self.page_tokens.of_list(
            owner_ids[0],
            call.deadline,
            "ListDocuments",
            *owner_ids,
            request.scope,
            sorted(filters.items()),
        )
        page_size = paging.effective_page_size(request.page_size)
        cursor = tokens.read(request.page_token, _parse_cursor)
        if request.scope:
            is_shared = request.scope == document_pb2.DOCUMENT_SCOPE_SHARED
            owner_ids = tuple(id_ for id_ in owner_ids if (id_ == SYSTEM_USER_ID) == is_shared)
        if not owner_ids:
            return document_pb2.ListDocumentsResponse()

        async def list_rows(
            connection: Connection, last_row: DocumentRow | None, limit: int, max_bytes: int
        ) -> Page[DocumentRow]:
            after = _cursor_at(last_row) if last_row else cursor
            return await documents.list_page(
                connection, owner_ids, filters, after, limit, max_bytes
            )

        def token_after(row: DocumentRow) -> str:
            return tokens.make(f"{row.created_us} {row.id} {row.user_id}")

        rows, has_more = await read_page(
            self.reader(call), "ListDocuments", list_rows, page_size, owner_id, call
        )
        page, next_page_token = await paging.build_page(
            rows,
            convert.document,
            token_after,
            partial(self.conversions.pause, owner_id, call.deadline),
            has_more=has_more,
        )
        return document_pb2.ListDocumentsResponse(documents=page, next_page_token=next_page_token)

    async def UpdateDocument(
        self, request: document_pb2.UpdateDocumentRequest, call: Call
    ) -> document_pb2.UpdateDocumentResponse:
        """Update fields of a document."""
        document = request.document
        document_id = document.id.lower()
        if not document_id:
            raise InvalidArgument.field("document.id", "is required")
        paths = field_masks.update_paths(request.update_mask, document, _WRITABLE)
        values = convert.document_changes(document, paths)
        owner_id = await self._writable_owner_id(request.user_id, document_id, call)
        _require_owner(document, owner_id)
        row = await self.database.write(
            lambda connection: documents.update(
                connection, [owner_id], document_id, values, document.etag
            ),
            owner_id=owner_id,
            deadline=call.deadline,
        )
        return document_pb2.UpdateDocumentResponse(document=convert.document(row))

    async def DeleteDocument(
        self, request: document_pb2.DeleteDocumentRequest, call: Call
    ) -> document_pb2.DeleteDocumentResponse:
        """Delete a document and its chunks, in slices; the indexer deletes the vectors."""
        document_id = request.document_id.lower()
        was_deleted = False
        try:
            owner_id = await self._writable_owner_id(request.user_id, document_id, call)
            await self.delete_in_slices(chunk_slices(owner_id, document_id), owner_id, call)
            was_deleted = await self._write_and_wake(
                lambda connection: documents.delete(
                    connection, owner_id, document_id, search_enabled=self.search.is_enabled
                ),
                owner_id,
                call,
            )
        except NotFound:
            if not request.allow_missing:
                raise
        if not was_deleted:
            if not request.allow_missing:
                raise NotFound.document(document_id)
            await self.confirm_absence(call.owner_id, call)
        return document_pb2.DeleteDocumentResponse()

    async def ListDocumentChunks(
        self, request: document_pb2.ListDocumentChunksRequest, call: Call
    ) -> document_pb2.ListDocumentChunksResponse:
        """List a document's chunks in order."""
        owner_ids = call.caller.document_owner_ids(request.user_id)
        document_id = request.document_id.lower()
        tokens = await self.page_tokens.of_list(
            owner_ids[0], call.deadline, "ListDocumentChunks", *owner_ids, document_id
        )
        page_size = paging.effective_page_size(request.page_size)
        first_index = tokens.read(request.page_token, parse_index) or 0

        async def list_rows(
            connection: Connection, last_row: ChunkRow | None, limit: int, max_bytes: int
        ) -> Page[ChunkRow]:
            index = last_row.chunk_index + 1 if last_row else first_index
            return await documents.list_chunks(
                connection, owner_ids, document_id, index, limit, max_bytes
            )

        def token_after(row: ChunkRow) -> str:
            return tokens.make(str(row.chunk_index + 1))

        rows, has_more = await read_page(
            self.database, "ListDocumentChunks", list_rows, page_size, owner_ids[0], call
        )
        page, next_page_token = await paging.build_page(
            rows,
            convert.chunk,
            token_after,
            partial(self.conversions.pause, owner_ids[0], call.deadline),
            has_more=has_more,
        )
        return document_pb2.ListDocumentChunksResponse(chunks=page, next_page_token=next_page_token)

    async def _new_chunks(
        self, chunks: Sequence[document_pb2.DocumentChunk], call: Call
    ) -> list[Chunk]:
        """Convert chunks to store, and pause after each PAUSE_NUMBERS numbers of vectors.

        Raises:
            InvalidArgument: together they are too large, or a vector does not fit the index.
        """
        if sum(chunk.ByteSize() for chunk in chunks) > MAX_CHUNKS_BYTES:
            raise InvalidArgument.field(
                "chunks", f"must be at most {MAX_CHUNKS_BYTES} bytes together"
            )
        dimensions = self.search.dimensions
        for index, chunk in enumerate(chunks):
            if chunk.vector and dimensions not in (None, len(chunk.vector)):
                raise InvalidArgument.field(
                    f"chunks[{index}].vector",
                    f"must have {dimensions} dimensions, as the index has",
                )
        new_chunks: list[Chunk] = []
        number_count = 0
        for chunk in chunks:
            number_count += len(chunk.vector)
            if number_count > PAUSE_NUMBERS:
                await self.conversions.pause(call.owner_id, call.deadline)
                number_count = 0
            new_chunks.append(convert.new_chunk(chunk))
        return new_chunks

    async def _writable_owner_id(self, user_id: str, document_id: str, call: Call) -> str:
        """Return the owner of a document that the caller may write.

        Raises:
            NotFound: the caller cannot read such a document.
            PermissionDenied: it is shared, and the caller is a user (SERVICE_ONLY).
        """
        owner_ids = call.caller.document_owner_ids(user_id)
        row = await self.database.read(
            lambda connection: documents.get(connection, owner_ids, document_id),
            owner_id=owner_ids[0],
            deadline=call.deadline,
        )
        if row.user_id == SYSTEM_USER_ID:
            call.caller.require_service()
        return row.user_id

    async def _write_and_wake(self, work: Work[T], owner_id: str, call: Call) -> T:
        """Run a transaction that enqueues work for the indexer, then wake the indexer."""
        result = await self.database.write(work, owner_id=owner_id, deadline=call.deadline)
        self.search.wake()
        return result


def _require_owner(document: document_pb2.Document, owner_id: str) -> None:
    """Check that the `user_id` inside a document is empty or its owner.

    Raises:
        InvalidArgument: it is another id.
    """
    if document.user_id and document.user_id.lower() != owner_id:
        raise InvalidArgument.field(
            "document.user_id",
            "must be empty or the document's owner, which is the nil UUID for a shared document",
        )


def _cursor_at(row: DocumentRow) -> DocumentCursor:
    return DocumentCursor(row.created_us, row.id, row.user_id)


def _parse_cursor(text: str) -> DocumentCursor:
    created_us, document_id, user_id = text.split(" ")
    return DocumentCursor(parse_time_us(created_us), parse_id(document_id), parse_id(user_id))
