"""Qdrant: all that is asked of it. The same class works on a server's client and, in the child process, on the embedded mode's.

Searches go to an alias whose name carries the model and the dimension; behind it is one collection, named like it with a time. Nothing
but collections of such a name is ever touched, so that others may live in the same Qdrant.
"""

from __future__ import annotations

import array
import asyncio
import re
import sys
import time
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from qdrant_client import AsyncQdrantClient, models
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from service.search.types import (
    Changes,
    InputRejected,
    Point,
    PointFilter,
    ScoredPoint,
    SearchMisconfigured,
    SearchOverloaded,
    SearchUnavailable,
    VectorQuery,
)

T = TypeVar("T")

_INDEXED = {
    "user_id": models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD, is_tenant=True),
    "entity_id": models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD),
    "kind": models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD),
}
_TOO_MANY_REQUESTS = 429
_SERVER_ERROR = 500
_NOT_FOUND = 404


class QdrantIndex:
    """An `Index` (points.py) in a Qdrant, by its asynchronous client."""

    def __init__(
        self, client: AsyncQdrantClient, alias: str, dimensions: int, timeout: float = 10.0
    ) -> None:
        self._client = client
        self._alias = alias
        self._dimensions = dimensions
        self._timeout = timeout
        self._ours = re.compile(re.escape(alias) + r"_[0-9a-f]{16}")
        self._opened: set[str] = set()

    async def open(self) -> bool:
        collection = await self.live_collection()
        if collection is None:
            return False
        info = await self._ask(self._client.get_collection(collection))
        size = getattr(info.config.params.vectors, "size", None)
        if size != self._dimensions:
            raise SearchMisconfigured(
                f"the collection {collection} holds vectors of dimension {size}, and the configured model makes {self._dimensions}: "
                "set EMBEDDINGS_DIMENSIONS to what it makes, or remove the collection, which is then built anew"
            )
        return True

    async def live_collection(self) -> str | None:
        aliases = await self._ask(self._client.get_aliases())
        return next(
            (each.collection_name for each in aliases.aliases if each.alias_name == self._alias),
            None,
        )

    async def create_collection(self) -> str:
        # Time first, so that of several the newest is seen at a glance.
        name = f"{self._alias}_{time.time_ns():016x}"
        vectors = models.VectorParams(size=self._dimensions, distance=models.Distance.COSINE)
        await self._ask(self._client.create_collection(name, vectors_config=vectors))
        for field, schema in _INDEXED.items():
            await self._ask(
                self._client.create_payload_index(name, field, field_schema=schema, wait=True)
            )
        if await self.live_collection() is None:
            await self._switch(name, replace=False)
        return name

    async def publish(self, collection: str) -> None:
        live = await self.live_collection()
        if live != collection:
            await self._switch(collection, replace=live is not None)
        every = await self._ask(self._client.get_collections())
        for each in every.collections:
            if each.name != collection and self._ours.fullmatch(each.name):
                await self._ask(self._client.delete_collection(each.name))

    async def _switch(self, collection: str, *, replace: bool) -> None:
        delete = models.DeleteAliasOperation(
            delete_alias=models.DeleteAlias(alias_name=self._alias)
        )
        create = models.CreateAliasOperation(
            create_alias=models.CreateAlias(collection_name=collection, alias_name=self._alias)
        )
        operations: list[models.AliasOperations] = [delete, create] if replace else [create]
        await self._ask(self._client.update_collection_aliases(operations))

    async def write(self, changes: Changes, building: str | None) -> None:
        points = self._points(changes)
        # Whenever the one that is built takes the live one's place, it has had all that the alias was given.
        if building is not None:
            live = await self.live_collection()
            await self._write(building, changes, points)
            if live == building:
                return
        await self._write(self._alias, changes, points)

    async def _write(
        self, collection: str, changes: Changes, points: list[models.PointStruct]
    ) -> None:
        for wipe in changes.wipes:
            selector = models.FilterSelector(filter=_of(wipe))
            await self._change(self._client.delete(collection, selector, wait=True))
        if changes.deletes:
            gone = models.PointIdsList(points=[point.id for point in changes.deletes])
            await self._change(self._client.delete(collection, gone, wait=True))
        if points:
            await self._change(self._client.upsert(collection, points, wait=True))

    def _points(self, changes: Changes) -> list[models.PointStruct]:
        size = self._dimensions * 4
        return [
            models.PointStruct(
                id=point.id,
                vector=unpack_vector(changes.vectors[n * size : (n + 1) * size]),
                payload=point._asdict(),
            )
            for n, point in enumerate(changes.points)
        ]

    async def search(self, vector: bytes, question: VectorQuery) -> list[ScoredPoint]:
        # The owner first: the embedded mode looks at one condition after the other.
        must: list[models.Condition] = [
            _any("user_id", question.owners),
            _any("kind", [question.kind]),
        ]
        if question.entities:
            must.append(_any("entity_id", question.entities))
        reply = await self._ask(
            self._client.query_points(
                self._alias,
                query=unpack_vector(vector),
                query_filter=models.Filter(must=must),
                limit=question.limit,
                with_payload=True,
                timeout=max(1, round(self._timeout)),
            )
        )
        return [
            ScoredPoint(Point(**each.payload), each.score) for each in reply.points if each.payload
        ]

    async def count(self, wipe: PointFilter) -> int:
        return (
            await self._ask(self._client.count(self._alias, count_filter=_of(wipe), exact=True))
        ).count

    async def close(self) -> None:
        await self._client.close()

    async def _change(self, call: Awaitable[models.UpdateResult]) -> None:
        result = await self._ask(call)
        if result.status != models.UpdateStatus.COMPLETED:
            raise SearchUnavailable(
                f"Qdrant has taken a change and not applied it in time ({result.status.value})"
            )

    async def _ask(self, call: Awaitable[T]) -> T:
        """Make one call within its deadline, and tell an index that is down from one that refuses."""
        try:
            async with asyncio.timeout(self._timeout):
                return await call
        except Exception as error:
            raise _told(error) from error


