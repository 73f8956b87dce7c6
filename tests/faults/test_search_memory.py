"""The memory of the search process is bounded by the number of points.

docs/how-to/search.md states the figures. 171,000 points would take minutes to write, so the test
measures what a point adds.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from service.config import Settings
from service.search.types import Changes, Point, PointKind, VectorQuery
from service.search.worker.parent import SearchProcess, SearchProcessIndex
from tests.support.servers import ROOT

DIMENSIONS = 256
PAGE_POINTS = 128
PAGES = int(os.environ.get("SEARCH_MEMORY_PAGES", "250"))
POINT_BYTES = 1_700
"""Bytes that a point adds, as docs/how-to/search.md says."""
REQUEST_BYTES = 48 * 1024 * 1024
"""Bytes that one request may add for its time."""


def memory(pid: int, name: str) -> int:
    """Return a figure of the process's memory in bytes: VmRSS, or VmHWM, its maximum."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(rf"{name}:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024


async def open_index(process: SearchProcess, folder: Path) -> SearchProcessIndex:
    """Open the index and load the model, as the service does."""
    process.index_options = {
        "folder": str(folder / "qdrant"),
        "alias": "memory",
        "dimensions": DIMENSIONS,
        "max_points": 250_000,
    }
    index = SearchProcessIndex(process, 250_000)
    await process.call("dimensions")
    await process.call("embed", ["words to load everything"])
    if not await index.open():
        await index.create_collection()
    return index


def page_of(number: int) -> Sequence[Point]:
    """Return messages of several users, with a session for every ten."""
    first = number * PAGE_POINTS
    return [
        Point(
            f"0192f3a4-0000-7000-8000-{n % 50:012d}",
            PointKind.MESSAGE,
            f"0192f3a4-0000-7001-8000-{n // 10:012d}",
            f"0192f3a4-0000-7002-8000-{n:012d}",
        )
        for n in range(first, first + PAGE_POINTS)
    ]


async def search(index: SearchProcessIndex, rng: random.Random) -> None:
    """Search as a user does; the search compares all points."""
    users = ["0192f3a4-0000-7000-8000-000000000001"]
    query = VectorQuery(PointKind.MESSAGE, users, [], 2)
    hits = await index.search(vector_of(rng), query)
    assert len(hits) == 2


def vector_of(rng: random.Random, count: int = 1) -> bytes:
    """Return vectors of small numbers, which need no conversion."""
    return b"".join(rng.randbytes(3) + b"\x3c" for _ in range(DIMENSIONS * count))


@pytest.mark.case(n=523)
@pytest.mark.timeout(600)
async def test_each_point_adds_a_bounded_amount_of_memory(tmp_path: Path) -> None:
    rng = random.Random(523)
    process = SearchProcess()
    index = await open_index(process, tmp_path)
    vectors = vector_of(rng, PAGE_POINTS)
    await index.write(Changes(upserts=page_of(0), vectors=vectors), None)
    await search(index, rng)
    assert process.pid is not None
    empty_bytes = memory(process.pid, "VmRSS")
    for number in range(PAGES):
        await index.write(Changes(upserts=page_of(number), vectors=vectors), None)
    await search(index, rng)
    added_bytes = PAGES * PAGE_POINTS * POINT_BYTES
    figures = {name: memory(process.pid, name) for name in ("VmRSS", "VmHWM")}
    assert figures["VmRSS"] < empty_bytes + added_bytes + REQUEST_BYTES // 2
    assert figures["VmHWM"] < empty_bytes + added_bytes + REQUEST_BYTES
    await process.close()
    # A process that opens the index reads all points.
    process = SearchProcess()
    index = await open_index(process, tmp_path)
    await search(index, rng)
    assert process.pid is not None
    figures = {name: memory(process.pid, name) for name in ("VmRSS", "VmHWM")}
    assert figures["VmHWM"] < empty_bytes + added_bytes + REQUEST_BYTES
    await process.close()


@pytest.mark.case(n=523)
def test_documented_figures_are_those_of_the_default() -> None:
    text = " ".join((ROOT / "docs/how-to/search.md").read_text().split())
    max_points = Settings.model_fields["index_max_points"].default
    assert f"it has room for {max_points:,} points" in text
    assert "at most 1.7 KB for each point" in text
    bound_mib = (160 * 1024 * 1024 + max_points * POINT_BYTES + REQUEST_BYTES) / 1024 / 1024
    (stated_mib,) = re.findall(r"never more than (\d+) MiB", text)
    assert bound_mib < int(stated_mib)
