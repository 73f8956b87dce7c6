"""Builds the tables of the scenarios from results.json."""

from __future__ import annotations

from typing import Any

from benchmarks.table import Table

_ECHO_COLUMNS = (
    "in flight",
    "calls/s",
    "echo",
    "share",
    "p50 ms",
    "echo",
    "p99 ms",
    "echo",
    "CPU µs",
    "echo",
    "ratio",
    "PostgreSQL µs",
)
_CPU_NOTE = (
    "CPU µs: processor time per call of the serving process. PostgreSQL µs: that of all PostgreSQL "
    "processes."
)


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


def _append(measured: dict[str, Any]) -> list[Table]:
    tables = [
        Table(
            "AppendMessages, one message of 300 bytes per call",
            _ECHO_COLUMNS,
            [_compared_with_echo(run) for run in measured["runs"]],
            f"{_CPU_NOTE} {_rows_note(measured['rows'])}",
            "shares",
        )
    ]
    for run in measured["runs"]:
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
                *(_number(figures["cpu_us_per_call"]) for figures in (ours, direct)),
                f"{ratios['cpu_us_per_call']:.2f}",
            ],
        ]
        columns = ("", "service", "asyncpg", "ratio")
        tables.append(
            Table(
                "One append at a time, compared with the same statement by asyncpg", columns, rows
            )
        )
    return tables


def _append_many(measured: dict[str, Any]) -> list[Table]:
    [run] = measured["runs"]
    ours = run["medians"]["service"]
    messages = measured["messages_per_call"]
    row = [
        str(run["in_flight"]),
        f"**{_number(measured['messages_per_second'])}**",
        _number(ours["calls_per_second"]),
        f"{run['ratios']['echo']['calls_per_second']:.2f}",
        _ms(ours["p50_us"]),
        _ms(ours["p99_us"]),
        _number(ours["cpu_us_per_call"] / messages),
        _number(ours["postgres_us_per_call"] / messages),
    ]
    columns = (
        "in flight",
        "messages/s",
        "calls/s",
        "share of the echo",
        "p50 ms",
        "p99 ms",
        "CPU µs per message",
        "PostgreSQL µs per message",
    )
    return [
        Table(
            f"AppendMessages, {messages} messages per call",
            columns,
            [row],
            _rows_note(measured["rows"]),
        )
    ]


def _reads(measured: dict[str, Any]) -> list[Table]:
    return [
        Table(
            f"{method} of 20 messages of 250 bytes",
            _ECHO_COLUMNS,
            [_compared_with_echo(run) for run in measured[method]["runs"]],
            plot="latency" if method == "ListMessages" else "",
        )
        for method in ("GetContext", "ListMessages")
    ]


def _contention(measured: dict[str, Any]) -> list[Table]:
    [run] = measured["runs"]
    rows = [
        [name, _number(figures["calls_per_second"]), _ms(figures["p50_us"]), _ms(figures["p99_us"])]
        for name, figures in run["medians"].items()
    ]
    columns = (f"{run['in_flight']} writers on", "appends/s", "p50 ms", "p99 ms")
    return [Table("Contention", columns, rows, _rows_note(measured["rows"]))]


def _pooler(measured: dict[str, Any]) -> list[Table]:
    title = "AppendMessages through PgBouncer in transaction mode, compared with no PgBouncer"
    if "skipped" in measured:
        return [Table(title, ("not measured",), [[measured["skipped"]]])]
    rows = []
    for run in measured["runs"]:
        pooled, direct = (run["medians"][name] for name in ("pooled", "direct"))
        row = [str(run["in_flight"])]
        row += [_number(figures["calls_per_second"]) for figures in (pooled, direct)]
        row.append(_bold(run["ratios"]["direct"]["calls_per_second"]))
        row += [_ms(figures[name]) for name in ("p50_us", "p99_us") for figures in (pooled, direct)]
        rows.append(row)
    columns = ("in flight", "calls/s", "direct", "share", "p50 ms", "direct", "p99 ms", "direct")
    return [Table(title, columns, rows, _rows_note(measured["rows"]))]


