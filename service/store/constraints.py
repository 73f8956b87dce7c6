"""Keeps statements from violating constraints, because PostgreSQL logs what violates them.

It writes the values of a violated unique constraint to its log, and the whole row of a violated
check or NOT NULL constraint, whatever the client does with the error. A foreign key's values are
ids, which may be logged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection


def check_required(table: sa.Table, values: Mapping[str, Any], *, is_new: bool = False) -> None:
    """Check that each column that must have a value has one.

    Args:
        table: The table.
        values: The columns to write.
        is_new: Whether the row is inserted, so that the other columns get their defaults.

    Raises:
        ValueError: a value is missing, which is a defect; names the column.
    """
    for column in table.columns:
        if column.nullable:
            continue
        is_missing = is_new and column.server_default is None and column.name not in values
        if is_missing or values.get(column.name, "") is None:
            raise ValueError(f"{table.name}.{column.name} must have a value")


async def reserve(connection: AsyncConnection, table: sa.Table, values: Mapping[str, Any]) -> bool:
    """Insert and delete a row; return False if its unique values conflict with a stored row.

    INSERT can avoid a violation by ON CONFLICT DO NOTHING, but UPDATE cannot. Until this
    transaction ends, every other one that writes the same values waits for it. An UPDATE in this
    transaction can therefore write them without a conflict. No other transaction sees the row.

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
