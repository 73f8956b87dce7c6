"""The command `serve`."""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable
from typing import Annotated

import structlog
import typer

import service
from service import config
from service.cli import addresses
from service.cli.common import (
    configuration,
    exit_on_embedded_errors,
    fail,
    fail_configuration,
    print_message,
    run,
    stoppable,
)
from service.cli.migrate import migrate as migrate_schema
from service.config import Settings
from service.store.db.dsn import Target, parse

_log = structlog.get_logger(__name__)


def serve_command(
    migrate: Annotated[
        bool,
        typer.Option(
            "--migrate",
            help="Migrate the schema first. Always done with the embedded database.",
        ),
    ] = False,
) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    settings, target = configuration()
    with stoppable(interrupt_code=0) as stop_requested:
        if target is not None:
            if migrate:
                migrate_schema(target, quiet=True)
            _serve(settings, target, f"PostgreSQL at {target.location}", stop_requested)
        else:
            _serve_embedded(settings, stop_requested)
    print_message("stopped")


def _serve_embedded(settings: Settings, stop_requested: Callable[[], bool]) -> None:
    from service.embedded.postgres import EmbeddedPostgres

    def log_problem(problem: str) -> None:
        _log.warning("embedded PostgreSQL", problem=problem)

    with (
        exit_on_embedded_errors(),
        EmbeddedPostgres(settings.data_dir, settings.listen) as postgres,
    ):
        for note in postgres.notes:
            print_message(note)
        target = parse(postgres.url, schema=settings.db_schema)
        migrate_schema(target, quiet=True)
        postgres.supervise(log_problem)
        try:
            _serve(
                settings,
                target,
                f"embedded PostgreSQL in {postgres.pgdata}",
                stop_requested,
                postgres.announce,
            )
        finally:
            # Stops the watchdog of `process.run`: what remains is the shutdown of PostgreSQL, which
            # has timeouts of its own.
            faulthandler.cancel_dump_traceback_later()


def _serve(
    settings: Settings,
    target: Target,
    data_location: str,
    stop_requested: Callable[[], bool],
    announce: Callable[[str], None] | None = None,
) -> None:
    from service import process
    from service.store.schema.location import UnusableDatabase
    from service.telemetry.logs import configure_logging

    def on_ready(address: str) -> None:
        if announce is not None:
            announce(address)
        if settings.log_format != "json":
            _print_summary(address, data_location)

    configure_logging(settings.log_level, settings.log_format)
    for line in config.unknown_settings():
        print_message(line)
    try:
        run(lambda: process.run(settings, target, on_ready=on_ready, stop_requested=stop_requested))
    except config.BadConfiguration as error:
        fail_configuration(error)
    except UnusableDatabase as error:
        fail(str(error), 1)
    except OSError as error:
        explanation = addresses.explain(error, settings)
        if explanation is None:
            raise
        fail(explanation, 1)


def _print_summary(address: str, data_location: str) -> None:
    name = typer.style(f"ChatHistory {service.__version__}", bold=True)
    typer.echo(
        f"\n{name} is running.\n\n"
        f"  gRPC    {address}  (chathistory.v1.ChatHistoryService, reflection, grpc.health.v1)\n"
        f"  data    {data_location}\n"
        f"  try     the Python snippet in README.md\n"
        f"  check   chat-history check, in another terminal\n"
        f"  stop    Ctrl-C\n"
    )
    sys.stdout.flush()
