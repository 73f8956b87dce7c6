"""`serve` and `migrate`."""

from __future__ import annotations

import errno
import faulthandler
import sys
from collections.abc import Callable
from typing import Annotated

import structlog
import typer

import service
from service import config
from service.cli.common import (
    configuration,
    fail,
    fail_configuration,
    run,
    say,
    stoppable,
    telling_embedded_errors,
)
from service.config import Settings
from service.store.db.dsn import Target, parse


def serve(
    migrate: Annotated[
        bool,
        typer.Option(
            "--migrate",
            help="Bring the schema up first. With the embedded database that is always done.",
        ),
    ] = False,
) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    settings, target = configuration()
    with stoppable(interrupted=0) as told_to_stop:
        if target is not None:
            if migrate:
                _migrate(target, quiet=True)
            _serve(settings, target, f"PostgreSQL at {target.location}", told_to_stop)
        else:
            _serve_embedded(settings, told_to_stop)
    say("stopped")


def migrate_command() -> None:
    """Bring the schema of the configured database up to this build."""
    settings, target = configuration()
    with stoppable():
        if target is not None:
            _migrate(target)
            return
        from service.embedded.data_dir import running_url
        from service.embedded.postgres import EmbeddedPostgres

        with telling_embedded_errors():
            if (url := running_url(settings.data_dir)) is not None:
                _migrate(parse(url))
                return
            with EmbeddedPostgres(settings.data_dir, "nothing, as it only migrates") as postgres:
                _migrate(parse(postgres.url))


def _migrate(target: Target, *, quiet: bool = False) -> None:
    """Bring the schema up; `quiet` says nothing when nothing was to do."""
    from service import doctor
    from service.store.db.database import DATABASE_ERRORS
    from service.store.schema.migrations import MigrationError, upgrade

    try:
        done = run(lambda: upgrade(target, on_wait=say))
    except MigrationError as error:
        fail(str(error), 1)
    except DATABASE_ERRORS as error:
        fail(doctor.explain(error, target), 1)
    if done.before != done.after or not quiet:
        say(str(done))
    if done.problem is not None:
        fail(done.problem, 1)


def _serve_embedded(settings: Settings, told_to_stop: Callable[[], bool]) -> None:
    from service.embedded.postgres import EmbeddedPostgres

    def tell(words: str) -> None:
        structlog.get_logger(__name__).warning(words)

    with (
        telling_embedded_errors(),
        EmbeddedPostgres(settings.data_dir, settings.listen) as postgres,
    ):
        for note in postgres.notes:
            say(note)
        target = parse(postgres.url)
        _migrate(target, quiet=True)
        postgres.supervise(tell)
        try:
            _serve(
                settings,
                target,
                f"embedded PostgreSQL in {postgres.pgdata}",
                told_to_stop,
                postgres.announce,
            )
        finally:
            # The service has ended; PostgreSQL has time of its own.
            faulthandler.cancel_dump_traceback_later()


def _serve(
    settings: Settings,
    target: Target,
    data: str,
    told_to_stop: Callable[[], bool],
    announce: Callable[[str], None] | None = None,
) -> None:
    from service import server
    from service.telemetry.logs import configure_logging

    def on_ready(address: str) -> None:
        if announce is not None:
            announce(address)
        if settings.log_format != "json":
            _greet(address, data)

    configure_logging(settings.log_level, settings.log_format)
    for line in config.unknown():
        say(line)
    try:
        run(lambda: server.run(settings, target, on_ready=on_ready, told_to_stop=told_to_stop))
    except config.BadConfiguration as error:
        fail_configuration(error)
    except OSError as error:
        reason = {
            errno.EADDRINUSE: "is in use",
            errno.EACCES: "may not be listened on by this user",
            errno.EADDRNOTAVAIL: "is no address of this machine",
        }.get(error.errno or 0)
        if reason is None:
            raise
        address = error.filename or settings.listen
        fail(
            f"{address} {reason}: stop what listens there, or set CHAT_HISTORY_LISTEN to another address",
            1,
        )


def _greet(address: str, data: str) -> None:
    """Tell the person at the terminal what runs, how to reach it and how to stop it."""
    name = typer.style(f"ChatHistory {service.__version__}", bold=True)
    typer.echo(
        f"\n{name} is running.\n\n"
        f"  gRPC    {address}  (chathistory.v1.ChatHistoryService; reflection and grpc.health.v1 are on)\n"
        f"  data    {data}\n"
        f"  try     the Python snippet in README.md, which creates a session and appends to it\n"
        f"  check   chat-history check, in another terminal\n"
        f"  stop    Ctrl-C\n"
    )
    sys.stdout.flush()
