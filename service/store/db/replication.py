"""Waits for the synchronous standbys where PostgreSQL itself does not.

PostgreSQL answers a COMMIT once the synchronous standbys have it, with two exceptions:

- A connection is cut, or the server restarts, while a commit waits. The rows are stored on this
  server, and every later transaction sees them. A transaction that only reads them waits for
  nothing. So a call that is answered from rows which it has not written itself commits a message in
  the log (`CONFIRM`): that commit waits for everything before it.
- A wait is cancelled, by an operator or by the driver's timeout. PostgreSQL then warns and reports
  success. `DriverConnection` notices the warning, and such a commit is not acknowledged.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from service.store.db.db_errors import WrongRole

# The message is empty and changes no table. On a standby the function fails as an internal error.
CONFIRM = """CASE WHEN pg_is_in_recovery() THEN false
                ELSE pg_logical_emit_message(true, 'chathistory', ''::text) IS NOT NULL END"""
"""Expression that makes the commit of its transaction wait; false on a standby, which cannot."""

_CONFIRM = sa.text(f"SELECT {CONFIRM}")


async def confirm_replication(connection: AsyncConnection) -> None:
    """Make the commit of a transaction wait for the standbys, as that of a write does.

    To be called before a stored row, or its absence, is returned as the result of a repeated
    request: the commit of the first one may not have waited.

    Raises:
        WrongRole: the server is a standby.
    """
    if not await connection.scalar(_CONFIRM):
        raise WrongRole("the server is a standby")


def check_replicated(connection: AsyncConnection) -> None:
    """Check that the commit on a connection was not one whose wait for standbys was cancelled.

    Raises:
        CommitNotReplicated: the commit is stored on this server, and must not be acknowledged.
    """
    driver = None
    if connection.sync_connection is not None:
        driver = connection.sync_connection.connection.driver_connection
    if driver is not None:
        driver.check_replicated()
