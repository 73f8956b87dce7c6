"""The command line of the benchmarks."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import machine, overload, pairs, report, workload
from benchmarks.bench import FULL, QUICK, SESSIONS, Bench, body_count
from benchmarks.comparison import Comparison, Subject, compare
from benchmarks.environment import WORK_DIR, Environment
from benchmarks.hostile import cli as hostile
from benchmarks.load_generator import BenchError, Load
from benchmarks.scenario_tables import tables
from benchmarks.scenarios import SCENARIOS, Variant, with_jwt
from service.embedded.data_dir import EmbeddedError

_MAX_BUSY_PERCENT = 15.0
"""CPU usage of other processes above which the figures are rough."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure the service and the servers that it is compared with.",
)
console = Console()
if not console.is_terminal:
    console.width = 140

InFlight = Annotated[int, typer.Option(help="Concurrent calls.")]
Rounds = Annotated[int, typer.Option(help="Rounds; medians are shown.")]
Seconds = Annotated[float, typer.Option(help="Seconds that each server is measured in a round.")]
Connections = Annotated[int, typer.Option(help="Connections of the load generator.")]
Jwt = Annotated[bool, typer.Option("--jwt", help="Use JWT identity.")]
Hold = Annotated[
    bool, typer.Option("--hold", help="Keep the servers running until Enter is pressed.")
]


def main() -> None:
    """Run the command line."""
    app(prog_name="python -m benchmarks")


def _run(command: Coroutine[Any, Any, None]) -> None:
    """Run until the end, Ctrl-C or SIGTERM. All started processes are stopped in each case."""

    async def stoppable() -> None:
        task = asyncio.ensure_future(command)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        await task

    try:
        uvloop.run(stoppable())
    except (BenchError, EmbeddedError) as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    except asyncio.CancelledError:
        console.print("stopped")
        raise typer.Exit(130) from None


hostile.add_command(app, console, _run)


@app.command("all")
def run_all(
    *,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Rough figures in two minutes; written to .bench/quick/."),
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Only this scenario; written to .bench/partial/. One of {', '.join(SCENARIOS)}."
        ),
    ] = None,
) -> None:
    """Run all scenarios and write docs/explanation/performance.md and docs/bench/."""
    unknown = set(only or ()) - set(SCENARIOS)
    if unknown:
        raise typer.BadParameter(f"unknown scenario: {', '.join(sorted(unknown))}")
    _run(_all(only or list(SCENARIOS), quick=quick, partial=bool(only)))


async def _all(names: list[str], *, quick: bool, partial: bool) -> None:
    busy_percent = await asyncio.to_thread(machine.cpu_percent_in_use)
    if busy_percent > _MAX_BUSY_PERCENT:
        console.print(
            f"[yellow]Other processes use {busy_percent:.0f}% of the CPU: "
            "the figures will be rough.[/]"
        )
    measured: dict[str, Any] = {}
    async with Environment() as environment:
        description = await machine.describe(environment, busy_percent)
        with _progress() as progress:
            overall = progress.add_task("all", total=len(names))
            for name in names:
                progress_bar = _ProgressBar(progress, name)
                measured[name] = await SCENARIOS[name](
                    Bench(environment, QUICK if quick else FULL, progress_bar)
                )
                progress.advance(overall)
    results = {"environment": description, "plan": (QUICK if quick else FULL).__dict__, **measured}
    for table in tables(results):
        console.print(table.rich())
    folder = (
        WORK_DIR / ("quick" if quick else "partial") if quick or partial else report.COMMITTED_DIR
    )
    for path in report.write(results, folder):
        console.print(f"written: {path}", highlight=False)


