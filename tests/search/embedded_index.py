"""Reads the files of an embedded index, which no process may have open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qdrant_client import QdrantClient

from service.search.types import MARK_POINT


def read_payloads(data_dir: Path) -> list[dict[str, Any]]:
    """Return the payloads of all points of the only alias, without the mark."""
    client = QdrantClient(path=str(data_dir / "qdrant"))
    try:
        (alias,) = client.get_aliases().aliases
        records, _ = client.scroll(alias.collection_name, limit=10_000)
        return [record.payload or {} for record in records if record.id != MARK_POINT.id]
    finally:
        client.close()


def damaged_files(data_dir: Path) -> list[Path]:
    """Return the files of indexes that were moved because they were damaged."""
    return [path for path in data_dir.glob("qdrant.broken-*/**/*") if path.is_file()]
