"""Failover by Patroni under load, measured: `make failover ROUNDS=20 SEED=`.

The exit code is 1 if replication was synchronous and an acknowledged message was lost, a message
was duplicated, moved or followed by a gap, a reader was not shown what had been acknowledged, or
recovery or health was later than docs/explanation/stability.md promises.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Before gRPC is imported, for the reason that tests/support/environment.py gives.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

from tests.support.cluster import Cluster
from tests.support.failover import Figures, Route, direct, fail_over, pooled, table
from tests.support.patroni import PatroniCluster

MAX_MEDIAN_RECOVERY_S = 5.0
"""From the first commit of the new primary to the next acknowledgement."""
MAX_WRONG_HEALTH_S = 5.0
"""For which health may be wrong about an outage, at its start and after its end."""
ROUTES: dict[str, Route] = {"direct": direct, "pooled": pooled}
MODES = {"synchronous": True, "asynchronous": False}
RESULTS = Path(__file__).resolve().parents[2] / ".bench" / "failover"


def measure(mode: str, route: str, rounds: int, seed: int) -> Figures:
    """Run the rounds of one variant, with a line for each round."""
    print(f"\n{mode}, {route}, seed {seed}", flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="chat-history-failover-") as folder,
        PatroniCluster(is_synchronous=MODES[mode]) as cluster,
    ):
        return asyncio.run(
            fail_over(
                cluster,
                ROUTES[route],
                Path(folder),
                rounds=rounds,
                seed=seed,
                on_round=lambda completed: print(completed, flush=True),
            )
        )


def complaints(figures: Figures) -> list[str]:
    """Return what contradicts the promises."""
    texts = [f"{problem.kind}: {problem.words}" for problem in figures.defects]
    recovery_s = statistics.median(completed.recovered_s for completed in figures.rounds)
    if recovery_s > MAX_MEDIAN_RECOVERY_S:
        texts.append(f"SLOW: the median recovery took {recovery_s:.2f} s")
    texts += [
        f"HEALTH: wrong for {completed.wrong_health_s:.2f} s: {completed.kind}"
        for completed in figures.rounds
        if completed.wrong_health_s > MAX_WRONG_HEALTH_S
    ]
    return texts


def summary(figures: Figures) -> str:
    """Return the counts of one variant as a table in Markdown."""
    other = [problem for problem in figures.defects if problem.kind not in ("LOST", "DOUBLED")]
    errors = ", ".join(f"{name} {count}" for name, count in figures.errors.most_common())
    rows = {
        "messages acknowledged": figures.acknowledged,
        "views of readers checked": figures.views,
        "faults": len(figures.rounds),
        "lost": figures.count("LOST"),
        "duplicated": figures.count("DOUBLED"),
        "gaps": figures.count("GAP"),
        "other defects": len(other) - figures.count("GAP"),
        "failed calls": errors or "0",
    }
    lines = ["|  |  |", "| -- | -: |"]
    lines += [
        f"| {name} | {value:,} |" if isinstance(value, int) else f"| {name} | {value} |"
        for name, value in rows.items()
    ]
    return "\n".join(lines)


def report_of(figures: Figures) -> dict[str, Any]:
    """Return the figures of one variant for `report.json`."""
    return {
        "acknowledged": figures.acknowledged,
        "views": figures.views,
        "rounds": [completed._asdict() for completed in figures.rounds],
        "problems": [f"{problem.kind}: {problem.words}" for problem in figures.problems],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="faults of each variant")
    parser.add_argument("--seed", default="", help="repeats the order of an earlier run")
    parser.add_argument("--mode", choices=MODES, action="append", help="only this replication")
    parser.add_argument("--route", choices=ROUTES, action="append", help="only this route")
    arguments = parser.parse_args()
    seed = int(arguments.seed or random.SystemRandom().randrange(2**32))
    report: dict[str, Any] = {"seed": seed, "finished": ""}
    texts: list[str] = []
    with Cluster():
        pass  # Under root, its start creates the account that runs the nodes.
    for mode in arguments.mode or MODES:
        for route in arguments.route or ROUTES:
            figures = measure(mode, route, arguments.rounds, seed)
            print(f"\n{summary(figures)}\n\n{table(figures.rounds)}")
            texts += [f"{mode}, {route}: {text}" for text in complaints(figures)]
            report[f"{mode}, {route}"] = report_of(figures)
            report["finished"] = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
            RESULTS.mkdir(parents=True, exist_ok=True)
            (RESULTS / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    for text in texts[:20]:
        print(text)
    print(f"\n{len(texts)} complaints; report.json is in {RESULTS}")
    sys.exit(bool(texts))


if __name__ == "__main__":
    main()
