"""The command `hostile` of the benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.hostile import run as measured
from benchmarks.hostile import soak
from benchmarks.hostile.attacks import MATRIX, attacks
from benchmarks.hostile.outcome import Outcome, Quiet, summary
from benchmarks.hostile.specials import SPECIALS

_PROGRESS_ATTACKS = 25
"""Attacks after which a line shows the progress."""
_VERBOSE_ATTACKS = 60
"""A run of more attacks prints only those that break a bound."""
DEFAULT_BUDGET_MIB = 512.0
"""Memory of the container for which the service's defaults are chosen."""

Seed = Annotated[int, typer.Option(help="Determines all attacks.")]
Count = Annotated[int, typer.Option("--attacks", help="Number of attacks.")]
Seconds = Annotated[float, typer.Option(help="Length of an attack.")]
Only = Annotated[
    list[str] | None,
    typer.Option(help=f"Only this kind of attack: {MATRIX}, {', '.join(SPECIALS)}."),
]
Budget = Annotated[float, typer.Option("--budget", help="Memory limit of the service, in MiB.")]
Scale = Annotated[float, typer.Option(help="Share of the stored data, for quick runs.")]
Soak = Annotated[
    float,
    typer.Option("--soak", help="Instead, run attacks and ordinary users for this many seconds."),
]
Number = Annotated[
    list[int] | None, typer.Option("--number", help="Only the attack with this number.")
]


def add_command(
    app: typer.Typer, console: Console, run: Callable[[Coroutine[Any, Any, None]], None]
) -> None:
    """Add the command to the command line; `run` runs it until its end or a signal."""

    @app.command("hostile")
    def run_hostile(
        *,
        seed: Seed = 1,
        count: Count = 300,
        seconds: Seconds = 3.0,
        only: Only = None,
        numbers: Number = None,
        budget_mib: Budget = DEFAULT_BUDGET_MIB,
        scale: Scale = 1.0,
        soak_s: Soak = 0.0,
    ) -> None:
        """Attack the service as one user, and measure what another user notices."""
        if soak_s:
            run(_soak(console, soak_s, seed, seconds, scale, budget_mib))
            return
        run(
            measure(
                console,
                seed=seed,
                count=count,
                seconds=seconds,
                only=only,
                numbers=numbers,
                budget_mib=budget_mib,
                scale=scale,
            )
        )


async def measure(
    console: Console,
    *,
    seed: int,
    count: int,
    seconds: float,
    only: list[str] | None,
    numbers: list[int] | None,
    budget_mib: float,
    scale: float,
) -> None:
    """Run the attacks of a seed, print each that breaks a bound, and exit with 1 if any does."""
    drawn = [
        attack
        for attack in attacks(seed, count, only or ())
        if not numbers or attack.number in numbers
    ]
    outcomes: list[Outcome] = []
    results: list[dict[str, Any]] = []
    broken: list[Outcome] = []
    started = time.monotonic()

    def say(line: str) -> None:
        console.print(line, highlight=False)

    def report(outcome: Outcome, quiet: Quiet) -> None:
        outcomes.append(outcome)
        results.append(outcome.to_dict(quiet, budget_mib))
        if results[-1]["breaks"]:
            broken.append(outcome)
        _print(console, outcome, quiet, budget_mib, is_verbose=len(drawn) <= _VERBOSE_ATTACKS)
        if len(outcomes) % _PROGRESS_ATTACKS == 0:
            minutes = (time.monotonic() - started) / 60
            say(
                f"{len(outcomes)} of {len(drawn)} attacks in {minutes:.1f} minutes, "
                f"{len(broken)} broke a bound"
            )
        measured.save(f"seed-{seed}", results, quiet)

    quiet = await measured.run(measured.Plan(drawn, seconds, scale), report, say)
    console.print(summary(outcomes, quiet, budget_mib).rich())
    rest = [outcome.resident_mib for outcome in outcomes]
    console.print(
        f"seed {seed}: {len(broken)} of {len(outcomes)} attacks broke a bound; memory of the "
        f"service after the first attack {rest[0]:.0f} MiB, after the last {rest[-1]:.0f} MiB",
        highlight=False,
    )
    if broken:
        raise typer.Exit(1)


async def _soak(
    console: Console, soak_s: float, seed: int, seconds: float, scale: float, budget_mib: float
) -> None:
    """Run a soak, and exit with 1 if it breaks a bound."""
    result = await soak.soak(
        soak_s, seed, seconds, scale, lambda line: console.print(line, highlight=False)
    )
    for line in result.lines(budget_mib):
        console.print(line, markup=False, highlight=False)
    if result.problems(budget_mib):
        raise typer.Exit(1)


def _print(
    console: Console, outcome: Outcome, quiet: Quiet, budget_mib: float, *, is_verbose: bool
) -> None:
    problems = outcome.breaks(quiet, budget_mib)
    if not problems and not is_verbose:
        return
    figures = outcome.figures()
    line = (
        f"{outcome.attack}: append p99 {figures['append_p99_ms']:.0f} ms, "
        f"read p99 {figures['read_p99_ms']:.0f} ms, liveness {figures['liveness_max_ms']:.0f} ms, "
        f"{figures['peak_mib']:.0f} MiB, then {figures['resident_mib']:.0f}; "
        f"attacker: {outcome.tally_text()}"
    )
    if outcome.events:
        line += f"; logged: {outcome.events}"
    if problems:
        line += f"; BROKEN: {'; '.join(problems)}"
    console.print(line, style="red" if problems else None, markup=False, highlight=False)
