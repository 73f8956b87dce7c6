"""Failover by Patroni under load. `make failover` runs more rounds, and measures them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support import pgbouncer, tls_postgres
from tests.support.cluster import Cluster
from tests.support.failover import FAULTS, Route, direct, fail_over, pooled, table
from tests.support.patroni import PatroniCluster
from tests.support.tools import skip_or_fail

pytestmark = pytest.mark.patroni


@pytest.fixture
def programs(cluster: Cluster) -> None:
    """Require the programs. Under root, `cluster` has created the account that runs them."""
    for program in ("patroni", "etcd"):
        if shutil.which(program) is None:
            skip_or_fail(f"{program} is not installed")
    if tls_postgres.find_programs() is None or pgbouncer.find_program() is None:
        skip_or_fail("Debian's postgresql or pgbouncer is not installed")


@pytest.mark.case(n=502)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("route", [direct, pooled], ids=["direct", "through PgBouncer"])
@pytest.mark.parametrize("is_synchronous", [True, False], ids=["synchronous", "asynchronous"])
async def test_service_follows_failovers_under_load(
    programs: None, tmp_path: Path, route: Route, is_synchronous: bool
) -> None:
    """A round of each kind. No call may fail in a way that its client may not repeat."""
    with PatroniCluster(is_synchronous=is_synchronous) as nodes:
        figures = await fail_over(nodes, route, tmp_path / "server", rounds=len(FAULTS), seed=13)
    print(table(figures.rounds))
    print(f"{figures.acknowledged} messages, {figures.views} views, failed calls {figures.errors}")
    assert figures.defects == []
    assert len(figures.rounds) == len(FAULTS)
    assert figures.views > 0
