"""The `chat-history` command. Exit codes: 0 all is well, 1 something must be done, 2 the configuration or the way it was called is wrong.

What serves must stay small, so what only one command needs is imported inside that command.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar

import typer

import service
from service import config
from service.config import Settings
from service.store.url import Target, parse

if TYPE_CHECKING:
    from service.store.diagnosis import Finding
    from service.transfer import Counts

T = TypeVar("T")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="ChatHistory: a gRPC service that keeps conversations on PostgreSQL.",
    epilog="Configured by environment variables and a .env file: see docs/configuration.md.",
)


def main() -> None:
    """Run the command line."""
    app(prog_name="chat-history")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"chat-history {service.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    migrate: Annotated[
        bool,
        typer.Option("--migrate", help="Bring the schema up first. With the embedded database that is always done."),
    ] = False,
) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    settings, target = _configuration()
    with _stoppable(interrupted=0):
        if target is not None:
            if migrate:
                _migrate(target, quiet=True)
            _serve(settings, target, f"PostgreSQL at {target.place}")
        else:
            _serve_embedded(settings)
    _say("stopped")


@app.command("migrate")
def migrate_command() -> None:
    """Bring the schema of the configured database up to this build."""
    settings, target = _configuration()
    with _stoppable():
        if target is not None:
            _migrate(target)
            return
        from service.store.data_folder import running_url
        from service.store.embedded import EmbeddedPostgres

        with _telling_embedded_errors():
            if (url := running_url(settings.data_dir)) is not None:
                _migrate(parse(url))
                return
            with EmbeddedPostgres(settings.data_dir, "nothing, as it only migrates") as postgres:
                _migrate(parse(postgres.url))


@app.command()
def check() -> None:
    """Connect to what is configured and say what is well and what must be done."""
    from service.store.data_folder import EmbeddedError
    from service.store.diagnosis import Finding, Verdict

    settings, target = _configuration()
    report = [_on_configuration(), *(Finding("configuration", line, Verdict.NOTE) for line in config.unknown())]
    report += _check_identity(settings)
    try:
        with _stoppable():
            report += _check_embedded(settings) if target is None else _check(settings, target)
    except EmbeddedError as error:
        report.append(Finding("database", str(error), Verdict.TODO))
    _show(report)
    raise typer.Exit(any(finding.verdict is Verdict.TODO for finding in report))


@app.command("export")
def export_command(
    user: Annotated[str, typer.Argument(help="The user's id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write; - is standard output.")] = Path(
        "-"
    ),
) -> None:
    """Write everything of one user as lines of JSON."""
    from service import transfer

    done = _transfer(lambda _settings, target: transfer.export_to(target, user, output))
    _say(f"exported {done}")


@app.command("import")
def import_command(
    file: Annotated[Path, typer.Argument(help="Lines of JSON, from an export or a query; - is standard input.")],
    user: Annotated[str | None, typer.Option("--user-id", help="Make all of it this user's.")] = None,
) -> None:
    """Store what was exported, or another chatbot's history, with its times and order; may be run again at any time."""
    from service import transfer

    done = _transfer(lambda settings, target: transfer.import_from(target, file, user, search=settings.search == "on"))
    _say(f"imported {done} ({done.written} messages were new)")


@app.command()
def token(
    subject: Annotated[str, typer.Argument(help="Whom it names: a user's id, or any name with --service.")],
    as_service: Annotated[bool, typer.Option("--service", help="Let it act for every user.")] = False,
    lifetime: Annotated[float, typer.Option(help="Seconds until it expires.", min=1)] = 3600,
    key: Annotated[str | None, typer.Option(help="File of a private key (PEM); else the configured secret.")] = None,
    kid: Annotated[str | None, typer.Option(help="The key's id, where keys come from a URL.")] = None,
) -> None:
    """Make a token for development."""
    from service.rpc import tokens

    settings, _ = _configuration()
    signing = key or (settings.jwt_key.get_secret_value() if settings.jwt_key else None)
    if signing is None:
        _fail("nothing to sign with: set CHAT_HISTORY_AUTH=jwt and CHAT_HISTORY_JWT_KEY, or give --key", 2)
    about = {"issuer": settings.jwt_issuer, "audience": settings.jwt_audience, "kid": kid}
    try:
        print(tokens.make(signing, subject, lifetime=lifetime, service=as_service, **about))
    except ValueError as error:
        _fail(str(error), 2)


