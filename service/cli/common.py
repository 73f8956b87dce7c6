"""Shared by all commands: configuration, messages for the operator, signals."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TypeVar

import typer

from service import config
from service.config import Settings
from service.store.db.dsn import Target, parse
from service.store.db.read_target import read_target
from service.store.db.target_files import TargetFiles, TextFile

T = TypeVar("T")


def configuration() -> tuple[Settings, Target | None]:
    """Read and validate the configuration, or exit with code 2.

    Returns:
        The settings, and the database; None means the embedded one.
    """
    try:
        settings = config.load()
        replica = read_target(settings)
        target = load_target(settings)
        if target is None and replica is not None:
            fail("bad configuration: DATABASE_READ_URL needs DATABASE_URL", 2)
        return settings, target
    except config.BadConfiguration as error:
        fail_configuration(error)
    except ValueError as error:
        fail(f"bad configuration: {error}", 2)


def load_target(settings: Settings) -> Target | None:
    """Return the configured database; None means the embedded one.

    Raises:
        ValueError: the connection string is malformed, or a file cannot be read.
    """

    def parse_text(text: str) -> Target:
        return parse(
            text, prepared_statements=settings.db_prepared_statements, schema=settings.db_schema
        )

    string: str | TextFile
    if settings.database_url_file is not None:
        string = TextFile("DATABASE_URL_FILE", settings.database_url_file)
    elif settings.database_url is not None:
        string = settings.database_url.get_secret_value()
    else:
        return None
    password_file = None
    if settings.database_password_file is not None:
        password_file = TextFile("DATABASE_PASSWORD_FILE", settings.database_password_file)
    return TargetFiles(parse_text, string, password_file).load()


def fail_configuration(error: config.BadConfiguration) -> NoReturn:
    fail("\n".join(f"bad configuration: {problem}" for problem in error.problems), 2)


def fail(message: str, code: int) -> NoReturn:
    """Print an error on standard error and exit with `code`."""
    for line in message.splitlines():
        typer.secho(f"chat-history: {line}", err=True, fg=typer.colors.RED)
    raise typer.Exit(code)


def print_message(message: str) -> None:
    """Print a message for the operator on standard error, like the log."""
    typer.echo(f"chat-history: {message}", err=True)


@contextmanager
def stoppable(interrupt_code: int = 130) -> Iterator[Callable[[], bool]]:
    """End the command cleanly on Ctrl-C, SIGTERM or a closed terminal, also during its start.

    Yields a function that returns whether a signal arrived. Code that is about to wait must call
    it, because Python swallows the exception of the signal handler when that runs during a
    destructor or the callback of a weak reference.

    Args:
        interrupt_code: Exit code after a signal.
    """
    is_stop_requested = False

    def stop(_number: int, _frame: object) -> NoReturn:
        nonlocal is_stop_requested
        is_stop_requested = True
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it on purpose.
        signal.signal(signal.SIGHUP, lambda _number, _frame: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield lambda: is_stop_requested
    except KeyboardInterrupt:
        print_message("interrupted")
        raise typer.Exit(interrupt_code) from None
    finally:
        # The process ends within milliseconds, and another Ctrl-C would change the exit code.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def run(work: Callable[[], Awaitable[T]]) -> T:
    """Run asynchronous work to its end, on uvloop where it is available."""

    async def main() -> T:
        return await work()

    if sys.platform == "win32":
        return asyncio.run(main())
    import uvloop

    return uvloop.run(main())


@contextmanager
def exit_on_embedded_errors() -> Iterator[None]:
    """Turn errors of the embedded PostgreSQL into a message and an exit code."""
    from service.embedded.data_dir import AlreadyRunning, EmbeddedError

    try:
        yield
    except AlreadyRunning as error:
        fail(str(error), 2)
    except EmbeddedError as error:
        fail(str(error), 1)
