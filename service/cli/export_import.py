"""The commands `export` and `import`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.common import (
    configuration,
    exit_on_embedded_errors,
    fail,
    print_message,
    run,
    stoppable,
)
from service.config import Settings
from service.store.db.dsn import Target, parse

if TYPE_CHECKING:
    from service.portability.transfer import ItemCounts


def export_command(
    user: Annotated[str, typer.Argument(help="The user's id.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write. `-` is standard output.")
    ] = Path("-"),
) -> None:
    """Write all data of one user as JSON lines."""
    from service.portability.exporter import export_to_file

    counts = _transfer(lambda _settings, target: export_to_file(target, user, output))
    print_message(f"exported {counts}")


def import_command(
    file: Annotated[
        Path,
        typer.Argument(help="JSON lines from an export or a query. `-` is standard input."),
    ],
    user: Annotated[
        str | None, typer.Option("--user-id", help="Store everything as this user's data.")
    ] = None,
) -> None:
    """Store an export, or the history of another chatbot, with its times and order.

    Running the command again with the same file changes nothing.
    """
    from service.portability.importer import import_from_file

    counts = _transfer(
        lambda settings, target: import_from_file(
            target, file, user, search_enabled=settings.search == "on"
        )
    )
    print_message(f"imported {counts} ({counts.new_messages} messages were new)")


def _transfer(work: Callable[[Settings, Target], Awaitable[ItemCounts]]) -> ItemCounts:
    """Run an export or import on the configured database, starting an embedded one if needed."""
    from service import doctor
    from service.embedded.data_dir import running_url
    from service.embedded.postgres import EmbeddedPostgres
    from service.portability.transfer import TransferError
    from service.store.db.db_errors import DATABASE_ERRORS
    from service.telemetry.logs import configure_logging

    def transfer(target: Target) -> ItemCounts:
        try:
            return run(lambda: work(settings, target))
        except DATABASE_ERRORS as error:
            fail(doctor.explain(error, target), 1)

    settings, configured = configuration()
    configure_logging(settings.log_level, settings.log_format)
    with stoppable(), exit_on_embedded_errors():
        try:
            if configured is not None:
                return transfer(configured)
            if (url := running_url(settings.data_dir)) is not None:
                return transfer(parse(url, schema=settings.db_schema))
            with EmbeddedPostgres(settings.data_dir, "nothing, as it only copies data") as postgres:
                return transfer(parse(postgres.url, schema=settings.db_schema))
        except TransferError as error:
            fail(str(error), 1)