def _transfer(work: Callable[[Settings, Target], Awaitable[Counts]]) -> Counts:
    """Take data out of the configured database, or put it in; an embedded one is started when it does not run."""
    from service.store import diagnosis
    from service.store.data_folder import EmbeddedError, running_url
    from service.store.database import DATABASE_ERRORS
    from service.store.embedded import EmbeddedPostgres
    from service.telemetry import configure_logging
    from service.transfer import TransferError

    def run(target: Target) -> Counts:
        try:
            return _run(lambda: work(settings, target))
        except DATABASE_ERRORS as error:
            _fail(diagnosis.explain(error, target), 1)

    settings, configured = _configuration()
    configure_logging(settings.log_level, settings.log_format)
    with _stoppable():
        try:
            if configured is not None:
                return run(configured)
            if (url := running_url(settings.data_dir)) is not None:
                return run(parse(url))
            with EmbeddedPostgres(settings.data_dir, "nothing, as it only copies data") as postgres:
                return run(parse(postgres.url))
        except TransferError as error:
            _fail(str(error), 1)
        except EmbeddedError as error:
            _fail(str(error), 2)


def _configuration() -> tuple[Settings, Target | None]:
    """Read the configuration, whole, before anything starts; no target means the embedded database."""
    try:
        settings = config.load()
        if settings.database_url is None:
            return settings, None
        url = settings.database_url.get_secret_value()
        return settings, parse(url, prepared_statements=settings.db_prepared_statements)
    except config.BadConfiguration as error:
        _fail_configuration(error)
    except ValueError as error:
        _fail(f"bad configuration: {error}", 2)


def _fail_configuration(error: config.BadConfiguration) -> NoReturn:
    _fail("\n".join(f"bad configuration: {problem}" for problem in error.problems), 2)


def _fail(words: str, code: int) -> NoReturn:
    for line in words.splitlines():
        typer.secho(f"chat-history: {line}", err=True, fg=typer.colors.RED)
    raise typer.Exit(code)


def _say(words: str) -> None:
    """Tell a person what goes on, on standard error, where the log goes too."""
    typer.echo(f"chat-history: {words}", err=True)


