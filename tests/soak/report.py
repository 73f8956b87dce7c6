"""The report of a soak: printed tables, and the files `report.json` and `memory.svg`."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from tests.soak.tally import Outage, Sample, Tally, growth

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 60


def show(tally: Tally, console: Console) -> None:
    """Print the tally, the recoveries and the memory curves."""
    console.print(_counts(tally))
    console.print(_outages(tally.outages))
    console.print(_errors("Errors that clients saw, by code and reason", tally.errors))
    if tally.library_errors:
        console.print(_errors("Errors that users of the client library saw", tally.library_errors))
    for name, samples in by_replica(tally).items():
        levels = [sample.mib for sample in samples]
        if levels:
            console.print(
                f"memory of the {name} replica, {min(levels):.0f} to {max(levels):.0f} MiB: "
                f"{_sparkline(levels)}"
            )
            rest = [f"{sample.mib:.1f}" for sample in samples if sample.at_rest]
            growth_mib = growth(samples)
            console.print(
                f"  at rest after each round: {' '.join(rest)} MiB"
                + ("" if growth_mib is None else f"; growth {growth_mib:+.1f}")
            )
            descriptors = [str(sample.descriptors) for sample in samples if sample.at_rest]
            console.print(f"  open file descriptors, the same: {' '.join(descriptors)}")
    for problem in tally.problems[:20]:
        console.print(f"{problem.kind}: {problem.words[:2000]}", style="red", markup=False)
    if len(tally.problems) > 20:
        console.print(f"and {len(tally.problems) - 20} more problems", style="red")


def _counts(tally: Tally) -> Table:
    table = Table(title="Tally", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows: dict[str, Any] = {
        "seconds": round(tally.seconds),
        "calls": tally.calls.total(),
        "messages acknowledged": tally.acknowledged,
        "of them sent again later and recognised": tally.replays,
        "appends abandoned without a reply": tally.abandoned,
        "calls cancelled": tally.cancelled,
        "calls that failed": tally.failed,
        "calls of the client library": tally.library_calls,
        "of them failed": tally.library_errors.total(),
        "faults": len(tally.outages),
        "kinds of faults": len({outage.kind for outage in tally.outages}),
        "stored messages checked": tally.checked,
        "views checked": tally.views,
        "documents found indexed": tally.documents,
        "lost": tally.count_problems("LOST"),
        "doubled": tally.count_problems("DOUBLED"),
        "gaps": tally.count_problems("GAP"),
        "other problems": len(tally.problems) - tally.count_problems("LOST", "DOUBLED", "GAP"),
    }
    if tally.idle_statements is not None:
        rows |= {
            "probes of an idle service": tally.probes,
            "statements that it sent": tally.idle_statements,
        }
    for name, value in rows.items():
        table.add_row(name, f"{value:,}")
    return table


def _outages(outages: list[Outage]) -> Table:
    table = Table(
        title="Faults, and seconds from their end to the next append that every affected replica "
        "acknowledged (after faults of search: to the next search)"
    )
    table.add_column("fault")
    for name in ("times", "median s", "max s", "longest fault s", "failed calls, median", "max"):
        table.add_column(name, justify="right")
    for kind, group in groupby(
        sorted(outages, key=lambda outage: outage.kind), key=lambda outage: outage.kind
    ):
        row = figures(list(group))
        table.add_row(
            kind,
            str(row["times"]),
            f"{row['median_s']:.2f}",
            f"{row['max_s']:.2f}",
            f"{row['longest_s']:.1f}",
            f"{row['errors_median']:.0f}",
            str(row["errors_max"]),
        )
    return table


def figures(outages: list[Outage]) -> dict[str, Any]:
    """Return the figures of one kind of fault."""
    times = [outage.recovery for outage in outages if outage.recovery is not None] or [float("inf")]
    errors = [outage.errors for outage in outages]
    return {
        "times": len(outages),
        "median_s": statistics.median(times),
        "max_s": max(times),
        "longest_s": max(outage.ended - outage.began for outage in outages),
        "errors_median": statistics.median(errors),
        "errors_max": max(errors),
    }


def _errors(title: str, errors: Counter[tuple[str, str]]) -> Table:
    table = Table(title=title)
    table.add_column("code")
    table.add_column("reason")
    table.add_column("calls", justify="right")
    for (code, reason), count in errors.most_common():
        table.add_row(code, reason, f"{count:,}")
    return table


def by_replica(tally: Tally) -> dict[str, list[Sample]]:
    """Return the samples of each replica."""
    names = dict.fromkeys(sample.replica for sample in tally.samples)
    return {name: [sample for sample in tally.samples if sample.replica == name] for name in names}


def _sparkline(levels: list[float]) -> str:
    step = max(1.0, len(levels) / _WIDTH)
    picked = [levels[int(n * step)] for n in range(min(_WIDTH, len(levels)))]
    low, high = min(0.8 * max(picked), *picked), max(picked)
    return "".join(
        _BARS[round((level - low) / (high - low) * (len(_BARS) - 1))] for level in picked
    )


def save(tally: Tally, folder: Path, **about: Any) -> None:
    """Write the report and the memory curves into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {outage.kind for outage in tally.outages}
    report = about | {
        "seconds": round(tally.seconds),
        "calls": dict(tally.calls),
        "acknowledged": tally.acknowledged,
        "replays": tally.replays,
        "abandoned": tally.abandoned,
        "cancelled": tally.cancelled,
        "checked": tally.checked,
        "views": tally.views,
        "documents": tally.documents,
        "errors": {" ".join(key): count for key, count in tally.errors.most_common()},
        "library": {
            "calls": tally.library_calls,
            "errors": {" ".join(key): count for key, count in tally.library_errors.items()},
        },
        "faults": {
            kind: figures([outage for outage in tally.outages if outage.kind == kind])
            for kind in sorted(kinds)
        },
        "idle_statements": tally.idle_statements,
        "probes": tally.probes,
        "problems": [" ".join(problem) for problem in tally.problems],
        "memory": {
            name: [
                [
                    round(sample.seconds, 1),
                    round(sample.mib, 1),
                    sample.acknowledged,
                    sample.at_rest,
                    sample.descriptors,
                ]
                for sample in samples
            ]
            for name, samples in by_replica(tally).items()
        },
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    _draw(tally).savefig(
        folder / "memory.svg", format="svg", metadata={"Date": None}, bbox_inches="tight"
    )


def _draw(tally: Tally) -> Figure:
    with mpl.rc_context({"svg.hashsalt": "soak", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(8, 3))
        axes = figure.subplots()
        for (name, samples), colour in zip(
            by_replica(tally).items(), ("#bf8700", "#1f6feb"), strict=False
        ):
            # One line per process: a replica that was killed starts again with low memory.
            for number, pid in enumerate(dict.fromkeys(sample.pid for sample in samples)):
                own = [sample for sample in samples if sample.pid == pid]
                label = f"{name} replica" if number == 0 else None
                axes.plot(
                    [sample.seconds / 60 for sample in own],
                    [sample.mib for sample in own],
                    color=colour,
                    label=label,
                )
            rest = [sample for sample in samples if sample.at_rest]
            axes.plot(
                [sample.seconds / 60 for sample in rest],
                [sample.mib for sample in rest],
                "o",
                color=colour,
            )
        axes.set(
            xlabel="minutes",
            ylabel="MiB resident",
            ylim=(0, None),
            title="Memory; dots: at rest after a round",
        )
        axes.legend(loc="lower right")
    return figure
