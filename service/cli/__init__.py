"""The `chat-history` command. Exit codes: 0 all is well, 1 something must be done, 2 the configuration or the way it was called is wrong.

What serves must stay small, so what only one command needs is imported inside that command.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

import service
from service.cli import access, checks, data, serving

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="ChatHistory: a gRPC service that keeps conversations on PostgreSQL.",
    epilog="Configured by environment variables and a .env file: see docs/reference/configuration.md.",
)
app.command()(serving.serve)
app.command("migrate")(serving.migrate_command)
app.command()(checks.check)
app.command("export")(data.export_command)
app.command("import")(data.import_command)
app.command()(access.token)
app.command()(access.reindex)


def main() -> None:
    """Run the command line."""
    # The embedded PostgreSQL may be started while gRPC runs, by fork, whose handlers in gRPC can leave the child hanging.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    app(prog_name="chat-history")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"chat-history {service.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass
