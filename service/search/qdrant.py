"""`QdrantIndex`: the operations of search on a Qdrant server or on qdrant-client's local mode.

Searches use an alias that names the model and the dimension. It points to one collection, named
after the alias with the time of its creation. Collections with other names are never touched, so
that a Qdrant can be shared with other applications.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Iterator, Sequence
from typing import TypeVar

from qdrant_client import AsyncQdrantClient, models
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from service.search.types import (
    FLOAT_BYTES,
    MARK_POINT,
    Changes,
    InputRejected,
    Point,
    PointFilter,
    ScoredPoint,
    SearchMisconfigured,
    SearchOverloaded,
    SearchUnavailable,
    VectorQuery,
    unpack_vector,
)
from service.store.history_mark import Mark

T = TypeVar("T")

_PAYLOAD_INDEXES = {
    "user_id": models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD, is_tenant=True),
    "entity_id": models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD),
    "kind": models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD),
}
MAX_UPSERT_NUMBERS = 65_536
"""Numbers of all vectors of one request. Their conversion holds the event loop, up to a tenth of a
second for a whole page of the indexer with long vectors."""
_TOO_MANY_REQUESTS = 429
_SERVER_ERROR = 500
_NOT_FOUND = 404
_REJECTED_GRPC_CODES = ("INVALID_ARGUMENT", "OUT_OF_RANGE", "FAILED_PRECONDITION")


class QdrantIndex:
    """A `VectorIndex` in Qdrant, a server or the local mode of its client."""

    max_points: int | None = None
    is_full = False

    def __init__(
        self, client: AsyncQdrantClient, alias: str, dimensions: int, timeout_s: float = 10.0
    ) -> None:
        self._client = client
        self._alias = alias
        self._dimensions = dimensions
        self._timeout_s = timeout_s
        self._collection_name = re.compile(re.escape(alias) + r"_[0-9a-f]{16}")

    async def open(self) -> bool:
        collection = await self.live_collection()
        if collection is None:
            return False
        info = await self._request(self._client.get_collection(collection))
        dimensions = getattr(info.config.params.vectors, "size", None)
        if dimensions != self._dimensions:
            raise SearchMisconfigured(
                f"the collection {collection} holds vectors of dimension {dimensions}, and the "
                f"vectors of the configured model have {self._dimensions}: delete the collection, "
                "which is then rebuilt, or set another CHAT_HISTORY_QDRANT_COLLECTION"
            )
        return True

    async def live_collection(self) -> str | None:
        reply = await self._request(self._client.get_aliases())
        return next(
            (alias.collection_name for alias in reply.aliases if alias.alias_name == self._alias),
            None,
        )

    async def create_collection(self, mark: Mark | None = None) -> str:
        # A fixed-width time, so that names sort by age.
        name = f"{self._alias}_{time.time_ns():016x}"
        vectors = models.VectorParams(size=self._dimensions, distance=models.Distance.COSINE)
        await self._request(self._client.create_collection(name, vectors_config=vectors))
        for field, schema in _PAYLOAD_INDEXES.items():
            await self._request(
                self._client.create_payload_index(name, field, field_schema=schema, wait=True)
            )
        if mark is not None:
            await self._update(self._client.upsert(name, [self._mark_point(mark)], wait=True))
        if await self.live_collection() is None:
            await self._set_alias(name, replace=False)
        return name

    async def has_collection(self, collection: str) -> bool:
        return collection in await self._collection_names()

    async def _collection_names(self) -> list[str]:
        reply = await self._request(self._client.get_collections())
        return [description.name for description in reply.collections]

    async def read_mark(self, collection: str | None = None) -> Mark | None:
        records = await self._request(
            self._client.retrieve(collection or self._alias, [MARK_POINT.id], with_payload=True)
        )
        payload = records[0].payload if records else None
        return Mark(str(payload["epoch"]), int(payload["counter"])) if payload else None

    def _mark_point(self, mark: Mark) -> models.PointStruct:
        # Not the zero vector, which has no direction.
        vector = [1.0] + [0.0] * (self._dimensions - 1)
        payload = {**MARK_POINT._asdict(), **mark._asdict()}
        return models.PointStruct(id=MARK_POINT.id, vector=vector, payload=payload)

    async def publish(self, collection: str) -> None:
        live = await self.live_collection()
        if live != collection:
            await self._set_alias(collection, replace=live is not None)
        for name in await self._collection_names():
            if name != collection and self._collection_name.fullmatch(name):
                await self._request(self._client.delete_collection(name))

    async def _set_alias(self, collection: str, *, replace: bool) -> None:
        delete = models.DeleteAliasOperation(
            delete_alias=models.DeleteAlias(alias_name=self._alias)
        )
        create = models.CreateAliasOperation(
            create_alias=models.CreateAlias(collection_name=collection, alias_name=self._alias)
        )
        operations: list[models.AliasOperations] = [delete, create] if replace else [create]
        await self._request(self._client.update_collection_aliases(operations))

    async def write(self, changes: Changes, building: str | None) -> None:
        # The new collection first: it may replace the live one at any time, and must then
        # hold every change that the live one holds.
        if building is not None:
            live = await self.live_collection()
            await self._write(building, changes)
            if live == building:
                return
            # The rebuild may be due because the live one is ahead of the database. Until it is
            # replaced, its mark must show that.
            changes = changes._replace(mark=None)
        await self._write(self._alias, changes)

    async def _write(self, collection: str, changes: Changes) -> None:
        marks = [self._mark_point(changes.mark)] if changes.mark else []
        if marks and (changes.delete_filters or changes.deletes):
            await self._update(self._client.upsert(collection, marks, wait=True))
            marks = []
        for point_filter in changes.delete_filters:
            selector = models.FilterSelector(filter=_filter(point_filter))
            await self._update(self._client.delete(collection, selector, wait=True))
        if changes.deletes:
            ids = models.PointIdsList(points=[point.id for point in changes.deletes])
            await self._update(self._client.delete(collection, ids, wait=True))
        for points in self._upserts(changes):
            await self._update(self._client.upsert(collection, marks + points, wait=True))
            marks = []

    def _upserts(self, changes: Changes) -> Iterator[list[models.PointStruct]]:
        """Yield the points to write, in parts of up to MAX_UPSERT_NUMBERS."""
        vector_bytes = self._dimensions * FLOAT_BYTES
        part_size = max(1, MAX_UPSERT_NUMBERS // self._dimensions)
        for start in range(0, len(changes.upserts), part_size):
            part = enumerate(changes.upserts[start : start + part_size], start)
            yield [
                models.PointStruct(
                    id=point.id,
                    vector=unpack_vector(
                        changes.vectors[n * vector_bytes : (n + 1) * vector_bytes]
                    ),
                    payload=point._asdict(),
                )
                for n, point in part
            ]

    async def search(self, vector: bytes, query: VectorQuery) -> list[ScoredPoint]:
        # The owner first: local mode evaluates one condition after the other.
        must: list[models.Condition] = [
            _match_any("user_id", query.owner_ids),
            _match_any("kind", [query.kind]),
        ]
        if query.entity_ids:
            must.append(_match_any("entity_id", query.entity_ids))
        reply = await self._request(
            self._client.query_points(
                self._alias,
                query=unpack_vector(vector),
                query_filter=models.Filter(must=must),
                limit=query.limit,
                with_payload=True,
                timeout=max(1, round(self._timeout_s)),
            )
        )
        return [ScoredPoint(Point(**hit.payload), hit.score) for hit in reply.points if hit.payload]

    async def count(self, point_filter: PointFilter) -> int:
        reply = await self._request(
            self._client.count(self._alias, count_filter=_filter(point_filter), exact=True)
        )
        return reply.count

    async def close(self) -> None:
        await self._client.close()

    async def _update(self, call: Awaitable[models.UpdateResult]) -> None:
        result = await self._request(call)
        if result.status != models.UpdateStatus.COMPLETED:
            raise SearchUnavailable(
                f"Qdrant accepted a change and did not apply it in time ({result.status.value})"
            )

    async def _request(self, call: Awaitable[T]) -> T:
        """Await a call of the client with the timeout, and translate its errors."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await call
        except Exception as error:
            raise _translate(error) from error


