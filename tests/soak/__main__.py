"""Mixed load under faults that are drawn at random, judged afterwards: `make soak MINUTES=5 SEED= IDLE=1`.

Exit code 1 when anything acknowledged is lost, doubled or gapped, when anybody was shown what cannot be, when a call failed in a way that
it must not, when a replica did not recover by itself, when memory is not flat, or when an idle service asked the database anything.
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

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = (
    "0"  # As in the tests (tests/support/environment.py): before gRPC is imported.
)

from tests.soak.report import save, show
from tests.soak.run import Soak, logs_of
from tests.soak.stack import Stack

if TYPE_CHECKING:
    from tests.soak.tally import Tally

ROUND_SECONDS = 30.0
RESULTS = Path(__file__).resolve().parents[2] / ".bench" / "soak"
console = Console(width=140 if not sys.stdout.isatty() else None)


class Bar:
    """The progress bar: how much of the time is over, what has been acknowledged, and what is broken just now."""

    def __init__(self, progress: Progress, seconds: float) -> None:
        self._progress = progress
        self._task: TaskID = progress.add_task("starting", total=seconds, figures="")
        self._soak: Soak | None = None

    def follow(self, soak: Soak) -> None:
        """Take the figures from a soak."""
        self._soak = soak

    def tell(self, words: str) -> None:
        """Show what goes on just now."""
        self._progress.update(self._task, description=words)

    async def keep(self) -> None:
        """Show the figures twice a second."""
        while True:
            if self._soak is not None:
                tally = self._soak.tally
                words = f"{tally.acknowledged:,} acknowledged, {len(tally.outages)} faults, {len(tally.problems)} problems"
                self._progress.update(self._task, completed=tally.seconds, figures=words)
            await asyncio.sleep(0.5)


async def soak(
    minutes: float, idle: float, seed: int, round_seconds: float = ROUND_SECONDS
) -> Tally:
    """Run all of it and return what was counted."""
    rounds = max(1, round(minutes * 60 / round_seconds))
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
                console.print("PgBouncer is not installed: this soak does without it")
            running = Soak(stack, seed, bar.tell)
            bar.follow(running)
            keeping = asyncio.create_task(bar.keep())
            try:
                await running.run(rounds, round_seconds)
                if idle:
                    await running.idle(idle)
            finally:
                keeping.cancel()
                await asyncio.wait([keeping])
            await logs_of(stack, running.tally)
            return running.tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long to load and break")
    parser.add_argument(
        "--idle", type=float, default=1.0, help="minutes to leave it alone afterwards"
    )
    parser.add_argument("--seed", default="", help="repeats the draws of an earlier run")
    asked = parser.parse_args()
    seed = int(asked.seed or random.SystemRandom().randrange(2**32))
    console.print(f"seed {seed}")
    tally = asyncio.run(soak(asked.minutes, asked.idle, seed))
    show(tally, console)
    save(
        tally,
        RESULTS,
        seed=seed,
        minutes=asked.minutes,
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )
    console.print(f"report.json and memory.svg are in {RESULTS}")
    sys.exit(bool(tally.problems))


if __name__ == "__main__":
    main()
