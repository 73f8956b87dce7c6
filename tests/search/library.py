"""`Library`: the calls of documents and search, as one user makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chathistory.v1 import document_pb2, message_pb2

from tests.support.chat import Chat

SHARED = document_pb2.DOCUMENT_SCOPE_SHARED
INDEXED = document_pb2.DOCUMENT_STATUS_INDEXED
LEXICAL, SEMANTIC, HYBRID = (
    message_pb2.SEARCH_MODE_LEXICAL,
    message_pb2.SEARCH_MODE_SEMANTIC,
    message_pb2.SEARCH_MODE_HYBRID,
)


def chunks(texts: Sequence[str]) -> list[document_pb2.DocumentChunk]:
    """Return a chunk for each text."""
    return [document_pb2.DocumentChunk(text=text) for text in texts]


class Library:
    """One user's documents and search. Each method makes one call, with the user's id filled in."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.stub = chat.stub
        self.user_id = chat.user_id

    async def create(self, texts: Sequence[str] = (), **fields: Any) -> document_pb2.Document:
        request = document_pb2.CreateDocumentRequest(
            user_id=self.user_id, document=document_pb2.Document(**fields), chunks=chunks(texts)
        )
        return (await self.stub.CreateDocument(request)).document

    async def append(
        self, document_id: str, first_index: int, texts: Sequence[str]
    ) -> document_pb2.Document:
        request = document_pb2.AppendDocumentChunksRequest(
            user_id=self.user_id,
            document_id=document_id,
            first_index=first_index,
            chunks=chunks(texts),
        )
        return (await self.stub.AppendDocumentChunks(request)).document

    async def get(self, document_id: str) -> document_pb2.Document:
        request = document_pb2.GetDocumentRequest(user_id=self.user_id, document_id=document_id)
        return (await self.stub.GetDocument(request)).document

    async def list_page(self, **fields: Any) -> document_pb2.ListDocumentsResponse:
        return await self.stub.ListDocuments(
            document_pb2.ListDocumentsRequest(user_id=self.user_id, **fields)
        )

    async def list_all(self, **fields: Any) -> list[document_pb2.Document]:
        """Read all pages of a list."""
        documents: list[document_pb2.Document] = []
        token = ""
        while True:
            reply = await self.list_page(page_token=token, **fields)
            documents += reply.documents
            token = reply.next_page_token
            if not token:
                return documents

    async def update(self, mask: Sequence[str] = (), **fields: Any) -> document_pb2.Document:
        request = document_pb2.UpdateDocumentRequest(
            user_id=self.user_id, document=document_pb2.Document(**fields)
        )
        request.update_mask.paths.extend(mask)
        return (await self.stub.UpdateDocument(request)).document

    async def delete(self, document_id: str, **fields: Any) -> None:
        await self.stub.DeleteDocument(
            document_pb2.DeleteDocumentRequest(
                user_id=self.user_id, document_id=document_id, **fields
            )
        )

    async def read_chunks(self, document_id: str, page_size: int = 0) -> list[str]:
        """Read the texts of all chunks of a document, and check their indexes."""
        texts: list[str] = []
        token = ""
        while True:
            reply = await self.stub.ListDocumentChunks(
                document_pb2.ListDocumentChunksRequest(
                    user_id=self.user_id,
                    document_id=document_id,
                    page_size=page_size,
                    page_token=token,
                )
            )
            expected = list(range(len(texts), len(texts) + len(reply.chunks)))
            assert [chunk.index for chunk in reply.chunks] == expected
            texts += [chunk.text for chunk in reply.chunks]
            token = reply.next_page_token
            if not token:
                return texts

    async def search(self, query: str = "", **fields: Any) -> list[document_pb2.DocumentHit]:
        request = document_pb2.SearchDocumentsRequest(user_id=self.user_id, query=query, **fields)
        return list((await self.stub.SearchDocuments(request)).hits)

    async def search_messages(
        self, query: str, mode: message_pb2.SearchMode.ValueType = SEMANTIC, **fields: Any
    ) -> list[message_pb2.MessageHit]:
        request = message_pb2.SearchMessagesRequest(
            user_id=self.user_id, query=query, mode=mode, **fields
        )
        return list((await self.stub.SearchMessages(request)).hits)