class _ProgressBar:
    """A scenario's line in the progress display."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress = progress
        self._task = progress.add_task(name.replace("_", " "), total=None)
        self._total = 0

    def expect(self, steps: int) -> None:
        self._total += steps
        self._progress.update(self._task, total=self._total)

    def advance(self) -> None:
        self._progress.advance(self._task)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


@app.command("append")
def append(
    *,
    in_flight: InFlight = 64,
    rounds: Rounds = 5,
    seconds: Seconds = 3.0,
    connections: Connections = 8,
    messages: Annotated[int, typer.Option(help="Messages per call.")] = 1,
    sessions: Annotated[int, typer.Option(help="Sessions to append to.")] = SESSIONS,
    direct: Annotated[
        bool, typer.Option("--direct", help="Compare with asyncpg instead of the echo.")
    ] = False,
    jwt: Jwt = False,
    hold: Hold = False,
) -> None:
    """Compare AppendMessages with the echo."""
    load = Load(in_flight, seconds, connections=connections)
    _run(
        _append(
            load, rounds, messages, sessions, direct=direct, variant=_variant(jwt=jwt), hold=hold
        )
    )


@app.command("context")
def get_context(
    *,
    in_flight: InFlight = 64,
    rounds: Rounds = 5,
    seconds: Seconds = 3.0,
    connections: Connections = 8,
    jwt: Jwt = False,
    hold: Hold = False,
) -> None:
    """Compare GetContext of 20 messages with the echo."""
    _run(
        _read(
            "GetContext",
            Load(in_flight, seconds, connections=connections),
            rounds,
            variant=_variant(jwt=jwt),
            hold=hold,
        )
    )


@app.command("list")
def list_messages(
    *,
    in_flight: InFlight = 64,
    rounds: Rounds = 5,
    seconds: Seconds = 3.0,
    connections: Connections = 8,
    jwt: Jwt = False,
    hold: Hold = False,
) -> None:
    """Compare ListMessages of 20 messages with the echo."""
    _run(
        _read(
            "ListMessages",
            Load(in_flight, seconds, connections=connections),
            rounds,
            variant=_variant(jwt=jwt),
            hold=hold,
        )
    )


@app.command("overload")
def run_overload() -> None:
    """Load the service with four times its peak load; for docs/explanation/stability.md."""
    _run(_overload())


async def _overload() -> None:
    async with Environment() as environment:
        with _progress() as progress:
            phases = await overload.overload(
                Bench(environment, FULL, _ProgressBar(progress, "overload"))
            )
    table = overload.table(phases)
    console.print(table.rich())
    console.print(table.markdown(), markup=False, highlight=False)


@app.command("pairs")
def compare_trees(
    *,
    before: Annotated[Path, typer.Option(help="Source tree of the earlier version.")],
    only: Annotated[
        list[str] | None, typer.Option(help=f"Some of {', '.join(pairs.KINDS)}.")
    ] = None,
    count: Annotated[int, typer.Option("--pairs", help="Pairs of measurements.")] = 7,
    in_flight: InFlight = 64,
    seconds: Seconds = 3.0,
    connections: Connections = 8,
) -> None:
    """Compare this tree with an earlier one, pair by pair."""
    unknown = set(only or ()) - set(pairs.KINDS)
    if unknown:
        raise typer.BadParameter(f"unknown kind of call: {', '.join(sorted(unknown))}")
    load = Load(in_flight, seconds, connections=connections)
    _run(_pairs(before.resolve(), only or pairs.KINDS, count, load))


async def _pairs(before: Path, kinds: Sequence[str], count: int, load: Load) -> None:
    async with Environment() as environment:
        with _progress() as progress:
            task = progress.add_task("pairs", total=2 * count * len(kinds))
            results = await pairs.run(
                environment, before, kinds, count, load, lambda: progress.advance(task)
            )
    console.print(pairs.table(results, load))


async def _append(
    load: Load,
    rounds: int,
    messages: int,
    sessions: int,
    *,
    direct: bool,
    variant: Variant,
    hold: bool,
) -> None:
    async with Environment() as environment:
        bench = Bench(environment, FULL, _NoProgress())
        keys = await bench.new_sessions_in("append", sessions)
        bodies = workload.append_bodies(keys, body_count(load, messages), messages)
        reference, database = ("direct", "append") if direct else ("echo", None)
        async with (
            environment.service("append", **variant.settings) as service,
            environment.reference_server(reference, database) as reference_server,
        ):
            subjects = [
                Subject("service", service, "AppendMessages", bodies, headers=variant.headers),
                Subject(reference, reference_server, "AppendMessages", bodies, cycle=not direct),
            ]
            result = await _measure(environment, subjects, load, rounds)
            if messages > 1:
                console.print(
                    f"messages/s: {result.medians('service').calls_per_second * messages:.0f}"
                )
            await _hold(hold=hold)
        rows = await bench.check_rows(
            "append", result.answered("service", *([reference] * direct)) * messages
        )
        hot = rows["hot_updates"] / max(rows["session_updates"], 1)
        console.print(
            f"{rows['acknowledged']} messages acknowledged and stored; heap-only updates: {hot:.1%}"
        )


async def _read(method: str, load: Load, rounds: int, *, variant: Variant, hold: bool) -> None:
    async with Environment() as environment:
        keys = await Bench(environment, FULL, _NoProgress()).new_sessions_in(
            "read", messages=workload.SESSION_MESSAGES
        )
        bodies = (
            workload.context_bodies(keys) if method == "GetContext" else workload.list_bodies(keys)
        )
        async with (
            environment.service("read", **variant.settings) as service,
            environment.reference_server("echo") as echo,
        ):
            subjects = [
                Subject(server.name, server, method, bodies, cycle=True, headers=variant.headers)
                for server in (service, echo)
            ]
            await _measure(environment, subjects, load, rounds)
            await _hold(hold=hold)


def _variant(*, jwt: bool) -> Variant:
    return with_jwt() if jwt else Variant({})


class _NoProgress:
    """Ignores the progress."""

    def expect(self, steps: int) -> None:
        pass

    def advance(self) -> None:
        pass


async def _measure(
    environment: Environment, subjects: list[Subject], load: Load, rounds: int
) -> Comparison:
    for subject in subjects:
        console.print(
            f"{subject.name}: process {subject.server.pid} at {subject.server.address}",
            highlight=False,
        )
    with _progress() as progress:
        task = progress.add_task(subjects[0].method, total=rounds * len(subjects))
        result = await compare(environment, subjects, load, rounds, lambda: progress.advance(task))
    _show(subjects, load, result)
    return result


def _show(subjects: list[Subject], load: Load, result: Comparison) -> None:
    first, second = (subject.name for subject in subjects)
    ours, theirs, ratios = (
        result.medians(first),
        result.medians(second),
        result.ratios(first, second),
    )
    title = (
        f"{subjects[0].method}, {load.in_flight} in flight, medians of {len(result.rounds[first])}"
    )
    table = Table("", first, second, "ratio", title=title, title_justify="left")
    for name, label in (
        ("calls_per_second", "calls/s"),
        ("p50_us", "p50 µs"),
        ("p99_us", "p99 µs"),
        ("cpu_us_per_call", "server CPU µs per call"),
        ("postgres_us_per_call", "PostgreSQL CPU µs per call"),
        ("load_generator_us_per_call", "load generator CPU µs per call"),
        ("bytes_per_reply", "bytes per reply"),
    ):
        ratio = f"{ratios[name]:.2f}" if name in ratios else ""
        table.add_row(label, f"{getattr(ours, name):.0f}", f"{getattr(theirs, name):.0f}", ratio)
    console.print(table)
    pairs = zip(result.rounds[first], result.rounds[second], strict=True)
    shares = " ".join(
        f"{ours.calls_per_second / theirs.calls_per_second:.2f}" for ours, theirs in pairs
    )
    console.print(f"ratios by round: {shares}", highlight=False)


async def _hold(*, hold: bool) -> None:
    if hold:
        with suppress(EOFError):
            await asyncio.to_thread(input, "press Enter to stop the servers ")
