"""The RPCs of search.

The index returns ids and scores only. The rows are read from PostgreSQL under the caller's id, so
PostgreSQL decides what a caller may see.
"""

from __future__ import annotations

import html
import re
from collections.abc import AsyncGenerator, Sequence

from chathistory.v1 import document_pb2, message_pb2, search_pb2

from service.errors import FailedPrecondition, InvalidArgument
from service.rpc import convert_documents
from service.rpc.call import Call
from service.rpc.handler import Handler
from service.rpc.paging import MAX_REPLY_BYTES
from service.search.types import pack_vector
from service.store import document_chunks, fulltext
from service.store.bounded_reads import read_large
from service.store.document_chunks import ChunkKey
from service.store.rows import DocumentRow

DEFAULT_LIMIT = 10
SPARE_HITS = 10
"""Hits requested beyond the limit, to replace hits whose rows have been deleted since."""
MIN_RERANKED_CHUNKS = 30
"""Minimum number of nearest chunks that are reranked by their text."""
MIN_FUSED_HITS = 50
"""Minimum number of hits of each ranking that are fused."""
RANK_CONSTANT = 60
"""Dampens the weight of the first ranks in reciprocal rank fusion.

60 is the value of Cormack, Clarke and Büttcher (SIGIR 2009), who introduced the method.
"""

_TAGS = {fulltext.MATCH_START: "<mark>", fulltext.MATCH_END: "</mark>"}
_MARKS = re.compile(f"([{''.join(_TAGS)}])")

MessageKey = tuple[str, str]
"""A message: session id, message id."""
ChunkTexts = dict[ChunkKey, tuple[DocumentRow, str]]
"""Each chunk's document and text."""


class Searches(Handler):
    """Searches documents and messages."""

    async def SearchDocuments(
        self, request: document_pb2.SearchDocumentsRequest, call: Call
    ) -> document_pb2.SearchDocumentsResponse:
        """Find the nearest chunks of the user's own documents and the shared ones."""
        owner_ids = call.caller.document_owner_ids(request.user_id)
        reader = self.reader(call)
        if bool(request.query.strip()) == bool(request.vector):
            raise InvalidArgument.field("query", "exactly one of query and vector is required")
        limit = request.limit or DEFAULT_LIMIT
        vector_scores = await self._nearest_chunks(request, owner_ids, limit, call)
        if not vector_scores:
            return document_pb2.SearchDocumentsResponse()
        page = await read_large(
            reader,
            call,
            MAX_REPLY_BYTES,
            lambda connection: document_chunks.find_chunks(
                connection, owner_ids, list(vector_scores), MAX_REPLY_BYTES
            ),
            owner_id=owner_ids[0],
            deadline=call.deadline,
        )
        texts = {chunk.key: (chunk.document, chunk.text) for chunk in page.rows}
        scores = {key: score for key, score in vector_scores.items() if key in texts}
        if scores and not request.vector:
            scores = await self._rerank(owner_ids[0], request.query, scores, texts, call)
        return _documents_reply(list(scores.items())[:limit], texts)

    async def SearchMessages(
        self, request: message_pb2.SearchMessagesRequest, call: Call
    ) -> message_pb2.SearchMessagesResponse:
        """Find a user's messages by words, by meaning, or by both."""
        user_id = call.caller.resolve_user_id(request.user_id)
        reader = self.reader(call)
        if not request.query.strip():
            raise InvalidArgument.field("query", "is required")
        limit = request.limit or DEFAULT_LIMIT
        mode = self._effective_mode(request.mode)
        has_words, has_meaning = (
            mode != message_pb2.SEARCH_MODE_SEMANTIC,
            mode != message_pb2.SEARCH_MODE_LEXICAL,
        )
        if not has_meaning:
            fulltext.check_query(request.query)
        # Semantic first: if the index is unavailable, no lexical search is run in vain.
        semantic = await self._semantic_scores(request, mode, user_id, limit, call)
        if not (has_words or semantic):
            return message_pb2.SearchMessagesResponse()
        scores: dict[MessageKey, float] = {}

        def rank(lexical: Sequence[fulltext.Match]) -> Sequence[MessageKey]:
            nonlocal scores
            scores = _fused_scores(lexical, semantic)
            return list(scores)[: limit + SPARE_HITS]

        page = await read_large(
            reader,
            call,
            MAX_REPLY_BYTES,
            lambda connection: fulltext.find(
                connection,
                user_id,
                request.query,
                request.session_id.lower() or None,
                _candidate_count(mode, limit) if has_words else 0,
                rank,
                is_cut=has_meaning,
            ),
            owner_id=user_id,
            deadline=call.deadline,
        )
        return await self._messages_reply(page.rows[:limit], scores, user_id, call)

    async def RebuildSearchIndex(
        self, request: search_pb2.RebuildSearchIndexRequest, call: Call
    ) -> AsyncGenerator[search_pb2.RebuildSearchIndexResponse]:
        """Rebuild the index from PostgreSQL, and send the progress."""
        async for progress in self.search.rebuild():
            yield search_pb2.RebuildSearchIndexResponse(
                total_count=progress.total,
                done_count=progress.done,
                failed_count=progress.failed,
                collection=progress.collection or "",
            )

    async def _nearest_chunks(
        self,
        request: document_pb2.SearchDocumentsRequest,
        owner_ids: Sequence[str],
        limit: int,
        call: Call,
    ) -> dict[ChunkKey, float]:
        if request.vector:
            query: str | bytes = pack_vector(request.vector)
            candidate_count = limit + SPARE_HITS
        else:
            query = request.query
            candidate_count = max(MIN_RERANKED_CHUNKS, limit + SPARE_HITS)
        document_ids = [document_id.lower() for document_id in request.document_ids]
        hits = await self.search.search_chunks(
            owner_ids, query, document_ids, candidate_count, call.deadline
        )
        return {
            (hit.point.user_id, hit.point.entity_id, int(hit.point.item)): hit.score for hit in hits
        }

    async def _rerank(
        self,
        owner_id: str,
        query: str,
        scores: dict[ChunkKey, float],
        texts: ChunkTexts,
        call: Call,
    ) -> dict[ChunkKey, float]:
        """Return the rerank scores of chunks, best first; `scores` if there is no reranker."""
        titled_texts = [(texts[key][0].title, texts[key][1]) for key in scores]
        text_scores = await self.search.rerank(owner_id, query, titled_texts, call.deadline)
        if text_scores is None:
            return scores
        return dict(sorted(zip(scores, text_scores, strict=True), key=lambda item: -item[1]))

    def _effective_mode(
        self, mode: message_pb2.SearchMode.ValueType
    ) -> message_pb2.SearchMode.ValueType:
        """Return the mode of a message search: the request's, or the default if it has none.

        Raises:
            FailedPrecondition: the mode needs an index of messages (SEARCH_DISABLED).
        """
        if not mode:
            return (
                message_pb2.SEARCH_MODE_HYBRID
                if self.search.indexes_messages
                else message_pb2.SEARCH_MODE_LEXICAL
            )
        if mode != message_pb2.SEARCH_MODE_LEXICAL and not self.search.indexes_messages:
            raise FailedPrecondition(
                "semantic and hybrid search of messages are disabled on this server "
                "(CHAT_HISTORY_SEARCH, CHAT_HISTORY_INDEX_MESSAGES); use SEARCH_MODE_LEXICAL",
                reason="SEARCH_DISABLED",
            )
        return mode

    async def _semantic_scores(
        self,
        request: message_pb2.SearchMessagesRequest,
        mode: message_pb2.SearchMode.ValueType,
        user_id: str,
        limit: int,
        call: Call,
    ) -> dict[MessageKey, float] | None:
        """Return the scores of messages by meaning, best first; None if the mode needs none."""
        if mode == message_pb2.SEARCH_MODE_LEXICAL:
            return None
        hits = await self.search.search_messages(
            user_id,
            request.query,
            request.session_id.lower(),
            _candidate_count(mode, limit),
            call.deadline,
        )
        return {(hit.point.entity_id, hit.point.item): hit.score for hit in hits}

    async def _messages_reply(
        self,
        matches: Sequence[fulltext.MatchedMessage],
        scores: dict[MessageKey, float],
        user_id: str,
        call: Call,
    ) -> message_pb2.SearchMessagesResponse:
        """Return the hits, as many as fit into a reply with their snippets."""
        reply = message_pb2.SearchMessagesResponse()
        total_bytes = 0
        for match in matches:
            hit = message_pb2.MessageHit(
                message=await self.conversions.message(
                    match.message, match.session_id, user_id, call.deadline
                ),
                score=scores[match.session_id, match.message.id],
                snippet=_snippet_html(match.snippet),
            )
            total_bytes += hit.ByteSize()
            if total_bytes > MAX_REPLY_BYTES and reply.hits:
                break
            reply.hits.append(hit)
        return reply


