"""The parts of qdrant-client's local mode that are replaced, and the check that they still fit."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from qdrant_client import AsyncQdrantClient, models
from qdrant_client.local.local_collection import LocalCollection
from qdrant_client.local.persistence import CollectionPersistence

from service.config import BadConfiguration
from service.search import packages
from service.search.qdrant import QdrantIndex
from service.search.types import (
    Changes,
    Point,
    PointFilter,
    PointKind,
    SearchMisconfigured,
    pack_vector,
)
from service.search.worker import qdrant_local
from service.search.worker.child import LocalIndex
from service.server import Server
from tests.search.embedded_index import read_payloads
from tests.support.servers import ROOT, settings, target_of

POINTS = [
    Point(
        f"user {n % 3}",
        (PointKind.CHUNK, PointKind.MESSAGE)[n % 2],
        f"entity {n % 5}",
        str(n // 2),
    )
    for n in range(60)
]


def match_any(key: str, values: Sequence[str]) -> models.FieldCondition:
    return models.FieldCondition(key=key, match=models.MatchAny(any=list(values)))


def filters() -> Iterator[models.Filter]:
    """Yield filters as `QdrantIndex` builds them."""
    for user_ids in (["user 0"], ["user 1", "user 2", "unknown"], ["unknown"], []):
        for kind in PointKind:
            for entity_ids in (["entity 0", "entity 1"], ["entity 3"]):
                yield models.Filter(
                    must=[
                        match_any("user_id", user_ids),
                        match_any("kind", [kind]),
                        match_any("entity_id", entity_ids),
                    ]
                )


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")
async def test_replaced_mask_equals_the_mask_of_the_package(tmp_path: Path) -> None:
    client = AsyncQdrantClient(path=str(tmp_path / "qdrant"))
    index = QdrantIndex(client, "masks", 2)
    name = await index.create_collection()
    collection: Any = client._client.collections[name]  # type: ignore[attr-defined]
    original = collection._payload_and_non_deleted_mask
    qdrant_local.patch_collections(client)

    def assert_masks_are_equal() -> None:
        accepted = 0
        for payload_filter in filters():
            for vector_name in (None, ""):
                mask = collection._payload_and_non_deleted_mask(payload_filter, vector_name)
                assert list(map(bool, mask)) == list(
                    map(bool, original(payload_filter, vector_name))
                )
                accepted += sum(map(bool, mask))
        assert accepted

    for start in range(0, 60, 20):
        vectors = pack_vector([1.0, float(start)]) * 20
        await index.write(Changes((), (), POINTS[start : start + 20], vectors), None)
        assert_masks_are_equal()
    qdrant_local.commit(client, purge_deleted=False)
    changes = Changes([PointFilter("user 1")], POINTS[:5], POINTS[:1], pack_vector([0.5, 1.0]))
    await index.write(changes, None)
    assert_masks_are_equal()
    assert await index.count(PointFilter("user 1")) == 0
    other_filter = models.Filter(
        must_not=[models.FieldCondition(key="kind", match=models.MatchValue(value=PointKind.CHUNK))]
    )
    mask = collection._payload_and_non_deleted_mask(other_filter)
    assert list(mask) == list(original(other_filter))
    qdrant_local.commit(client, purge_deleted=True)
    await client.close()
    stored = {Point(**payload) for payload in read_payloads(tmp_path)}
    assert stored == {p for p in POINTS if p.user_id != "user 1" and p not in POINTS[1:5]}


def test_installed_package_has_the_replaced_internals(tmp_path: Path) -> None:
    qdrant_local.check_package(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def ignore_points(_storage: object, _point: object) -> None:
    pass


def mask_of_other_signature(_collection: object, query_filter: object) -> None:
    pass


def mask_of_all_points(collection: Any, payload_filter: Any, vector_name: Any = None) -> Any:
    return collection.deleted == 0


@pytest.mark.parametrize(
    ("owner", "name", "replacement"),
    [
        (LocalCollection, "_payload_and_non_deleted_mask", None),
        (LocalCollection, "_payload_and_non_deleted_mask", mask_of_other_signature),
        (CollectionPersistence, "persist", ignore_points),
        (LocalCollection, "__init__", lambda collection, *_: setattr(collection, "storage", None)),
    ],
)
async def test_changed_internal_keeps_the_embedded_index_closed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
    replacement: Any,
) -> None:
    if replacement is None:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, replacement)
    options = {"folder": str(tmp_path / "qdrant"), "alias": "alias", "dimensions": 2}
    with pytest.raises(SearchMisconfigured, match=r"qdrant-client~=1\.20\.0"):
        await LocalIndex().setup(options, b"")
    assert not (tmp_path / "qdrant").exists()


def pretend_version(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    original = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata,
        "version",
        lambda name: version if name == "qdrant-client" else original(name),
    )


async def test_server_refuses_to_start_with_an_untested_version(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_version(monkeypatch, "1.21.3")
    with pytest.raises(BadConfiguration) as caught:
        Server(settings(search="on", data_dir=tmp_path), target_of(database_url))
    (problem,) = caught.value.problems
    assert "qdrant-client 1.21.3 is installed" in problem
    assert "needs 1.20.x: pip install 'qdrant-client~=1.20.0'" in problem
    with pytest.raises(SearchMisconfigured, match=r"1\.21\.3"):
        qdrant_local.check_package(tmp_path)


def test_any_version_works_with_a_qdrant_server(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_version(monkeypatch, "1.21.3")
    assert packages.find_problem(settings(search="on", QDRANT_URL="http://localhost:6333")) is None


def test_missing_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    problem = packages.find_problem(settings(search="on"))
    assert problem is not None
    assert "pip install 'chathistory-service[search]'" in problem


def test_project_pins_the_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pin = f"qdrant-client~={packages.QDRANT_CLIENT}.0"
    assert pin in project["optional-dependencies"]["search"]
