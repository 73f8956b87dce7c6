"""Mixed load under random faults, checked afterwards: `make soak MINUTES=5 SEED= IDLE=1`.

The exit code is 1 if an acknowledged message was lost, duplicated or followed by a gap, a client
read something impossible, a call failed in a way that it must not, a replica did not recover
automatically, memory or descriptors are not flat, or an idle service sent the database statements.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

# Before gRPC is imported, for the reason that tests/support/environment.py gives.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

from tests.soak.report import save, show
from tests.soak.run import Soak, check_logs
from tests.soak.stack import Stack

if TYPE_CHECKING:
    from tests.soak.tally import Tally

ROUND_S = 30.0
RESULTS = Path(__file__).resolve().parents[2] / ".bench" / "soak"
console = Console(width=140 if not sys.stdout.isatty() else None)


class Bar:
    """The progress bar: elapsed time, acknowledged messages, problems and the current fault."""

    def __init__(self, progress: Progress, seconds: float) -> None:
        self._progress = progress
        self._task: TaskID = progress.add_task("starting", total=seconds, figures="")
        self._soak: Soak | None = None

    def follow(self, soak: Soak) -> None:
        """Show the figures of a soak."""
        self._soak = soak

    def show_status(self, status: str) -> None:
        """Show the current step of the soak."""
        self._progress.update(self._task, description=status)

    async def refresh(self) -> None:
        """Update the figures twice a second."""
        while True:
            if self._soak is not None:
                tally = self._soak.tally
                figures = (
                    f"{tally.acknowledged:,} acknowledged, {len(tally.outages)} faults, "
                    f"{len(tally.problems)} problems"
                )
                self._progress.update(self._task, completed=tally.seconds, figures=figures)
            await asyncio.sleep(0.5)


async def soak(minutes: float, idle: float, seed: int, round_s: float = ROUND_S) -> Tally:
    """Run the rounds and the idle time, and return the tally."""
    rounds = max(1, round(minutes * 60 / round_s))
    columns = (
        BarColumn(30),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = Bar(progress, (minutes + idle) * 60)
        async with Stack() as stack:
            if stack.pooler is None:
                console.print("PgBouncer is not installed: both replicas connect directly")
            running = Soak(stack, seed, bar.show_status)
            bar.follow(running)
            refreshing = asyncio.create_task(bar.refresh())
            try:
                await running.run(rounds, round_s=round_s)
                if idle:
                    await running.idle(idle)
            finally:
                refreshing.cancel()
                await asyncio.wait([refreshing])
            await check_logs(stack, running.tally)
            return running.tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="minutes of load under faults")
    parser.add_argument("--idle", type=float, default=1.0, help="minutes without calls afterwards")
    parser.add_argument("--seed", default="", help="repeats the draws of an earlier run")
    arguments = parser.parse_args()
    seed = int(arguments.seed or random.SystemRandom().randrange(2**32))
    console.print(f"seed {seed}")
    tally = asyncio.run(soak(arguments.minutes, arguments.idle, seed))
    show(tally, console)
    save(
        tally,
        RESULTS,
        seed=seed,
        minutes=arguments.minutes,
        finished=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )
    console.print(f"report.json and memory.svg are in {RESULTS}")
    sys.exit(bool(tally.problems))


if __name__ == "__main__":
    main()
