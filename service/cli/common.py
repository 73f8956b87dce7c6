"""What every command needs: the configuration, words for a person, an end in good order."""

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

T = TypeVar("T")


def configuration() -> tuple[Settings, Target | None]:
    """Read the configuration, whole, before anything starts; no target means the embedded database."""
    try:
        settings = config.load()
        if settings.database_url is None:
            return settings, None
        url = settings.database_url.get_secret_value()
        return settings, parse(url, prepared_statements=settings.db_prepared_statements)
    except config.BadConfiguration as error:
        fail_configuration(error)
    except ValueError as error:
        fail(f"bad configuration: {error}", 2)


def fail_configuration(error: config.BadConfiguration) -> NoReturn:
    fail("\n".join(f"bad configuration: {problem}" for problem in error.problems), 2)


def fail(words: str, code: int) -> NoReturn:
    for line in words.splitlines():
        typer.secho(f"chat-history: {line}", err=True, fg=typer.colors.RED)
    raise typer.Exit(code)


def say(words: str) -> None:
    """Tell a person what goes on, on standard error, where the log goes too."""
    typer.echo(f"chat-history: {words}", err=True)


@contextmanager
def stoppable(interrupted: int = 130) -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C, SIGTERM and a closed terminal end the command in good order, also while it still starts.

    Gives a function that says whether the command was told to end: an exception that is raised while a destructor or a weak reference's
    callback runs goes no further, and who has time must look.
    """
    told = False

    def stop(_number: int, _frame: object) -> NoReturn:
        nonlocal told
        told = True
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # Ignored under nohup.
        signal.signal(signal.SIGHUP, lambda _number, _frame: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield lambda: told
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(interrupted) from None
    finally:
        signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # What is left takes an instant, and an impatient Ctrl-C would spoil the exit code.


def run(work: Callable[[], Awaitable[T]]) -> T:
    """Run asynchronous work to its end."""

    async def whole() -> T:
        return await work()

    if sys.platform == "win32":
        return asyncio.run(whole())
    import uvloop

    return uvloop.run(whole())


@contextmanager
def telling_embedded_errors() -> Iterator[None]:
    from service.embedded.data_dir import AlreadyRunning, EmbeddedError

    try:
        yield
    except AlreadyRunning as error:
        fail(str(error), 2)
    except EmbeddedError as error:
        fail(str(error), 1)
