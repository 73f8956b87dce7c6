"""Draws the plots as SVG. The same results give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

from matplotlib.figure import Figure

_SERVICE, _ECHO, _OTHER = "#1f6feb", "#8b949e", "#bf8700"
_STYLE: Any = {
    "svg.hashsalt": "bench",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#d8dee4",
    "axes.axisbelow": True,
}


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the plots of the measured scenarios and return their paths."""
    written: list[Path] = []
    with mpl.rc_context(_STYLE):
        for name, scenarios, draw_plot in (
            ("shares", ("append", "reads"), _shares),
            ("latency", ("append", "reads"), _latency),
            ("growth", ("growth",), _growth),
        ):
            if all(scenario in results for scenario in scenarios):
                path = folder / f"{name}.svg"
                figure = draw_plot(results)
                figure.savefig(path, format="svg", metadata={"Date": None}, bbox_inches="tight")
                written.append(path)
    return written


def _methods(results: dict[str, Any]) -> dict[str, Sequence[dict[str, Any]]]:
    return {
        "AppendMessages": results["append"]["runs"],
        "GetContext(20)": results["reads"]["GetContext"]["runs"],
        "ListMessages(20)": results["reads"]["ListMessages"]["runs"],
    }


def _shares(results: dict[str, Any]) -> Figure:
    methods = _methods(results)
    rows = [
        (f"{method}, {run['in_flight']} in flight", run)
        for method, runs in methods.items()
        for run in runs
    ]
    figure = Figure(figsize=(8, 0.34 * len(rows) + 0.9))
    axes = figure.subplots()
    positions = range(len(rows), 0, -1)
    shares = [run["ratios"]["echo"]["calls_per_second"] for _, run in rows]
    axes.barh(positions, shares, color=_SERVICE, height=0.7)
    for position, share, (_, run) in zip(positions, shares, rows, strict=True):
        calls = run["medians"]["service"]["calls_per_second"]
        axes.text(share + 0.01, position, f"{share:.2f}   {calls:,.0f}/s", va="center")
    axes.axvline(1, color=_ECHO, linewidth=1.5)
    axes.set_yticks(list(positions), [label for label, _ in rows])
    axes.set_xlim(0, max(1.15, max(shares) + 0.25))
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("share of the calls/s of an echo that only builds the same reply")
    return figure


def _latency(results: dict[str, Any]) -> Figure:
    methods = _methods(results)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, len(methods), sharey=True)
    for axes, (method, runs) in zip(panels, methods.items(), strict=True):
        x = [run["in_flight"] for run in runs]
        for name, color in (("service", _SERVICE), ("echo", _ECHO)):
            for quantile, dashes in (("p50_us", "-"), ("p99_us", "--")):
                y = [run["medians"][name][quantile] / 1000 for run in runs]
                axes.plot(
                    x,
                    y,
                    dashes,
                    color=color,
                    marker="o",
                    markersize=4,
                    label=f"{name}, {quantile[:3]}",
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(x, [str(value) for value in x])
        axes.set_title(method, fontsize=10)
        axes.set_xlabel("calls in flight")
    panels[0].set_ylabel("milliseconds")
    panels[0].legend(frameon=False, fontsize=9)
    return figure


def _growth(results: dict[str, Any]) -> Figure:
    growth = results["growth"]
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for method, color in (
        ("AppendMessages", _SERVICE),
        ("GetContext", _OTHER),
        ("ListMessages", _ECHO),
    ):
        y = [growth[method]["medians"][str(stored)]["p50_us"] / 1000 for stored in growth["stored"]]
        axes.plot(growth["stored"], y, color=color, marker="o", label=method)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("messages stored")
    axes.set_ylabel("p50, milliseconds")
    axes.legend(frameon=False)
    return figure