@contextmanager
def _stoppable(interrupted: int = 130) -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and a closed terminal end the command in good order, also while it still starts."""

    def stop(_number: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # Ignored under nohup.
        signal.signal(signal.SIGHUP, lambda _number, _frame: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield
    except KeyboardInterrupt:
        _say("interrupted")
        raise typer.Exit(interrupted) from None
    finally:
        signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # What is left takes an instant, and an impatient Ctrl-C would spoil the exit code.


def _run(work: Callable[[], Awaitable[T]]) -> T:
    """Run asynchronous work to its end."""

    async def whole() -> T:
        return await work()

    if sys.platform == "win32":
        return asyncio.run(whole())
    import uvloop

    return uvloop.run(whole())


def _migrate(target: Target, *, quiet: bool = False) -> None:
    """Bring the schema up; `quiet` says nothing when nothing was to do."""
    from service.store import diagnosis
    from service.store.database import DATABASE_ERRORS
    from service.store.migrations import MigrationError, upgrade

    try:
        done = _run(lambda: upgrade(target, on_wait=_say))
    except MigrationError as error:
        _fail(str(error), 1)
    except DATABASE_ERRORS as error:
        _fail(diagnosis.explain(error, target), 1)
    if done.before != done.after or not quiet:
        _say(str(done))
    if done.problem is not None:
        _fail(done.problem, 1)


def _serve_embedded(settings: Settings) -> None:
    from service.store.embedded import EmbeddedPostgres

    with _telling_embedded_errors(), EmbeddedPostgres(settings.data_dir, settings.listen) as postgres:
        for note in postgres.notes:
            _say(note)
        target = parse(postgres.url)
        _migrate(target, quiet=True)
        _serve(settings, target, f"embedded PostgreSQL in {postgres.pgdata}", postgres.announce)


@contextmanager
def _telling_embedded_errors() -> Iterator[None]:
    from service.store.data_folder import AlreadyRunning, EmbeddedError

    try:
        yield
    except AlreadyRunning as error:
        _fail(str(error), 2)
    except EmbeddedError as error:
        _fail(str(error), 1)


def _serve(settings: Settings, target: Target, data: str, announce: Callable[[str], None] | None = None) -> None:
    from service.server import run
    from service.telemetry import configure_logging

    def on_ready(address: str) -> None:
        if announce is not None:
            announce(address)
        if settings.log_format != "json":
            _greet(address, data)

    configure_logging(settings.log_level, settings.log_format)
    for line in config.unknown():
        _say(line)
    try:
        _run(lambda: run(settings, target, on_ready=on_ready))
    except config.BadConfiguration as error:
        _fail_configuration(error)
    except OSError as error:
        reason = {
            errno.EADDRINUSE: "is in use",
            errno.EACCES: "may not be listened on by this user",
            errno.EADDRNOTAVAIL: "is no address of this machine",
        }.get(error.errno or 0)
        if reason is None:
            raise
        address = error.filename or settings.listen
        _fail(f"{address} {reason}: stop what listens there, or set CHAT_HISTORY_LISTEN to another address", 1)


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


def _on_configuration() -> Finding:
    from service.store.diagnosis import Finding

    given = config.sources()
    by_source: dict[str, list[str]] = {}
    for name, source in given.items():
        by_source.setdefault(source, []).append(name)
    words = [f"{', '.join(names)} from {source}" for source, names in by_source.items()]
    return Finding("configuration", "; ".join([*words, "all else at its defaults" if words else "all at its defaults"]))


def _check_identity(settings: Settings) -> list[Finding]:
    from service.rpc import identity
    from service.store.diagnosis import Finding, Verdict

    try:
        return [Finding("identity", note, Verdict.NOTE) for note in identity.check(settings)]
    except config.BadConfiguration as error:
        return [Finding("identity", problem, Verdict.TODO) for problem in error.problems]


def _check(settings: Settings, target: Target) -> list[Finding]:
    from service.store import diagnosis
    from service.store.database import DATABASE_ERRORS

    notes = [diagnosis.Finding("database URL", note, diagnosis.Verdict.NOTE) for note in target.notes]
    try:
        found = _run(lambda: diagnosis.describe(target, settings.db_connect_timeout))
    except DATABASE_ERRORS as error:
        return [diagnosis.Finding("database", diagnosis.explain(error, target), diagnosis.Verdict.TODO), *notes]
    pool = settings.db_pool_size + settings.db_max_overflow
    return [*diagnosis.findings(found, target, pool), *notes]


def _check_embedded(settings: Settings) -> list[Finding]:
    from service.store import data_folder, embedded
    from service.store.diagnosis import Finding, Verdict

    place = f"embedded PostgreSQL in {settings.data_dir.resolve()}, as no DATABASE_URL is set"
    url = data_folder.running_url(settings.data_dir)
    if url is None:
        embedded.find_programs()
        return [
            Finding(
                "database",
                f"{place}: it is not running; start it with `make run` or `chat-history serve`",
                Verdict.TODO,
            )
        ]
    holder = data_folder.owner(settings.data_dir)
    service_line = (
        Finding("service", f"process {holder.pid}, listening on {holder.listen}")
        if holder
        else Finding(
            "service", "not running, though its database is; `chat-history serve` takes that over", Verdict.TODO
        )
    )
    return [Finding("data", place), service_line, *_check(settings, parse(url))]


def _show(report: list[Finding]) -> None:
    todo = sum(finding.verdict == "todo" for finding in report)
    end = f"To do: {todo}." if todo else "All is well."
    if not sys.stdout.isatty():
        width = max(len(finding.about) for finding in report)
        print(*(f"{verdict:<4}  {about:<{width}}  {words}" for about, words, verdict in report), "", end, sep="\n")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colors = {"ok": "green", "note": "yellow", "todo": "bold red"}
    grid = Table.grid(padding=(0, 2))
    for finding in report:
        grid.add_row(Text(finding.verdict, colors[finding.verdict]), Text(finding.about, "bold"), Text(finding.words))
    console = Console(highlight=False)
    console.print(grid, "", Text(end, colors["todo" if todo else "ok"]), sep="\n")