def _candidate_count(mode: message_pb2.SearchMode.ValueType, limit: int) -> int:
    """Return the number of messages that each ranking of a search returns."""
    match mode:
        case message_pb2.SEARCH_MODE_LEXICAL:
            return limit
        case message_pb2.SEARCH_MODE_SEMANTIC:
            return limit + SPARE_HITS
        case _:
            return max(MIN_FUSED_HITS, limit)


def _fused_scores(
    lexical: Sequence[fulltext.Match], semantic: dict[MessageKey, float] | None
) -> dict[MessageKey, float]:
    """Return the scores of messages, best first, from the rankings that the mode has."""
    ranks = {(match.session_id, match.message_id): match.rank for match in lexical}
    if semantic is None:
        return ranks
    return reciprocal_rank_fusion((ranks, semantic))


def _documents_reply(
    scores: Sequence[tuple[ChunkKey, float]], texts: ChunkTexts
) -> document_pb2.SearchDocumentsResponse:
    """Return the hits, as many as fit into a reply."""
    reply = document_pb2.SearchDocumentsResponse()
    total_bytes = 0
    for key, score in scores:
        row, text = texts[key]
        hit = document_pb2.DocumentHit(
            document=convert_documents.document(row),
            chunk_index=key[2],
            text=text,
            score=score,
        )
        total_bytes += hit.ByteSize()
        if total_bytes > MAX_REPLY_BYTES and reply.hits:
            break
        reply.hits.append(hit)
    return reply


def reciprocal_rank_fusion(
    rankings: Sequence[dict[MessageKey, float]],
) -> dict[MessageKey, float]:
    """Fuse rankings by the reciprocals of the ranks: scores of different kinds are not comparable.

    Returns:
        The fused scores, best first.
    """
    scores: dict[MessageKey, float] = {}
    for ranking in rankings:
        for rank, key in enumerate(ranking, 1):
            scores[key] = scores.get(key, 0.0) + 1 / (RANK_CONSTANT + rank)
    return dict(sorted(scores.items(), key=lambda item: -item[1]))


def _snippet_html(snippet: str) -> str:
    """Return a snippet as HTML: matches in `<mark>`, everything else escaped.

    A long snippet is cut, perhaps within a match.
    """
    parts: list[str] = []
    is_marked = False
    for part in _MARKS.split(html.escape(snippet, quote=False)):
        if part not in _TAGS:
            parts.append(part)
        elif is_marked != (part == fulltext.MATCH_START):
            is_marked = not is_marked
            parts.append(_TAGS[part])
    if is_marked:
        parts.append("</mark>")
    return "".join(parts)
