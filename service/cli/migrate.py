"""The command `migrate`, and the migration that `serve` runs."""

from __future__ import annotations

from service.cli.common import (
    configuration,
    exit_on_embedded_errors,
    fail,
    print_message,
    run,
    stoppable,
)
from service.store.db.dsn import Target, parse


def migrate_command() -> None:
    """Migrate the schema of the configured database to this build."""
    settings, target = configuration()
    with stoppable():
        if target is not None:
            migrate(target)
            return
        from service.embedded.data_dir import running_url
        from service.embedded.postgres import EmbeddedPostgres

        with exit_on_embedded_errors():
            if (url := running_url(settings.data_dir)) is not None:
                migrate(parse(url, schema=settings.db_schema))
                return
            with EmbeddedPostgres(settings.data_dir, "nothing, as it only migrates") as postgres:
                migrate(parse(postgres.url, schema=settings.db_schema))


def migrate(target: Target, *, quiet: bool = False) -> None:
    """Migrate the schema.

    Args:
        target: The database.
        quiet: Print nothing when there is nothing to do.
    """
    from service import doctor
    from service.store.db.db_errors import DATABASE_ERRORS
    from service.store.schema.migrations import MigrationError, upgrade

    try:
        result = run(lambda: upgrade(target, on_wait=print_message))
    except MigrationError as error:
        fail(str(error), 1)
    except DATABASE_ERRORS as error:
        fail(doctor.explain(error, target), 1)
    if result.before != result.after or not quiet:
        print_message(str(result))
    if result.note is not None:
        print_message(result.note)
    if result.problem is not None:
        fail(result.problem, 1)