def _growth(measured: dict[str, Any]) -> list[Table]:
    methods = ("AppendMessages", "GetContext", "ListMessages")
    rows = [
        [
            _number(stored),
            *(_ms(measured[method]["medians"][str(stored)]["p50_us"]) for method in methods),
        ]
        for stored in measured["stored"]
    ]
    fewest = str(measured["stored"][0])
    rows.append(
        [
            "largest / smallest",
            *(_bold(measured[method]["ratios"][fewest]["p50_us"]) for method in methods),
        ]
    )
    columns = ("messages stored", *(f"{method}, p50 ms" for method in methods))
    return [Table("Growth of the history: one call at a time", columns, rows, plot="growth")]


def _long_session(measured: dict[str, Any]) -> list[Table]:
    pages, memory = measured["pages"], measured["memory"]
    # The stored ratios are those of the end to the other positions.
    to_start, to_middle = (pages["ratios"][position]["p50_us"] for position in ("start", "middle"))
    ratios = {"start": 1.0, "middle": to_start / to_middle, "end": to_start}
    rows = [
        [position, _ms(pages["medians"][position]["p50_us"]), _bold(ratio)]
        for position, ratio in ratios.items()
    ]
    steps = ("appends", "context reads", "appends again", "context reads again")
    resident = [
        ["idle", _mb(memory["idle"])],
        *([f"after {step}", _mb(after)] for step, after in zip(steps, memory["load"], strict=True)),
        ["peak under load", _mb(memory["load_peak"])],
        [
            f"peak while a client pages through {_number(measured['messages'])} messages",
            _mb(memory["paging_peak"]),
        ],
    ]
    context = _ms(measured["context"]["medians"]["context"]["p50_us"])
    size = _number(measured["messages"])
    return [
        Table(
            f"Pages of 20 messages in a session of {size}, one call at a time",
            ("page at the", "p50 ms", "ratio to the first"),
            rows,
            f"GetContext of 20 messages of the same session: p50 {context} ms.",
        ),
        Table("Resident memory of the serving process", ("", "MB"), resident),
    ]


def _baseline(measured: dict[str, Any]) -> list[Table]:
    rows = []
    for method, label in (
        ("AppendMessages", "append a message"),
        ("ListMessages", "list 20 messages"),
    ):
        run = measured[method]
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
        "64 in flight",
        "calls/s",
        "FastAPI + ORM",
        "ratio",
        "p50 ms",
        "FastAPI + ORM",
        "p99 ms",
        "FastAPI + ORM",
        "CPU µs",
        "FastAPI + ORM",
    )
    return [
        Table(
            "Compared with a backend of FastAPI and SQLAlchemy's ORM",
            columns,
            rows,
        )
    ]


def _variants(measured: dict[str, Any]) -> list[Table]:
    rows = []
    for name, methods in measured["variants"].items():
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
        "default",
        "ratio",
        "p50 ms",
        "p99 ms",
        "CPU µs",
        "default",
        "ratio",
    )
    return [Table("Other configurations, compared with the service as above", columns, rows)]


def _pipeline(measured: dict[str, Any]) -> list[Table]:
    [run] = measured["runs"]
    pipeline_echo, echo = run["medians"]["pipeline_echo"], run["medians"]["echo"]
    rows = [
        [name, f"{cost:.1f}", f"{cost / echo['cpu_us_per_call']:.1%}"]
        for name, cost in measured["layers"].items()
    ]
    added_us = pipeline_echo["cpu_us_per_call"] - echo["cpu_us_per_call"]
    rows.append(
        [
            "echo behind the whole pipeline, over the wire",
            f"{added_us:.1f}",
            f"{added_us / echo['cpu_us_per_call']:.1%}",
        ]
    )
    return [
        Table(
            "Cost of the pipeline (telemetry is off by default)",
            ("layer", "CPU µs per call", "share of the echo"),
            rows,
        )
    ]


