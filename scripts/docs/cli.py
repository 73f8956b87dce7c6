"""Generates docs/reference/cli.md from the typer application in service/cli/."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperArgument

from scripts.docs.page import formatted, table
from service import cli

NAME = "cli.md"
HEAD = """# Command line

<!-- Generated from service/cli/ by `make format`: do not edit. -->

The distribution `chathistory-service` installs the command `chat-history`; `python -m service`
is the same command. Every command reads the [configuration](configuration.md) from environment
variables and a `.env` file. Messages for the operator go to standard error, results to standard
output.

## Exit codes

"""

EXIT_CODES = {
    "0": "The command succeeded. `serve` also exits with 0 after SIGINT or SIGTERM.",
    "1": "The command failed, or `check` found something to do. The output names it.",
    "2": "The configuration is malformed, or the arguments of the command are wrong.",
    "130": "The command was interrupted by SIGINT, SIGTERM or a closed terminal (`serve`: 0).",
}

COMMANDS = {
    "serve": """Starts the service. Without a database URL it starts an embedded PostgreSQL in the
        data directory and migrates it. A second SIGINT does not shorten the drain; the process ends
        at the latest 15 seconds after `CHAT_HISTORY_SHUTDOWN_DELAY` and
        `CHAT_HISTORY_SHUTDOWN_GRACE`. Exit code 1: the service cannot listen on an address, the
        migration failed, or the embedded PostgreSQL does not start. Exit code 2: also when another
        process uses the data directory.""",
    "migrate": """Migrates the schema and prints the revision before and after. It is safe to run at
        every deployment and in several places concurrently: one migrator works, the others wait.
        Exit code 1: the migration was rolled back, or the database cannot be reached. See
        [Migrations](../how-to/migrations.md).""",
    "move-schema": """Moves the tables of a database into another schema, such as those that release
        0.1.0 created in `public`; see [Migrations](../how-to/migrations.md#choose-the-schema).
        The rights on them move along. Exit code 1: a service is connected, or a schema of that name
        has other tables; nothing was changed.""",
    "check": """Prints one line for each finding, starting with `ok`, `note` or `todo`. Exit code 1:
        at least one `todo`.""",
    "export": """Writes JSON lines; see [Import and export](../how-to/import-export.md). An embedded
        PostgreSQL is started when it is not running. Exit code 1: the user does not exist, the file
        cannot be written, or the database cannot be reached.""",
    "import": """Reads JSON lines; see [Import and export](../how-to/import-export.md). Exit code 1:
        a line is rejected (the message names it), or the database cannot be reached.""",
    "token": """Signs a bearer token for development and prints it. Exit code 2: no key can sign it.
        See [Identity and TLS](../how-to/identity.md).""",
    "reindex": """Calls `RebuildSearchIndex` of the running server and shows its progress.
        Interrupting the command does not stop the rebuild. Exit code 1: the server rejected the
        call or cannot be reached. Exit code 2: a certificate file cannot be read.""",
    "embedded upgrade": """Upgrades the data directory of the embedded PostgreSQL by dump and
        restore, and keeps the old data. The service must be stopped. An interrupted upgrade loses
        nothing and can be repeated. Exit code 1: the upgrade is not possible, and the data is
        unchanged. Exit code 2: also when the service runs. See
        [Embedded PostgreSQL](../how-to/embedded.md).""",
}
"""Text on each command that its help lacks: effects, exit codes, further reading."""


def _type(parameter: Any) -> str:
    if getattr(parameter, "is_flag", False):
        return "flag"
    words = {str: "text", float: "number", int: "integer", Path: "path"}
    bounds = [
        f"{sign} {value:g}"
        for sign, value in (("≥", parameter.min), ("≤", parameter.max))
        if value is not None
    ]
    return ", ".join([words[parameter.type_descriptor.annotation], *bounds])


def _is_argument(parameter: Any) -> bool:
    return isinstance(parameter, TyperArgument)


def _metavar(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _rows(command: Any) -> list[tuple[str, str, str, str]]:
    rows = []
    for parameter in command.params:
        name = _metavar(parameter) if _is_argument(parameter) else ", ".join(parameter.opts)
        has_default = parameter.default is not None and not getattr(parameter, "is_flag", False)
        default = f"`{parameter.default}`" if has_default else ""
        if parameter.required:
            default = "required"
        variable = f" Environment: `{parameter.envvar}`." if parameter.envvar else ""
        rows.append((f"`{name}`", _type(parameter), default, (parameter.help or "") + variable))
    return rows


def _commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the full name of each command and the command, also those of nested groups."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def render() -> str:
    """Return the page.

    Raises:
        ValueError: COMMANDS lacks a command or describes one that does not exist.
    """
    group: Any = typer.main.get_command(cli.app)
    commands = dict(_commands(group))
    if unsorted := set(commands) ^ set(COMMANDS):
        raise ValueError(f"COMMANDS in {__file__} and the command line differ in {unsorted}")
    parts = [HEAD, table(("Code", "Meaning"), ((f"`{k}`", v) for k, v in EXIT_CODES.items()))]
    parts += ["\n## Options of every command\n\n"]
    head = ("Option", "Type", "Default", "Meaning")
    parts.append(table(head, [*_rows(group), ("`--help`", "flag", "", "Show the help and exit.")]))
    for name, command in commands.items():
        arguments = "".join(
            f" {_metavar(parameter)}" for parameter in command.params if _is_argument(parameter)
        )
        parts.append(f"\n## chat-history {name}\n\n")
        parts.append(f"`chat-history {name} [OPTIONS]{arguments}`\n\n")
        parts.append(inspect.cleandoc(command.help or "") + "\n\n")
        parts.append(inspect.cleandoc(COMMANDS[name]) + "\n")
        if rows := _rows(command):
            parts.append("\n" + table(("Argument or option", *head[1:]), rows))
    return formatted("".join(parts))
