"""Writes the results of a run: results.json, plots, and tables in Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.environment import ROOT
from benchmarks.load_generator import BenchError
from benchmarks.scenario_tables import tables
from benchmarks.table import wrap

COMMITTED_DIR = ROOT / "docs" / "bench"
PAGE = ROOT / "docs" / "explanation" / "performance.md"
_BEGIN, _END = "<!-- bench:begin, written by `make bench` -->", "<!-- bench:end -->"

Results = dict[str, Any]
"""The contents of results.json: the environment, the plan, and the scenarios by name."""


def write(results: Results, folder: Path) -> list[Path]:
    """Write results.json, the plots and the tables into a folder.

    The tables of the committed folder go into the documentation page, others into tables.md.

    Raises:
        BenchError: the page does not have the markers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "results.json"
    data.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    written = [data, *plots.draw(results, folder)]
    text = markdown(results)
    if folder == COMMITTED_DIR:
        PAGE.write_text(_between_markers(PAGE.read_text(), text))
        return [*written, PAGE]
    tables_file = folder / "tables.md"
    tables_file.write_text(text + "\n")
    return [*written, tables_file]


def _between_markers(page: str, text: str) -> str:
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise BenchError(f"{PAGE} must contain the lines {_BEGIN} and {_END}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def markdown(results: Results) -> str:
    """Return a description of the environment, and all tables."""
    return "\n\n".join(
        [_environment_line(results), *(table.markdown() for table in tables(results))]
    )


def _environment_line(results: Results) -> str:
    environment, plan = results["environment"], results["plan"]
    packages = ", ".join(f"{name} {number}" for name, number in environment["packages"].items())
    return wrap(
        f"Measured {environment['at']} at commit {environment['commit']}. "
        f"Machine: {environment['processor']}, {environment['cores']} cores, "
        f"{environment['memory_gib']} GiB, {environment['system']}. "
        f"Versions: Python {environment['python']}, PostgreSQL {environment['postgresql']}, "
        f"{packages}. Other processes used {environment['busy_before_percent']}% of the CPU at the "
        f"start. The figures are medians of {plan['rounds']} rounds."
    )
