"""How PostgreSQL runs the service's own statements: each one that is sent, with its arguments, is explained."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, NamedTuple

import asyncpg
from sqlalchemy import event

from service.server import Server
from tests.support.cluster import TESTS_APPLICATION


class Sent(NamedTuple):
    """A statement as the driver sent it."""

    sql: str
    args: tuple[Any, ...]


@asynccontextmanager
async def recorded(server: Server) -> AsyncGenerator[list[Sent]]:
    """Record what a server's driver sends, on whatever connection."""
    sent: list[Sent] = []

    def note(query: Any) -> None:
        sent.append(Sent(query.query, tuple(query.args or ())))

    def executed(_connection: object, _cursor: object, sql: str, args: Any, *_: object) -> None:
        sent.append(Sent(sql, tuple(args)))

    engine, driver = server.database.engine.sync_engine, server.database.hot_pool
    taken = [await driver.acquire() for _ in range(driver._size)]
    idle = [kept.driver for kept in taken]
    for kept in taken:
        driver.release(kept)
    # SQLAlchemy's statements are prepared ones, of which the driver does not tell.
    event.listen(engine, "before_cursor_execute", executed)
    for connection in idle:
        connection.add_query_logger(note)
    try:
        yield sent
        for _ in range(3):  # The driver tells of a statement in the loop's next turn.
            await asyncio.sleep(0)
    finally:
        event.remove(engine, "before_cursor_execute", executed)
        for connection in idle:
            connection.remove_query_logger(note)


class Plan:
    """What `EXPLAIN (ANALYZE)` says of one statement."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.root: dict[str, Any] = found["Plan"]
        self.milliseconds: float = found["Execution Time"]

    def nodes(self, node: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """Yield every node."""
        node = self.root if node is None else node
        yield node
        for inner in node.get("Plans", ()):
            yield from self.nodes(inner)

    def scans(self, table: str) -> list[dict[str, Any]]:
        """Return the nodes that read a table."""
        return [node for node in self.nodes() if node.get("Relation Name") == table]

    def rows_read(self, table: str) -> int:
        """Return how many rows of a table were looked at, kept or not."""
        counts = [
            node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0))
            for node in self.scans(table)
        ]
        return int(sum(counts))

    def __str__(self) -> str:
        return json.dumps(self.root, indent=1)


async def explained(url: str, statements: Sequence[Sent], table: str) -> list[Plan]:
    """Run those of these statements that read a table again and return their plans: each as planned for its arguments, and for any."""
    plans: list[Plan] = []
    connection = await asyncpg.connect(
        url, server_settings={"application_name": TESTS_APPLICATION}, statement_cache_size=0
    )
    try:
        for number, (sql, args) in enumerate({repr(each): each for each in statements}.values()):
            if table not in sql:
                continue
            await connection.execute(f"PREPARE s{number} AS {sql}")
            given = f"({', '.join(map(_literal, args))})" if args else ""
            for mode in ("force_custom_plan", "force_generic_plan"):
                await connection.execute(f"SET plan_cache_mode = {mode}")
                found = await connection.fetchval(
                    f"EXPLAIN (ANALYZE, TIMING OFF, BUFFERS, FORMAT JSON) EXECUTE s{number}{given}"
                )
                plans.append(Plan(json.loads(found)[0]))
    finally:
        await connection.close()
    return plans


def _literal(value: Any) -> str:
    match value:
        case None:
            return "NULL"
        case bool() | int() | float():
            return str(value)
        case datetime():
            return f"'{value.isoformat()}'"
        case list():
            return "'{" + ",".join("NULL" if each is None else f'"{each}"' for each in value) + "}'"
        case _:
            return "'" + str(value).replace("'", "''") + "'"
