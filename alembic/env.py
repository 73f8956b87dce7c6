"""Runs migrations on the connection that `service.store.schema.migrations` passes.

The `alembic` command of a developer passes none. It uses the configured database.
"""

import asyncio
from typing import Any

from alembic import context
from sqlalchemy import Connection

from service.config import Settings
from service.embedded.data_dir import running_url
from service.store import tables
from service.store.db.dsn import Target, parse
from service.store.schema import migrations


def number_revisions(_context: Any, _revision: Any, directives: list[Any]) -> None:
    """Give a new revision the number after the newest one, so that builds can compare revisions."""
    if directives:
        head = context.script.get_current_head()
        directives[0].rev_id = f"{int(head or 0) + 1:04d}"


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=tables.metadata,
        compare_type=True,
        compare_server_default=True,
        process_revision_directives=number_revisions,
    )
    with context.begin_transaction():
        context.run_migrations()


def configured_target() -> Target:
    settings = Settings()
    url = (
        settings.database_url.get_secret_value()
        if settings.database_url
        else running_url(settings.data_dir)
    )
    if url is None:
        raise SystemExit("set DATABASE_URL, or start the embedded database: make run")
    return parse(url, schema=settings.db_schema).direct()


if context.is_offline_mode():
    raise SystemExit("--sql is not supported: migrations read the database that they change")
connection = context.config.attributes.get("connection")
if connection is not None:
    run(connection)
else:
    asyncio.run(migrations.in_transaction(configured_target(), run))
