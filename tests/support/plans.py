"""Plans of the statements that the service sends, with their arguments."""

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
from tests.support.cluster import OWN_SETTINGS


class SentStatement(NamedTuple):
    """A statement with its arguments, as the driver sent it."""

    sql: str
    args: tuple[Any, ...]


@asynccontextmanager
async def recording(server: Server) -> AsyncGenerator[list[SentStatement]]:
    """Record the statements that a server sends on any of its connections."""
    sent: list[SentStatement] = []

    def on_driver_query(query: Any) -> None:
        sent.append(SentStatement(query.query, tuple(query.args or ())))

    def on_execute(_connection: object, _cursor: object, sql: str, args: Any, *_: object) -> None:
        sent.append(SentStatement(sql, tuple(args)))

    engine, driver = server.database.engine.sync_engine, server.database.hot_pool
    acquired = [await driver.acquire() for _ in range(driver._size)]
    driver_connections = [connection.driver for connection in acquired]
    for connection in acquired:
        driver.release(connection)
    # The driver's query logger does not report SQLAlchemy's statements, which are prepared.
    event.listen(engine, "before_cursor_execute", on_execute)
    for driver_connection in driver_connections:
        driver_connection.add_query_logger(on_driver_query)
    try:
        yield sent
        for _ in range(
            3
        ):  # The driver reports a statement in the next iteration of the event loop.
            await asyncio.sleep(0)
    finally:
        event.remove(engine, "before_cursor_execute", on_execute)
        for driver_connection in driver_connections:
            driver_connection.remove_query_logger(on_driver_query)


class Plan:
    """Output of `EXPLAIN (ANALYZE)` for one statement."""

    def __init__(self, explained: dict[str, Any]) -> None:
        self.root: dict[str, Any] = explained["Plan"]
        self.milliseconds: float = explained["Execution Time"]

    def nodes(self, node: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """Yield every node of the plan, or of the tree below `node`."""
        node = self.root if node is None else node
        yield node
        for inner in node.get("Plans", ()):
            yield from self.nodes(inner)

    def scans(self, table: str) -> list[dict[str, Any]]:
        """Return the nodes that read a table."""
        return [node for node in self.nodes() if node.get("Relation Name") == table]

    def rows_read(self, table: str) -> int:
        """Return the number of rows of a table that were read, including those filtered out."""
        counts = [
            node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0))
            for node in self.scans(table)
        ]
        return int(sum(counts))

    def __str__(self) -> str:
        return json.dumps(self.root, indent=1)


async def explain(url: str, statements: Sequence[SentStatement], table: str) -> list[Plan]:
    """Execute those of these statements that use a table again, and return their plans.

    There are two plans of each statement: one for its arguments, and the generic one.
    """
    plans: list[Plan] = []
    connection = await asyncpg.connect(url, server_settings=OWN_SETTINGS, statement_cache_size=0)
    try:
        for number, (sql, args) in enumerate(
            {repr(statement): statement for statement in statements}.values()
        ):
            if table not in sql:
                continue
            await connection.execute(f"PREPARE s{number} AS {sql}")
            arguments = f"({', '.join(map(_literal, args))})" if args else ""
            for mode in ("force_custom_plan", "force_generic_plan"):
                await connection.execute(f"SET plan_cache_mode = {mode}")
                explained = await connection.fetchval(
                    f"EXPLAIN (ANALYZE, TIMING OFF, BUFFERS, FORMAT JSON) EXECUTE s{number}"
                    f"{arguments}"
                )
                plans.append(Plan(json.loads(explained)[0]))
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
            return "'{" + ",".join("NULL" if item is None else f'"{item}"' for item in value) + "}'"
        case _:
            return "'" + str(value).replace("'", "''") + "'"
