"""The command `check`."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

import typer

from service import config
from service.cli.common import configuration, run, stoppable
from service.config import Settings
from service.store.db.dsn import Target, parse

if TYPE_CHECKING:
    from service.doctor import Finding


def check_command() -> None:
    """Check the configuration and the database, and report what to do."""
    from service.doctor import Finding, Verdict
    from service.embedded.data_dir import EmbeddedError

    settings, target = configuration()
    report = [
        _check_configuration(),
        *(Finding("configuration", line, Verdict.NOTE) for line in config.unknown_settings()),
    ]
    report += _check_identity(settings)
    report += _check_addresses(settings)
    report += _check_disk(settings)
    try:
        with stoppable():
            report += (
                _check_embedded(settings) if target is None else _check_database(settings, target)
            )
    except EmbeddedError as error:
        report.append(Finding("database", str(error), Verdict.TODO))
    _show(report)
    raise typer.Exit(any(finding.verdict is Verdict.TODO for finding in report))


def _check_configuration() -> Finding:
    from service.doctor import Finding

    by_source: dict[str, list[str]] = {}
    for name, source in config.sources().items():
        by_source.setdefault(source, []).append(name)
    parts = [f"{', '.join(names)} from {source}" for source, names in by_source.items()]
    parts.append("all other settings at their defaults" if parts else "all settings at defaults")
    return Finding("configuration", "; ".join(parts))


def _check_identity(settings: Settings) -> list[Finding]:
    from service.auth import credentials
    from service.doctor import Finding, Verdict

    try:
        return [Finding("identity", note, Verdict.NOTE) for note in credentials.check(settings)]
    except config.BadConfiguration as error:
        return [Finding("identity", problem, Verdict.TODO) for problem in error.problems]


def _check_addresses(settings: Settings) -> list[Finding]:
    """Return findings on addresses that `serve` could not listen on."""
    from service.cli import addresses
    from service.doctor import Finding, Verdict
    from service.embedded import data_dir

    if data_dir.owner(settings.data_dir) is not None:
        return []  # The running service listens on them.
    return [
        Finding(
            "address",
            f"{problem.message}, unless it is the service itself"
            if problem.is_in_use
            else problem.message,
            Verdict.NOTE if problem.is_in_use else Verdict.TODO,
        )
        for problem in addresses.find_problems(settings)
    ]


def _check_disk(settings: Settings) -> list[Finding]:
    """Return the finding on the disk of the data folder, if the service writes to it."""
    from service.doctor import check_free_space

    has_index = settings.search == "on" and settings.qdrant_url is None
    if settings.has_database and not has_index:
        return []
    folder = settings.data_dir.expanduser().resolve()
    while not folder.is_dir():
        folder = folder.parent
    return check_free_space(folder, shutil.disk_usage(folder).free)


def _check_database(settings: Settings, target: Target) -> list[Finding]:
    from service import doctor
    from service.store.db.db_errors import DATABASE_ERRORS
    from service.store.db.engine import find_target_route

    notes = [doctor.Finding("database URL", note, doctor.Verdict.NOTE) for note in target.notes]

    hosts = run(lambda: doctor.describe_hosts(target, settings.db_connect_timeout))
    notes = [*doctor.check_hosts(hosts), *notes]

    async def describe() -> tuple[Target, doctor.Description]:
        timeout_s = settings.db_connect_timeout
        routed = await find_target_route(target, connect_timeout_s=timeout_s)
        return routed, await doctor.describe(routed, timeout_s)

    try:
        routed, description = run(describe)
    except DATABASE_ERRORS as error:
        return [
            doctor.Finding("database", doctor.explain(error, target), doctor.Verdict.TODO),
            *notes,
        ]
    pool = doctor.Pool(
        settings.db_pool_size,
        settings.db_max_overflow,
        settings.db_pool_recycle,
        settings.db_connect_timeout,
    )
    findings = doctor.diagnose(
        description,
        routed,
        pool,
        raises_synchronous_commit=settings.db_synchronous_commit == "on",
    )
    return [*findings, *_check_replica(settings, target), *notes]


def _check_replica(settings: Settings, primary: Target) -> list[Finding]:
    """Return a finding on the replica for reads that may lag, if there is one."""
    from service import doctor
    from service.store.db.db_errors import DATABASE_ERRORS
    from service.store.db.read_target import read_target
    from service.store.replica_status import compare_replica

    replica = read_target(settings)
    if replica is None:
        return []
    subject = "replica"
    try:
        status = run(lambda: compare_replica(primary, replica, settings.db_connect_timeout))
    except DATABASE_ERRORS as error:
        problem = doctor.explain(error, replica).replace("DATABASE_URL", "DATABASE_READ_URL")
        return [doctor.Finding(subject, problem, doctor.Verdict.TODO)]
    if status is None:
        return []  # The finding on the schema says what to do.
    if not status.is_same_history:
        problem = (
            f"{replica.location} does not hold the history of DATABASE_URL, and is not read: "
            "set DATABASE_READ_URL to a replica of that database"
        )
        return [doctor.Finding(subject, problem, doctor.Verdict.TODO)]
    if not status.is_standby:
        note = f"{replica.location} is not a standby: reads of it may load the primary"
        return [doctor.Finding(subject, note, doctor.Verdict.NOTE)]
    lag = "" if status.behind_bytes is None else f", {status.behind_bytes} bytes behind"
    return [doctor.Finding(subject, f"{replica.location} is a standby{lag}")]


def _check_embedded(settings: Settings) -> list[Finding]:
    from service.doctor import Finding, Verdict
    from service.embedded import data_dir, programs

    location = (
        f"embedded PostgreSQL in {settings.data_dir.resolve()}, because DATABASE_URL is not set"
    )
    url = data_dir.running_url(settings.data_dir)
    if url is None:
        programs.find_programs()
        return [
            Finding(
                "database",
                f"{location}: not running; start it with `make run` or `chat-history serve`",
                Verdict.TODO,
            ),
            *_check_data_version(settings),
        ]
    holder = data_dir.owner(settings.data_dir)
    service_finding = (
        Finding("service", f"process {holder.pid}, listening on {holder.listen}")
        if holder
        else Finding(
            "service",
            "not running, but its database is; `chat-history serve` takes it over",
            Verdict.TODO,
        )
    )
    return [
        Finding("data", location),
        *_check_data_version(settings),
        service_finding,
        *_check_database(settings, parse(url, schema=settings.db_schema)),
    ]


def _check_data_version(settings: Settings) -> list[Finding]:
    """Return findings on data that is damaged, or of another version than the newest installed."""
    from service.doctor import Finding, Verdict
    from service.embedded import database_folder, programs
    from service.embedded.data_dir import EmbeddedError

    pgdata = settings.data_dir.expanduser().resolve() / "postgres"
    try:
        installed = programs.find_programs()
        version = database_folder.supported_version(pgdata, installed)
    except EmbeddedError as error:
        return [Finding("data", str(error), Verdict.TODO)]
    if version is None or version == max(installed):
        return []
    message = (
        f"of PostgreSQL {version}, and PostgreSQL {max(installed)} is installed: "
        "`chat-history embedded upgrade` upgrades it"
    )
    return [Finding("data", message, Verdict.NOTE)]


def _show(report: list[Finding]) -> None:
    from service.doctor import Verdict

    todo_count = sum(finding.verdict is Verdict.TODO for finding in report)
    summary = f"To do: {todo_count}." if todo_count else "No problems."
    if not sys.stdout.isatty():
        width = max(len(finding.subject) for finding in report)
        print(
            *(
                f"{verdict:<4}  {subject:<{width}}  {message}"
                for subject, message, verdict in report
            ),
            "",
            summary,
            sep="\n",
        )
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {Verdict.OK: "green", Verdict.NOTE: "yellow", Verdict.TODO: "bold red"}
    grid = Table.grid(padding=(0, 2))
    for finding in report:
        grid.add_row(
            Text(finding.verdict, styles[finding.verdict]),
            Text(finding.subject, "bold"),
            Text(finding.message),
        )
    console = Console(highlight=False)
    summary_style = styles[Verdict.TODO if todo_count else Verdict.OK]
    console.print(grid, "", Text(summary, summary_style), sep="\n")