def _search(measured: dict[str, Any]) -> list[Table]:
    figures = [*_document_figures(measured["documents"]), *_recall_figures(measured["recall"])]
    chunks = _number(measured["documents"]["other_users_chunks"])
    note = f"The index also contains {chunks} chunks of other users."
    return [
        _indexed_appends(measured["appends"]),
        Table("Search in the embedded default", ("", "figure"), figures, note),
    ]


def _indexed_appends(appends: dict[str, Any]) -> Table:
    medians, ratios = appends["run"]["medians"], appends["run"]["ratios"]["plain"]
    rows = [
        [
            label,
            _number(medians[name]["calls_per_second"]),
            _bold(ratios["calls_per_second"]) if name == "indexed" else "",
            *(_number(medians[name][f"{process}_us_per_call"]) for process in ("cpu", "postgres")),
            _number(child_us),
            _number(medians[name]["load_generator_us_per_call"]),
        ]
        for name, label, child_us in (
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
        f"{appends['indexed_during_load']:.0%} of the messages were indexed during the load, the "
        f"rest within {appends['seconds_to_catch_up']:.1f} s afterwards. µs: CPU time per append, "
        f"by process. {_rows_note(appends['rows'])}"
    )
    title = "AppendMessages with message indexing, compared with search off"
    return Table(title, columns, rows, note)


def _document_figures(documents: dict[str, Any]) -> list[list[str]]:
    p99, ratio = documents["context_p99_us"], documents["context_p99_ratio"]
    return [
        ["documents of 20 chunks indexed per second", f"{documents['documents_per_second']:.0f}"],
        [
            "chunks of 800 characters indexed per second",
            _number(documents["chunks_per_second"]),
        ],
        *(
            [f"SearchDocuments p50 ms, {_number(int(size))} own chunks", f"{p50:.1f}"]
            for size, p50 in documents["search_p50_ms"].items()
        ),
        [
            "GetContext p99 ms, at rest / while 1,000 chunks are indexed (ratio)",
            f"{_ms(p99['quiet'])} / {_ms(p99['indexing'])} (**{ratio:.2f}**)",
        ],
        [
            "slowest health check while chunks are indexed, ms",
            f"{documents['health_worst_ms']:.0f}",
        ],
        [
            "resident memory in MB, service / search process",
            " / ".join(_mb(documents["memory"][name]) for name in ("server", "child")),
        ],
    ]


def _recall_figures(recall: dict[str, Any]) -> list[list[str]]:
    rows = []
    for kind, name in (("short sections", "short"), ("long, similar sections", "long")):
        figures = recall[name]
        size = f"{figures['questions']:.0f} questions on {figures['sections']:.0f} {kind}"
        label = f"right section first / among the first five, {size}"
        rows.append([label, f"{figures['first']:.2f} / {figures['recall_at_5']:.2f}"])
    return rows


def _rows_note(rows: dict[str, Any]) -> str:
    hot = rows["hot_updates"] / max(rows["session_updates"], 1)
    return (
        f"{_number(rows['acknowledged'])} messages acknowledged, {_number(rows['stored'])} rows "
        f"stored, no session with a gap. {hot:.1%} of {_number(rows['session_updates'])} updates "
        "of `chat_sessions` were heap-only."
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


def tables(results: dict[str, Any]) -> list[Table]:
    """Return the tables of the measured scenarios."""
    return [
        table
        for name, scenario_tables in _TABLES.items()
        if name in results
        for table in scenario_tables(results[name])
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}"


def _bold(ratio: float) -> str:
    return f"**{ratio:.2f}**"


def _ms(us: float) -> str:
    return f"{us / 1000:.2f}" if us < 10_000 else f"{us / 1000:.0f}"  # noqa: PLR2004 - three digits are enough


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.0f}"
