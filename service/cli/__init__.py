"""The command `chat-history`, one module for each command.

Exit codes: 0 success, 1 failure or something to do, 2 invalid configuration or usage. Modules that
only one command needs are imported inside that command, to keep the memory of `serve` small.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

import service
from service.cli.check import check_command
from service.cli.common import print_message
from service.cli.embedded import embedded_app
from service.cli.export_import import export_command, import_command
from service.cli.migrate import migrate_command
from service.cli.move_schema import move_schema_command
from service.cli.reindex import reindex_command
from service.cli.serve import serve_command
from service.cli.token import token_command
from service.telemetry.exceptions import locations

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="ChatHistory: a gRPC service that keeps conversations on PostgreSQL.",
    epilog="Configured by environment variables and a .env file: docs/reference/configuration.md.",
)
app.command("serve")(serve_command)
app.command("migrate")(migrate_command)
app.command("move-schema")(move_schema_command)
app.command("check")(check_command)
app.command("export")(export_command)
app.command("import")(import_command)
app.command("token")(token_command)
app.command("reindex")(reindex_command)
app.add_typer(embedded_app, name="embedded")


def main() -> None:
    """Run the command line."""
    # The embedded PostgreSQL may be started by fork while gRPC runs, and gRPC's fork handlers can
    # leave the child hanging.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    try:
        app(prog_name="chat-history")
    except Exception as error:  # noqa: BLE001 - its text may hold content or a connection string
        print_message(f"unexpected {type(error).__name__}; report these code locations:")
        for location in locations(error):
            print_message(f"  {location}")
        sys.exit(1)


def _show_version(is_requested: bool) -> None:
    if is_requested:
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
