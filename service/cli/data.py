"""`export` and `import`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.common import configuration, fail, run, say, stoppable, telling_embedded_errors
from service.config import Settings
from service.store.db.dsn import Target, parse

if TYPE_CHECKING:
    from service.portability.transfer import Counts


def export_command(
    user: Annotated[str, typer.Argument(help="The user's id.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write; - is standard output.")
    ] = Path("-"),
) -> None:
    """Write everything of one user as lines of JSON."""
    from service.portability import transfer

    done = _transfer(lambda _settings, target: transfer.export_to(target, user, output))
    say(f"exported {done}")


def import_command(
    file: Annotated[
        Path, typer.Argument(help="Lines of JSON, from an export or a query; - is standard input.")
    ],
    user: Annotated[
        str | None, typer.Option("--user-id", help="Make all of it this user's.")
    ] = None,
) -> None:
    """Store what was exported, or another chatbot's history, with its times and order; may be run again at any time."""
    from service.portability import transfer

    done = _transfer(
        lambda settings, target: transfer.import_from(
            target, file, user, search=settings.search == "on"
        )
    )
    say(f"imported {done} ({done.written} messages were new)")


def _transfer(work: Callable[[Settings, Target], Awaitable[Counts]]) -> Counts:
    """Take data out of the configured database, or put it in; an embedded one is started when it does not run."""
    from service import doctor
    from service.embedded.data_dir import running_url
    from service.embedded.postgres import EmbeddedPostgres
    from service.portability.transfer import TransferError
    from service.store.db.database import DATABASE_ERRORS
    from service.telemetry.logs import configure_logging

    def on(target: Target) -> Counts:
        try:
            return run(lambda: work(settings, target))
        except DATABASE_ERRORS as error:
            fail(doctor.explain(error, target), 1)

    settings, configured = configuration()
    configure_logging(settings.log_level, settings.log_format)
    with stoppable(), telling_embedded_errors():
        try:
            if configured is not None:
                return on(configured)
            if (url := running_url(settings.data_dir)) is not None:
                return on(parse(url))
            with EmbeddedPostgres(settings.data_dir, "nothing, as it only copies data") as postgres:
                return on(parse(postgres.url))
        except TransferError as error:
            fail(str(error), 1)
