"""Creates the embeddings and the index that the settings ask for."""

from __future__ import annotations

from service.config import Settings
from service.search.embeddings import Embeddings, OfflineEmbeddings, RemoteEmbeddings
from service.search.query_queue import REMOTE_LIMITS, SEARCH_PROCESS_LIMITS, QueryLimits
from service.search.types import VectorIndex
from service.search.worker.parent import SearchProcess, SearchProcessIndex


def needs_search_process(settings: Settings) -> bool:
    """Return whether the embeddings or the index run in the search process."""
    return settings.embeddings_url is None or settings.qdrant_url is None


def query_limits(settings: Settings) -> QueryLimits:
    """Return how many queries the index and the embeddings receive at a time."""
    is_remote = settings.embeddings_url is not None or settings.qdrant_url is not None
    return REMOTE_LIMITS if is_remote else SEARCH_PROCESS_LIMITS


def create_embeddings(settings: Settings, process: SearchProcess | None) -> Embeddings:
    """Return the offline embeddings, or those of the endpoint at EMBEDDINGS_URL."""
    if settings.embeddings_url is None:
        assert process is not None  # noqa: S101 - as `needs_search_process` says
        return OfflineEmbeddings(process)
    key = settings.embeddings_api_key
    return RemoteEmbeddings(
        settings.embeddings_url,
        settings.embeddings_model or "",
        key.get_secret_value() if key else None,
        settings.embeddings_dimensions,
        settings.search_timeout,
    )


def create_index(
    settings: Settings, process: SearchProcess | None, alias: str, dimensions: int
) -> VectorIndex:
    """Return the embedded index, or that of the Qdrant at QDRANT_URL."""
    if settings.qdrant_url is None:
        assert process is not None  # noqa: S101 - as `needs_search_process` says
        process.index_options = {
            "folder": str(settings.data_dir / "qdrant"),
            "alias": alias,
            "dimensions": dimensions,
            "max_points": settings.index_max_points,
        }
        return SearchProcessIndex(process, settings.index_max_points)
    # Imported late: with the embedded index only the search process needs the memory.
    from service.search.qdrant import QdrantIndex, connect  # noqa: PLC0415

    key = settings.qdrant_api_key
    client = connect(
        settings.qdrant_url,
        key.get_secret_value() if key else None,
        transport=settings.qdrant_transport,
        grpc_port=settings.qdrant_grpc_port,
        timeout_s=settings.search_timeout,
    )
    return QdrantIndex(client, alias, dimensions, settings.search_timeout)
