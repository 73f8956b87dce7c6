"""`QdrantServer`: Qdrant's gRPC interface in front of qdrant-client's local engine.

Transport, outages and timeouts are real; points, filters and aliases are those of the engine. It
serves the requests that this project sends, with the package's own stubs and conversions.
`python -m tests.search.qdrant_server PORT` serves in a process of its own and prints its port.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc
from grpc import aio
from qdrant_client import AsyncQdrantClient
from qdrant_client import grpc as q
from qdrant_client.conversions.conversion import GrpcToRest, RestToGrpc
from qdrant_client.grpc import collections_service_pb2_grpc as collections_grpc
from qdrant_client.grpc import points_service_pb2_grpc as points_grpc

from service.search.types import MARK_POINT
from tests.support.ports import free_port


class QdrantServer:
    """A Qdrant that can be stopped, started again with its data, and slowed down."""

    def __init__(self) -> None:
        self.engine = AsyncQdrantClient(location=":memory:")
        self.delay_s = 0.0
        """Delay of every reply."""
        self.indexes: dict[tuple[str, str], Any] = {}
        """Payload indexes by collection and field."""
        self.queries: list[q.QueryPoints] = []
        self.upserted: list[str] = []
        """Ids of upserted points, in order, without marks."""
        self.port = 0
        self._server: aio.Server | None = None

    @property
    def url(self) -> str:
        """The URL of the REST interface, which does not exist: the service must use gRPC."""
        return "http://127.0.0.1:1"

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of a service that uses this Qdrant."""
        return {
            "search": "on",
            "QDRANT_URL": self.url,
            "qdrant_grpc_port": self.port,
            "search_timeout": 3.0,
        }

    async def start(self, port: int = 0) -> None:
        """Serve on a port; 0: on the port of the previous start, if any."""
        server = aio.server(options=[("grpc.so_reuseport", 0)])
        collections_grpc.add_CollectionsServicer_to_server(_Collections(self), server)  # type: ignore[no-untyped-call]
        points_grpc.add_PointsServicer_to_server(_Points(self), server)  # type: ignore[no-untyped-call]
        self.port = server.add_insecure_port(f"127.0.0.1:{port or self.port or free_port()}")
        await server.start()
        self._server = server

    async def stop(self) -> None:
        """Stop serving, and keep the data."""
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    async def points(self, collection: str) -> dict[str, tuple[dict[str, Any], list[float]]]:
        """Return payload and vector of all points of a collection, by id, without the mark."""
        points: dict[str, tuple[dict[str, Any], list[float]]] = {}
        offset: Any = None
        while True:
            records, offset = await self.engine.scroll(
                collection, limit=1000, offset=offset, with_payload=True, with_vectors=True
            )
            for record in records:
                points[str(record.id)] = record.payload or {}, record.vector  # type: ignore[assignment]
            if offset is None:
                points.pop(MARK_POINT.id, None)
                return points

    async def live_collections(self) -> list[str]:
        """Return the collections that an alias points to."""
        return [alias.collection_name for alias in (await self.engine.get_aliases()).aliases]

    async def collections(self) -> list[str]:
        """Return the names of all collections."""
        return [
            description.name for description in (await self.engine.get_collections()).collections
        ]


class _Servicer:
    """Delays every method, and translates the engine's errors into a gRPC status."""

    def __init__(self, server: QdrantServer) -> None:
        self._server = server
        self._engine = server.engine

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name not in type(self).__dict__ or name.startswith("_"):
            return method

        async def serve(request: Any, context: Any) -> Any:
            await asyncio.sleep(self._server.delay_s)
            try:
                return await method(request, context)
            except ValueError as error:
                is_missing = "not found" in str(error)
                await context.abort(
                    grpc.StatusCode.NOT_FOUND if is_missing else grpc.StatusCode.INVALID_ARGUMENT,
                    str(error),
                )

        return serve


class _Collections(_Servicer, collections_grpc.CollectionsServicer):
    async def List(self, request: Any, context: Any) -> Any:
        return q.ListCollectionsResponse(
            collections=[
                q.CollectionDescription(name=name) for name in await self._server.collections()
            ]
        )

    async def Get(self, request: Any, context: Any) -> Any:
        info = await self._engine.get_collection(request.collection_name)
        return q.GetCollectionInfoResponse(result=RestToGrpc.convert_collection_info(info))

    async def Create(self, request: Any, context: Any) -> Any:
        config = GrpcToRest.convert_vectors_config(request.vectors_config)
        await self._engine.create_collection(request.collection_name, vectors_config=config)
        return q.CollectionOperationResponse(result=True)

    async def Delete(self, request: Any, context: Any) -> Any:
        return q.CollectionOperationResponse(
            result=await self._engine.delete_collection(request.collection_name)
        )

    async def UpdateAliases(self, request: Any, context: Any) -> Any:
        operations = [GrpcToRest.convert_alias_operations(action) for action in request.actions]
        return q.CollectionOperationResponse(
            result=await self._engine.update_collection_aliases(operations)
        )

    async def ListAliases(self, request: Any, context: Any) -> Any:
        aliases = (await self._engine.get_aliases()).aliases
        return q.ListAliasesResponse(
            aliases=[RestToGrpc.convert_alias_description(alias) for alias in aliases]
        )


class _Points(_Servicer, points_grpc.PointsServicer):
    async def CreateFieldIndex(self, request: Any, context: Any) -> Any:
        self._server.indexes[request.collection_name, request.field_name] = (
            request.field_index_params
        )
        return _completed()

    async def Upsert(self, request: Any, context: Any) -> Any:
        points = [GrpcToRest.convert_point_struct(point) for point in request.points]
        ids = [str(point.id) for point in points]
        self._server.upserted += [id_ for id_ in ids if id_ != MARK_POINT.id]
        await self._engine.upsert(request.collection_name, points)
        return _completed()

    async def Get(self, request: Any, context: Any) -> Any:
        ids = [GrpcToRest.convert_point_id(id_) for id_ in request.ids]
        records = await self._engine.retrieve(request.collection_name, ids, with_payload=True)
        return q.GetResponse(result=[RestToGrpc.convert_record(record) for record in records])

    async def Delete(self, request: Any, context: Any) -> Any:
        await self._engine.delete(
            request.collection_name, GrpcToRest.convert_points_selector(request.points)
        )
        return _completed()

    async def Query(self, request: Any, context: Any) -> Any:
        self._server.queries.append(request)
        reply = await self._engine.query_points(
            request.collection_name,
            query=GrpcToRest.convert_query(request.query),
            query_filter=GrpcToRest.convert_filter(request.filter),
            limit=request.limit,
            with_payload=True,
        )
        return q.QueryResponse(
            result=[RestToGrpc.convert_scored_point(point) for point in reply.points]
        )

    async def Count(self, request: Any, context: Any) -> Any:
        reply = await self._engine.count(
            request.collection_name, GrpcToRest.convert_filter(request.filter)
        )
        return q.CountResponse(result=q.CountResult(count=reply.count))


def _completed() -> Any:
    return q.PointsOperationResponse(
        result=q.UpdateResult(operation_id=1, status=q.UpdateStatus.Completed)
    )


async def _serve(port: int) -> None:
    server = QdrantServer()
    await server.start(port)
    print(server.port, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
