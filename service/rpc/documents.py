"""The RPCs of documents. A caller reads their own documents and the shared ones; shared ones are written by services alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from chathistory.v1 import document_pb2

from service.errors import InvalidArgument, NotFound
from service.ids import SYSTEM_USER_ID, new_id
from service.rpc import convert_documents as convert
from service.rpc import field_masks, paging
from service.rpc.call import Call
from service.rpc.handler import Handler, require_same_id
from service.store import documents
from service.store.chunks import Chunk, ChunkRow
from service.store.db.database import Work
from service.store.documents import DocumentCursor
from service.store.rows import DocumentRow

T = TypeVar("T")

MAX_CHUNKS_BYTES = 1024 * 1024
"""All chunks of one request, serialized."""
_WRITABLE = ("title", "source_uri", "mime_type", "metadata")


class Documents(Handler):
    """Creates, reads, changes and erases documents."""

    async def CreateDocument(
        self, request: document_pb2.CreateDocumentRequest, call: Call
    ) -> document_pb2.CreateDocumentResponse:
        """Create a document; a retry, or the same content from the same source, returns the one that is there."""
        sent = request.document
        if sent.scope == document_pb2.DOCUMENT_SCOPE_SHARED:
            call.caller.require_service()
            user_id = SYSTEM_USER_ID
        else:
            user_id = call.caller.resolve_user_id(request.user_id)
        require_same_id("document.user_id", sent.user_id, user_id)
        document_id = sent.id.lower() or new_id()
        values = convert.document_values(sent, request.chunks, document_id) | {"user_id": user_id}
        chunks = self._chunks(request.chunks)
        row = await self._write(
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
        """Store more chunks; the same ones again change nothing."""
        document_id = request.document_id.lower()
        chunks = self._chunks(request.chunks)
        owner_ids = await self._writers(request.user_id, document_id, call)
        row = await self._write(
            lambda connection: documents.append_chunks(
                connection,
                owner_ids,
                document_id,
                request.first_index,
                chunks,
                search_enabled=self.search.is_enabled,
            ),
            owner_ids[0],
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
        """List the documents that a caller finds, newest first."""
        owner_ids = call.caller.document_owner_ids(request.user_id)
        owner_id = owner_ids[0]
        filters = {
            name: value
            for name in ("status", "source_uri", "mime_type")
            if (value := getattr(request, name))  # Zero and empty mean any.
        }
        bound = ("ListDocuments", *owner_ids, request.scope, sorted(filters.items()))
        size = paging.page_size(request.page_size)
        after = _place(paging.place(request.page_token, *bound))
        if request.scope:
            shared = request.scope == document_pb2.DOCUMENT_SCOPE_SHARED
            owner_ids = tuple(owner for owner in owner_ids if (owner == SYSTEM_USER_ID) == shared)
        rows = (
            await self.database.read(
                lambda connection: documents.list_page(
                    connection, owner_ids, filters, after, size + 1
                ),
                owner_id=owner_id,
                deadline=call.deadline,
            )
            if owner_ids
            else []
        )

        def token(row: DocumentRow) -> str:
            return paging.token(f"{row.created_us} {row.id} {row.user_id}", *bound)

        page, next_token = paging.cut(rows[:size], convert.document, token, more=len(rows) > size)
        return document_pb2.ListDocumentsResponse(documents=page, next_page_token=next_token)

    async def UpdateDocument(
        self, request: document_pb2.UpdateDocumentRequest, call: Call
    ) -> document_pb2.UpdateDocumentResponse:
        """Change fields of a document."""
        sent = request.document
        document_id = sent.id.lower()
        if not document_id:
            raise InvalidArgument.field("document.id", "is required")
        owner_ids = call.caller.document_owner_ids(request.user_id)
        if sent.user_id.lower() not in ("", *owner_ids):
            raise InvalidArgument.field("document.user_id", "is not the request's")
        values = convert.document_changes(
            sent, field_masks.paths(request.update_mask, sent, _WRITABLE)
        )
        owner_ids = await self._writers(request.user_id, document_id, call)
        row = await self.database.write(
            lambda connection: documents.update(
                connection, owner_ids, document_id, values, sent.etag
            ),
            owner_id=owner_ids[0],
            deadline=call.deadline,
        )
        return document_pb2.UpdateDocumentResponse(document=convert.document(row))

    async def DeleteDocument(
        self, request: document_pb2.DeleteDocumentRequest, call: Call
    ) -> document_pb2.DeleteDocumentResponse:
        """Erase a document with its chunks, a large one in slices; its vectors follow."""
        document_id = request.document_id.lower()
        gone = False
        try:
            (user_id,) = await self._writers(request.user_id, document_id, call)
            more = True
            while more:
                _, more = await self.database.write(
                    lambda connection: documents.delete_slice(connection, user_id, document_id),
                    owner_id=user_id,
                    deadline=call.deadline,
                )
            gone = await self._write(
                lambda connection: documents.delete(
                    connection, user_id, document_id, search_enabled=self.search.is_enabled
                ),
                user_id,
                call,
            )
        except NotFound:
            if not request.allow_missing:
                raise
        if not gone and not request.allow_missing:
            raise NotFound.document(document_id)
        return document_pb2.DeleteDocumentResponse()

    async def ListDocumentChunks(
        self, request: document_pb2.ListDocumentChunksRequest, call: Call
    ) -> document_pb2.ListDocumentChunksResponse:
        """List a document's chunks in order."""
        owner_ids, document_id = (
            call.caller.document_owner_ids(request.user_id),
            request.document_id.lower(),
        )
        bound = ("ListDocumentChunks", *owner_ids, document_id)
        size = paging.page_size(request.page_size)
        first = int(paging.place(request.page_token, *bound) or 0)
        rows, more = await self.database.read(
            lambda connection: documents.list_chunks(
                connection, owner_ids, document_id, first, size
            ),
            owner_id=owner_ids[0],
            deadline=call.deadline,
        )

        def token(row: ChunkRow) -> str:
            return paging.token(str(row.chunk_index + 1), *bound)

        page, next_token = paging.cut(rows, convert.chunk, token, more=more)
        return document_pb2.ListDocumentChunksResponse(chunks=page, next_page_token=next_token)

    def _chunks(self, sent: Sequence[document_pb2.DocumentChunk]) -> list[Chunk]:
        """Read chunks to store.

        Raises:
            InvalidArgument: together they are too large, or a vector has another dimension than the index.
        """
        if sum(chunk.ByteSize() for chunk in sent) > MAX_CHUNKS_BYTES:
            raise InvalidArgument.field(
                "chunks", f"must be at most {MAX_CHUNKS_BYTES} bytes together"
            )
        dimensions = self.search.dimensions
        for n, chunk in enumerate(sent):
            if chunk.vector and dimensions not in (None, len(chunk.vector)):
                raise InvalidArgument.field(
                    f"chunks[{n}].vector", f"must have the index's dimension, {dimensions}"
                )
        return [convert.new_chunk(chunk) for chunk in sent]

    async def _writers(self, user_id: str, document_id: str, call: Call) -> tuple[str]:
        """Return the owner of a document that the caller may write.

        Raises:
            NotFound: there is no such document that the caller could read.
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
        return (row.user_id,)

    async def _write(self, work: Work[T], owner_id: str, call: Call) -> T:
        """Run a transaction that enqueues an index change, then wake the indexer."""
        result = await self.database.write(work, owner_id=owner_id, deadline=call.deadline)
        self.search.wake()
        return result


def _place(text: str | None) -> DocumentCursor | None:
    if text is None:
        return None
    created_us, document_id, user_id = text.split(" ")
    return DocumentCursor(int(created_us), document_id, user_id)