def _told(error: Exception) -> Exception:
    """Say in our words what a client's error means."""
    name = type(error).__name__
    if isinstance(error, UnexpectedResponse):
        status = error.status_code or _SERVER_ERROR
        if status == _TOO_MANY_REQUESTS:
            return SearchOverloaded(f"Qdrant answers {status}")
        if status == _NOT_FOUND or status >= _SERVER_ERROR:
            return SearchUnavailable(f"Qdrant answers {status}")
        return InputRejected(f"Qdrant refuses it ({status})")
    if isinstance(error, ResourceExhaustedResponse):
        return SearchOverloaded("Qdrant takes no more now")
    if isinstance(error, ResponseHandlingException | OSError | TimeoutError):
        return SearchUnavailable(f"Qdrant does not answer ({name})")
    # The embedded mode says what is not there, or does not fit, as a ValueError.
    if isinstance(error, ValueError):
        return (
            SearchUnavailable("the collection is gone")
            if "not found" in str(error)
            else InputRejected(f"Qdrant refuses it ({name})")
        )
    code = getattr(error, "code", None)
    if callable(code):  # gRPC, which only rpc/ and server.py import.
        status_name = code().name
        refused = status_name in ("INVALID_ARGUMENT", "OUT_OF_RANGE", "FAILED_PRECONDITION")
        return (
            InputRejected(f"Qdrant refuses it ({status_name})")
            if refused
            else SearchUnavailable(f"Qdrant does not answer ({status_name})")
        )
    return error


def _any(field: str, values: Sequence[str]) -> models.FieldCondition:
    return models.FieldCondition(key=field, match=models.MatchAny(any=list(values)))


def _of(wipe: PointFilter) -> models.Filter:
    return models.Filter(
        must=[_any(field, [value]) for field, value in wipe._asdict().items() if value is not None]
    )


def unpack_vector(vector: bytes) -> list[float]:
    """Return what 32-bit floats, little-endian, say."""
    numbers = array.array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()


def remote(
    url: str, api_key: str | None, *, transport: str, grpc_port: int, timeout: float
) -> AsyncQdrantClient:
    """Make the client of a server or cluster; nothing is asked yet."""
    return AsyncQdrantClient(
        url=url,
        api_key=api_key,
        prefer_grpc=transport == "grpc",
        grpc_port=grpc_port,
        timeout=max(1, round(timeout)),
        check_compatibility=False,
    )
