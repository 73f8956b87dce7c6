"""The command `move-schema`."""

from __future__ import annotations

from typing import Annotated

import typer

from service.cli.common import (
    configuration,
    exit_on_embedded_errors,
    fail,
    print_message,
    run,
    stoppable,
)
from service.store.db.dsn import Target, parse


def move_schema_command(
    name: Annotated[str, typer.Argument(help="The schema to move the tables into.")],
    force: Annotated[
        bool,
        typer.Option("--force", help="Move although other connections look like a service's."),
    ] = False,
) -> None:
    """Move the tables into another schema, in one transaction. Stop all services first."""
    settings, target = configuration()
    with stoppable():
        if target is not None:
            _move(target, name, force=force)
            return
        from service.embedded.postgres import EmbeddedPostgres

        with (
            exit_on_embedded_errors(),
            EmbeddedPostgres(settings.data_dir, "nothing, as it only moves tables") as postgres,
        ):
            _move(parse(postgres.url, schema=settings.db_schema), name, force=force)


def _move(target: Target, name: str, *, force: bool) -> None:
    from service import doctor
    from service.config import is_schema_name
    from service.store.db.db_errors import DATABASE_ERRORS
    from service.store.schema.migrations import MigrationError
    from service.store.schema.moving import move

    if not is_schema_name(name):
        fail(f"{name} is not the name of a schema: use lower-case letters, digits and _", 2)
    try:
        result = run(lambda: move(target, name, force=force))
    except MigrationError as error:
        fail(str(error), 1)
    except DATABASE_ERRORS as error:
        fail(doctor.explain(error, target), 1)
    print_message(str(result))
    if result.has_default_privileges:
        print_message(
            f"the default privileges of the schema {result.source} were not copied: repeat ALTER"
            f" DEFAULT PRIVILEGES for the schema {name}"
        )
    if result.table_count and target.schema not in (None, name):
        print_message(f"set CHAT_HISTORY_DB_SCHEMA to {name}")