def _translate(error: Exception) -> Exception:
    """Return the error of types.py for an error of the client; unknown errors stay as they are."""
    name = type(error).__name__
    if isinstance(error, UnexpectedResponse):
        return _translate_http(error.status_code or _SERVER_ERROR)
    if isinstance(error, ResourceExhaustedResponse):
        return SearchOverloaded("Qdrant accepts no more requests now")
    if isinstance(error, ResponseHandlingException | OSError | TimeoutError):
        return SearchUnavailable(f"Qdrant does not respond ({name})")
    if isinstance(error, ValueError):
        # Local mode reports missing collections and invalid input alike.
        if "not found" in str(error):
            return SearchUnavailable("the collection does not exist")
        return InputRejected(f"Qdrant refuses the request ({name})")
    code = getattr(error, "code", None)
    if callable(code):  # An AioRpcError; only rpc/, auth/, server.py and telemetry/ import grpc.
        status_name = code().name
        if status_name in _REJECTED_GRPC_CODES:
            return InputRejected(f"Qdrant refuses the request ({status_name})")
        return SearchUnavailable(f"Qdrant does not respond ({status_name})")
    return error


def _translate_http(status: int) -> Exception:
    if status == _TOO_MANY_REQUESTS:
        return SearchOverloaded(f"Qdrant answers HTTP {status}")
    if status == _NOT_FOUND or status >= _SERVER_ERROR:
        return SearchUnavailable(f"Qdrant answers HTTP {status}")
    return InputRejected(f"Qdrant refuses the request (HTTP {status})")


def _match_any(field: str, values: Sequence[str]) -> models.FieldCondition:
    return models.FieldCondition(key=field, match=models.MatchAny(any=list(values)))


def _filter(point_filter: PointFilter) -> models.Filter:
    return models.Filter(
        must=[
            _match_any(field, [value])
            for field, value in point_filter._asdict().items()
            if value is not None
        ]
    )


def connect(
    url: str, api_key: str | None, *, transport: str, grpc_port: int, timeout_s: float
) -> AsyncQdrantClient:
    """Return the client of a Qdrant server or cluster, without sending a request."""
    return AsyncQdrantClient(
        url=url,
        api_key=api_key,
        prefer_grpc=transport == "grpc",
        grpc_port=grpc_port,
        timeout=max(1, round(timeout_s)),
        check_compatibility=False,
    )
