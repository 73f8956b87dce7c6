"""Reserves unique values, so that no UPDATE violates a unique constraint.

PostgreSQL writes the values of a violated unique constraint to its log, whatever the client does
with the error. INSERT can avoid the error by ON CONFLICT DO NOTHING, but UPDATE cannot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection


async def reserve(connection: AsyncConnection, table: sa.Table, values: Mapping[str, Any]) -> bool:
    """Insert and delete a row; return False if its unique values conflict with a stored row.

    Until this transaction ends, every other one that writes the same values waits for it. An
    UPDATE in this transaction can therefore write them without a conflict. No other transaction
    sees the row.

    Args:
        connection: The connection, in a transaction.
        table: The table.
        values: The row: its primary key, which must be new, its unique values, and the columns
            without a default.
    """
    insertion = insert(table).values(values).on_conflict_do_nothing()
    if not (await connection.execute(insertion)).rowcount:
        return False
    key = [column == values[column.name] for column in table.primary_key]
    await connection.execute(sa.delete(table).where(*key))
    return True
