"""Tables of the results: for the terminal, and for docs/explanation/performance.md between its markers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable

from benchmarks import plots
from benchmarks.environment import ROOT
from benchmarks.load_generator import BenchError

COMMITTED_DIR = ROOT / "docs" / "bench"
PAGE = ROOT / "docs" / "explanation" / "performance.md"
_BEGIN, _END = "<!-- bench:begin, written by `make bench` -->", "<!-- bench:end -->"

Results = dict[str, Any]
"""What the file of results holds."""


@dataclass(frozen=True)
class Table:
    """A table, its first column being what the rows are about."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    plot: str = ""
    """Name of the plot that shows it."""

    def rich(self) -> RichTable:
        """Return it for the terminal."""
        made = RichTable(
            title=self.title,
            title_justify="left",
            caption=self.note or None,
            caption_justify="left",
        )
        for n, column in enumerate(self.columns):
            made.add_column(column, justify="right" if n else "left")
        for row in self.rows:
            made.add_row(*(re.sub(r"\*\*(.*)\*\*", r"[bold]\1[/]", cell) for cell in row))
        return made

    def markdown(self) -> str:
        """Return it for a page."""
        lines = [
            _line(self.columns),
            _line(["---", *["---:"] * (len(self.columns) - 1)]),
            *map(_line, self.rows),
        ]
        parts = [f"### {self.title}", "\n".join(lines)]
        if self.note:
            parts.append(self.note)
        if self.plot:
            parts.append(f"![{self.title}](../bench/{self.plot}.svg)")
        return "\n\n".join(parts)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write(results: Results, folder: Path) -> list[Path]:
    """Write results.json, tables.md and the plots into a folder; the committed ones also into the page.

    Raises:
        BenchError: the page has lost its markers.
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
        raise BenchError(f"{PAGE} must hold the lines {_BEGIN} and {_END}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def markdown(results: Results) -> str:
    """Return what was measured with, and all tables."""
    return "\n\n".join(
        [_environment_line(results), *(table.markdown() for table in tables(results))]
    )


def _environment_line(results: Results) -> str:
    made, plan = results["made"], results["plan"]
    packages = ", ".join(f"{name} {number}" for name, number in made["packages"].items())
    return (
        f"Made {made['at']} at commit {made['commit']}: {made['processor']}, {made['cores']} cores, {made['memory_gib']} GiB, "
        f"{made['system']}; Python {made['python']}, PostgreSQL {made['postgresql']}, {packages}. Other processes used "
        f"{made['busy_before_percent']}% of the machine at the start. Medians of {plan['rounds']} alternations."
    )


def tables(results: Results) -> list[Table]:
    """Make the tables of what was measured."""
    made: list[Table] = []
    for name, make in _TABLES.items():
        if name in results:
            made += make(results[name])
    return made


_ECHO_COLUMNS = (
    "in flight", "calls/s", "echo's", "share", "p50 ms", "echo's", "p99 ms", "echo's", "CPU µs", "echo's", "ratio", "PostgreSQL µs",
)  # fmt: skip
_CPU_NOTE = "CPU: processor time of the serving process, and of all of PostgreSQL's, a call."


def _compared_with_echo(run: dict[str, Any]) -> list[str]:
    ours, echo, ratios = run["medians"]["service"], run["medians"]["echo"], run["ratios"]["echo"]
    return [
        str(run["in_flight"]),
        _number(ours["calls_per_second"]),
        _number(echo["calls_per_second"]),
        _bold(ratios["calls_per_second"]),
        _ms(ours["p50_us"]),
        _ms(echo["p50_us"]),
        _ms(ours["p99_us"]),
        _ms(echo["p99_us"]),
        _number(ours["cpu_us_per_call"]),
        _number(echo["cpu_us_per_call"]),
        f"{ratios['cpu_us_per_call']:.2f}",
        _number(ours["postgres_us_per_call"]),
    ]


def _append(found: dict[str, Any]) -> list[Table]:
    made = [
        Table(
            "AppendMessages, one message of 300 bytes a call",
            _ECHO_COLUMNS,
            [_compared_with_echo(run) for run in found["runs"]],
            f"{_CPU_NOTE} {_rows_note(found['rows'])}",
            "shares",
        )
    ]
    for run in found["runs"]:
        if "direct" not in run["ratios"]:
            continue
        ours, direct, ratios = (
            run["medians"]["service"],
            run["medians"]["direct"],
            run["ratios"]["direct"],
        )
        rows = [
            ["p50 ms", _ms(ours["p50_us"]), _ms(direct["p50_us"]), _bold(ratios["p50_us"])],
            ["p99 ms", _ms(ours["p99_us"]), _ms(direct["p99_us"]), f"{ratios['p99_us']:.2f}"],
            [
                "CPU µs",
                *(_number(of["cpu_us_per_call"]) for of in (ours, direct)),
                f"{ratios['cpu_us_per_call']:.2f}",
            ],
        ]
        columns = ("", "service", "asyncpg", "ratio")
        made.append(
            Table(
                "One append at a time, beside the same statement by asyncpg directly", columns, rows
            )
        )
    return made


def _append_many(found: dict[str, Any]) -> list[Table]:
    [run] = found["runs"]
    ours = run["medians"]["service"]
    messages = found["messages_per_call"]
    row = [
        str(run["in_flight"]),
        f"**{_number(found['messages_per_second'])}**",
        _number(ours["calls_per_second"]),
        f"{run['ratios']['echo']['calls_per_second']:.2f}",
        _ms(ours["p50_us"]),
        _ms(ours["p99_us"]),
        _number(ours["cpu_us_per_call"] / messages),
        _number(ours["postgres_us_per_call"] / messages),
    ]
    columns = (
        "in flight", "messages/s", "calls/s", "share of the echo", "p50 ms", "p99 ms", "CPU µs a message", "PostgreSQL µs a message",
    )  # fmt: skip
    return [
        Table(
            f"AppendMessages, {messages} messages a call", columns, [row], _rows_note(found["rows"])
        )
    ]


def _reads(found: dict[str, Any]) -> list[Table]:
    return [
        Table(
            f"{method} of 20 messages of 250 bytes",
            _ECHO_COLUMNS,
            [_compared_with_echo(run) for run in found[method]["runs"]],
            plot="latency" if method == "ListMessages" else "",
        )
        for method in ("GetContext", "ListMessages")
    ]


def _contention(found: dict[str, Any]) -> list[Table]:
    [run] = found["runs"]
    rows = [
        [name, _number(figures["calls_per_second"]), _ms(figures["p50_us"]), _ms(figures["p99_us"])]
        for name, figures in run["medians"].items()
    ]
    columns = (f"{run['in_flight']} writers on", "appends/s", "p50 ms", "p99 ms")
    return [Table("Contention", columns, rows, _rows_note(found["rows"]))]


def _pooler(found: dict[str, Any]) -> list[Table]:
    title = "AppendMessages through PgBouncer, transaction mode, beside the direct way"
    if "skipped" in found:
        return [Table(title, ("not measured",), [[found["skipped"]]])]
    rows = []
    for run in found["runs"]:
        one, other = (run["medians"][name] for name in ("pooled", "direct"))
        row = [str(run["in_flight"])]
        row += [_number(each["calls_per_second"]) for each in (one, other)]
        row.append(_bold(run["ratios"]["direct"]["calls_per_second"]))
        row += [_ms(each[what]) for what in ("p50_us", "p99_us") for each in (one, other)]
        rows.append(row)
    columns = ("in flight", "calls/s", "direct", "share", "p50 ms", "direct", "p99 ms", "direct")
    return [Table(title, columns, rows, _rows_note(found["rows"]))]


def _growth(found: dict[str, Any]) -> list[Table]:
    methods = ("AppendMessages", "GetContext", "ListMessages")
    rows = [
        [
            _number(stored),
            *(_ms(found[method]["medians"][str(stored)]["p50_us"]) for method in methods),
        ]
        for stored in found["stored"]
    ]
    fewest = str(found["stored"][0])
    rows.append(
        [
            "most by fewest",
            *(_bold(found[method]["ratios"][fewest]["p50_us"]) for method in methods),
        ]
    )
    columns = ("messages stored", *(f"{method}, p50 ms" for method in methods))
    return [Table("As the history grows: one call at a time", columns, rows, plot="growth")]


def _long_session(found: dict[str, Any]) -> list[Table]:
    pages, memory = found["pages"], found["memory"]
    # The end is what the ratios are of.
    to_start, to_middle = (pages["ratios"][place]["p50_us"] for place in ("start", "middle"))
    ratios = {"start": 1.0, "middle": to_start / to_middle, "end": to_start}
    rows = [
        [place, _ms(pages["medians"][place]["p50_us"]), _bold(ratio)]
        for place, ratio in ratios.items()
    ]
    steps = ("appends", "context reads", "appends again", "context reads again")
    resident = [
        ["idle", _mb(memory["idle"])],
        *([f"after {step}", _mb(after)] for step, after in zip(steps, memory["load"], strict=True)),
        ["most under load", _mb(memory["load_peak"])],
        [
            f"most while a client reads {_number(found['messages'])} messages by pages",
            _mb(memory["paging_peak"]),
        ],
    ]
    context = _ms(found["context"]["medians"]["context"]["p50_us"])
    return [
        Table(
            f"Pages of 20 in one session of {_number(found['messages'])} messages, one call at a time",
            ("page at the", "p50 ms", "by the first"),
            rows,
            f"GetContext of 20 messages of the same session: p50 {context} ms.",
        ),
        Table("Resident memory of the serving process", ("", "MB"), resident),
    ]


def _baseline(found: dict[str, Any]) -> list[Table]:
    rows = []
    for method, label in (
        ("AppendMessages", "append a message"),
        ("ListMessages", "list 20 messages"),
    ):
        run = found[method]
        ours, plain, ratios = (
            run["medians"]["service"],
            run["medians"]["baseline"],
            run["ratios"]["baseline"],
        )
        rows.append(
            [
                label,
                _number(ours["calls_per_second"]),
                _number(plain["calls_per_second"]),
                _bold(ratios["calls_per_second"]),
                _ms(ours["p50_us"]),
                _ms(plain["p50_us"]),
                _ms(ours["p99_us"]),
                _ms(plain["p99_us"]),
                _number(ours["cpu_us_per_call"]),
                _number(plain["cpu_us_per_call"]),
            ]
        )
    columns = (
        "64 in flight", "calls/s", "FastAPI + ORM", "ratio", "p50 ms", "FastAPI's", "p99 ms", "FastAPI's", "CPU µs", "FastAPI's",
    )  # fmt: skip
    return [
        Table(
            "Beside what one would write without the service: FastAPI and SQLAlchemy's ORM",
            columns,
            rows,
        )
    ]


def _variants(found: dict[str, Any]) -> list[Table]:
    rows = []
    for name, methods in found["variants"].items():
        for method in ("AppendMessages", "GetContext", "ListMessages"):
            run = methods[method]
            ours, plain, ratios = (
                run["medians"]["variant"],
                run["medians"]["service"],
                run["ratios"]["service"],
            )
            rows.append(
                [
                    f"{name}: {method}",
                    _number(ours["calls_per_second"]),
                    _number(plain["calls_per_second"]),
                    _bold(ratios["calls_per_second"]),
                    _ms(ours["p50_us"]),
                    _ms(ours["p99_us"]),
                    _number(ours["cpu_us_per_call"]),
                    _number(plain["cpu_us_per_call"]),
                    f"{ratios['cpu_us_per_call']:.2f}",
                ]
            )
    columns = (
        "64 in flight",
        "calls/s",
        "without",
        "ratio",
        "p50 ms",
        "p99 ms",
        "CPU µs",
        "without",
        "ratio",
    )
    return [Table("Configured otherwise, beside the service as above", columns, rows)]


def _pipeline(found: dict[str, Any]) -> list[Table]:
    [run] = found["runs"]
    behind, echo = run["medians"]["behind"], run["medians"]["echo"]
    rows = [
        [name, f"{cost:.1f}", f"{cost / echo['cpu_us_per_call']:.1%}"]
        for name, cost in found["layers"].items()
    ]
    more = behind["cpu_us_per_call"] - echo["cpu_us_per_call"]
    rows.append(
        [
            "the echo behind all of it, over the wire",
            f"{more:.1f}",
            f"{more / echo['cpu_us_per_call']:.1%}",
        ]
    )
    return [
        Table(
            "What every call passes (telemetry is off unless asked for)",
            ("layer", "CPU µs a call", "of the echo's"),
            rows,
        )
    ]


def _search(found: dict[str, Any]) -> list[Table]:
    appends, documents, recall = found["appends"], found["documents"], found["recall"]
    medians, ratios = appends["run"]["medians"], appends["run"]["ratios"]["plain"]
    rows = [
        [
            label,
            _number(medians[name]["calls_per_second"]),
            _bold(ratios["calls_per_second"]) if name == "indexed" else "",
            *(_number(medians[name][f"{process}_us_per_call"]) for process in ("cpu", "postgres")),
            _number(child),
            _number(medians[name]["load_generator_us_per_call"]),
        ]
        for name, label, child in (
            ("indexed", "messages indexed", appends["child_us_per_append"]),
            ("plain", "search off", 0),
        )
    ]
    columns = (
        "64 in flight",
        "calls/s",
        "share",
        "service µs",
        "PostgreSQL µs",
        "search process µs",
        "load generator µs",
    )
    note = (
        f"{appends['indexed_meanwhile']:.0%} of the messages were indexed while they came, the rest within "
        f"{appends['seconds_to_catch_up']:.1f} s after. µs: processor time an append, by process. {_rows_note(appends['rows'])}"
    )
    p99 = documents["context_p99_us"]
    figures = [
        ["documents of 20 chunks indexed a second", f"{documents['documents_per_second']:.0f}"],
        ["chunks of 800 characters indexed a second", _number(documents["chunks_per_second"])],
        *(
            [f"SearchDocuments p50 ms, {_number(int(size))} own chunks", f"{p50:.1f}"]
            for size, p50 in documents["search_p50_ms"].items()
        ),
        [
            "GetContext p99 ms, quiet / while 1,000 chunks are indexed",
            f"{_ms(p99['quiet'])} / {_ms(p99['indexing'])}: **{documents['context_p99_ratio']:.2f}**",
        ],
        ["health ms meanwhile, the slowest", f"{documents['health_worst_ms']:.0f}"],
        *(
            [
                f"right section first / among the first five: {each['questions']:.0f} questions on {each['sections']:.0f} {kind}",
                f"{each['first']:.2f} / {each['recall_at_5']:.2f}",
            ]
            for kind, each in (
                ("short sections", recall["short"]),
                ("long ones, alike", recall["long"]),
            )
        ),
        [
            "MB resident, service / search process",
            " / ".join(_mb(documents["memory"][name]) for name in ("server", "child")),
        ],
    ]
    others = f"Beside the user's own chunks the index holds {_number(documents['others_chunks'])} of others."
    return [
        Table("AppendMessages with messages indexed, beside search off", columns, rows, note),
        Table("Search, in the embedded default", ("", "figure"), figures, others),
    ]


def _rows_note(rows: dict[str, Any]) -> str:
    hot = rows["hot_updates"] / max(rows["session_updates"], 1)
    return (
        f"{_number(rows['acknowledged'])} messages acknowledged, {_number(rows['stored'])} rows stored, no session with a gap; "
        f"{hot:.1%} of {_number(rows['session_updates'])} updates of `chat_sessions` heap-only."
    )


_TABLES = {
    "append": _append,
    "pipeline": _pipeline,
    "append_many": _append_many,
    "reads": _reads,
    "contention": _contention,
    "pooler": _pooler,
    "growth": _growth,
    "long_session": _long_session,
    "baseline": _baseline,
    "variants": _variants,
    "search": _search,
}


def _number(value: float) -> str:
    return f"{value:,.0f}"


def _bold(ratio: float) -> str:
    return f"**{ratio:.2f}**"


def _ms(us: float) -> str:
    return f"{us / 1000:.2f}" if us < 10_000 else f"{us / 1000:.0f}"  # noqa: PLR2004 - three digits are enough


def _mb(size: float) -> str:
    return f"{size / 1e6:.0f}"
