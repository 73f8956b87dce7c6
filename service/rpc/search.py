"""The RPCs of search. What the index finds is read again from PostgreSQL under the caller's id before anybody sees it."""

from __future__ import annotations

import html
from collections.abc import AsyncGenerator, Sequence

from chathistory.v1 import document_pb2, message_pb2, search_pb2

from service.errors import FailedPrecondition, InvalidArgument
from service.rpc import convert, convert_documents
from service.rpc.call import Call
from service.rpc.handler import Handler
from service.store import chunks, fulltext

DEFAULT_LIMIT = 10
SPARE = 10
"""Points asked for beyond the limit, since some of what is found may be gone by now."""
COMPARED = 30
"""Chunks whose texts are compared with the query, at the least."""
FUSED = 50
"""Hits of each way that are fused, at the least."""
RANK_CONSTANT = 60
"""Of reciprocal rank fusion: how little the first places count above the next; 60 is what its authors found, and others since."""
MAX_REPLY_BYTES = 3 * 1024 * 1024

Key = tuple[str, str]


class Searches(Handler):
    """Searches documents and messages."""

    async def SearchDocuments(
        self, request: document_pb2.SearchDocumentsRequest, call: Call
    ) -> document_pb2.SearchDocumentsResponse:
        """Find the chunks that come nearest in meaning, of the caller's own documents and the shared ones."""
        owner_ids = call.caller.document_owner_ids(request.user_id)
        if bool(request.query.strip()) == bool(request.vector):
            raise InvalidArgument.field("query", "either this or vector is required")
        limit = request.limit or DEFAULT_LIMIT
        query = convert_documents.packed(request.vector) if request.vector else request.query
        ids = [document_id.lower() for document_id in request.document_ids]
        wide = limit + SPARE if request.vector else max(COMPARED, limit + SPARE)
        found = await self.search.search_chunks(owner_ids, query, ids, wide, call.deadline)
        near = {
            (each.point.user_id, each.point.entity_id, int(each.point.item)): each.score
            for each in found
        }
        rows = (
            await self.database.read(
                lambda connection: chunks.find_chunks(connection, owner_ids, list(near)),
                owner_id=owner_ids[0],
                deadline=call.deadline,
            )
            if near
            else {}
        )
        scores = {key: score for key, score in near.items() if key in rows}
        if scores and not request.vector:
            texts = [(rows[key][0].title, rows[key][1]) for key in scores]
            nearness = await self.search.rerank(request.query, texts, call.deadline)
            if nearness is not None:
                scores = dict(sorted(zip(scores, nearness, strict=True), key=lambda item: -item[1]))
        reply = document_pb2.SearchDocumentsResponse()
        total = 0
        for key, score in list(scores.items())[:limit]:
            row, text = rows[key]
            hit = document_pb2.DocumentHit(
                document=convert_documents.document(row), chunk_index=key[2], text=text, score=score
            )
            total += hit.ByteSize()
            if total > MAX_REPLY_BYTES and reply.hits:
                break
            reply.hits.append(hit)
        return reply

    async def SearchMessages(
        self, request: message_pb2.SearchMessagesRequest, call: Call
    ) -> message_pb2.SearchMessagesResponse:
        """Find a user's messages by words, by meaning, or by both."""
        user_id, session_id = (
            call.caller.resolve_user_id(request.user_id),
            request.session_id.lower(),
        )
        if not request.query.strip():
            raise InvalidArgument.field("query", "is required")
        limit = request.limit or DEFAULT_LIMIT
        wide = max(FUSED, limit)
        match self._mode(request.mode):
            case message_pb2.SEARCH_MODE_LEXICAL:
                scores = await self._by_words(user_id, request.query, session_id, limit, call)
            case message_pb2.SEARCH_MODE_SEMANTIC:
                scores = await self._by_meaning(
                    user_id, request.query, session_id, limit + SPARE, call
                )
            case _:
                # Meaning first: it is what may be down, and then the words need not be looked for.
                by_meaning = await self._by_meaning(user_id, request.query, session_id, wide, call)
                by_words = await self._by_words(user_id, request.query, session_id, wide, call)
                scores = reciprocal_rank_fusion((by_words, by_meaning))
        keys = list(scores)[: limit + SPARE]
        said = (
            await fulltext.read_matches(self.database, user_id, keys, request.query, call.deadline)
            if keys
            else []
        )
        reply = message_pb2.SearchMessagesResponse()
        for each in said[:limit]:
            message = convert.message(each.message, each.session_id)
            score = scores[each.session_id, each.message.id]
            reply.hits.add(message=message, score=score, snippet=marked(each.snippet))
        return reply

    async def RebuildSearchIndex(
        self, request: search_pb2.RebuildSearchIndexRequest, call: Call
    ) -> AsyncGenerator[search_pb2.RebuildSearchIndexResponse]:
        """Build the index anew, and tell how far it is."""
        async for progress in self.search.rebuild():
            yield search_pb2.RebuildSearchIndexResponse(
                total_count=progress.total,
                done_count=progress.done,
                failed_count=progress.failed,
                collection=progress.collection or "",
            )

    def _mode(self, asked: message_pb2.SearchMode.ValueType) -> message_pb2.SearchMode.ValueType:
        """Return how messages are searched.

        Raises:
            FailedPrecondition: by meaning, and messages are not indexed (SEARCH_DISABLED).
        """
        search_enabled = self.search.indexes_messages
        if not asked:
            return (
                message_pb2.SEARCH_MODE_HYBRID
                if search_enabled
                else message_pb2.SEARCH_MODE_LEXICAL
            )
        if asked != message_pb2.SEARCH_MODE_LEXICAL and not search_enabled:
            raise FailedPrecondition(
                "search of messages by meaning is switched off (CHAT_HISTORY_SEARCH, CHAT_HISTORY_INDEX_MESSAGES)",
                reason="SEARCH_DISABLED",
            )
        return asked

    async def _by_words(
        self, user_id: str, query: str, session_id: str, limit: int, call: Call
    ) -> dict[Key, float]:
        found = await fulltext.search(
            self.database, user_id, query, session_id or None, limit, call.deadline
        )
        return {(each.session_id, each.message_id): each.rank for each in found}

    async def _by_meaning(
        self, user_id: str, query: str, session_id: str, limit: int, call: Call
    ) -> dict[Key, float]:
        found = await self.search.search_messages(user_id, query, session_id, limit, call.deadline)
        return {(each.point.entity_id, each.point.item): each.score for each in found}


def reciprocal_rank_fusion(orders: Sequence[dict[Key, float]]) -> dict[Key, float]:
    """Fuse several orders into one by reciprocal ranks: scores of different kinds cannot be added, places can."""
    scores: dict[Key, float] = {}
    for order in orders:
        for place, key in enumerate(order, 1):
            scores[key] = scores.get(key, 0.0) + 1 / (RANK_CONSTANT + place)
    return dict(sorted(scores.items(), key=lambda item: -item[1]))


def marked(snippet: str) -> str:
    """Put the marks of a match into a page's language, and nothing else of it."""
    escaped = html.escape(snippet, quote=False)
    return escaped.replace(fulltext.MATCH_START, "<mark>").replace(fulltext.MATCH_END, "</mark>")
