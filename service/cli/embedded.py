"""The commands `embedded …`, for the data of the embedded PostgreSQL."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.cli.common import (
    configuration,
    exit_on_embedded_errors,
    print_message,
    stoppable,
)

embedded_app = typer.Typer(no_args_is_help=True, help="Maintain the embedded PostgreSQL.")


@embedded_app.command("upgrade")
def upgrade_command(
    old_programs: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the programs of the data's version, such as "
            "`/usr/lib/postgresql/15/bin`. Needed if the installed package lacks them.",
        ),
    ] = None,
) -> None:
    """Upgrade the data to the newest installed major version of PostgreSQL."""
    settings, _ = configuration()
    with stoppable(), exit_on_embedded_errors():
        from service.embedded.upgrade import upgrade

        print_message(upgrade(settings.data_dir, print_message, old_programs))
