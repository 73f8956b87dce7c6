"""The command `reindex`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from service.cli.common import configuration, fail, print_message, run, stoppable


def reindex_command(
    address: Annotated[
        str | None, typer.Option(help="Address of the server. Default: the configured one.")
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="CHAT_HISTORY_TOKEN",
            help="Token of a service, if the server requires one. Default: made from the "
            "configured secret.",
        ),
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(help="Certificates (PEM) that verify the server.")
    ] = None,
) -> None:
    """Rebuild the search index of a running server. Search stays available while it runs."""
    from rich.progress import Progress

    from service.auth.bearer import make_token
    from service.errors import ServiceError
    from service.rpc.reindex_client import TlsFiles, reindex

    settings, _ = configuration()
    if token is None and settings.auth == "jwt" and settings.jwt_key is not None:
        with suppress(ValueError):  # A public key cannot sign.
            token = make_token(
                settings.jwt_key.get_secret_value(),
                "reindex",
                lifetime_s=3600,
                is_service=True,
                issuer=settings.jwt_issuer,
                audience=settings.jwt_audience,
            )
    root = ca or settings.tls_cert
    tls = None
    if root is not None:
        pair = (settings.tls_cert, settings.tls_key) if settings.tls_client_ca else (None, None)
        tls = TlsFiles(Path(root), *(Path(path) if path else None for path in pair))

    async def follow() -> None:
        with Progress(transient=True) as progress:
            task = progress.add_task("indexing", total=None)
            failed = 0
            async for state in reindex(address or settings.listen, token, tls):
                progress.update(task, total=state.total, completed=state.done)
                failed = state.failed
        failures = f"; {failed} items could not be indexed: see the server's log" if failed else ""
        print_message(f"the search index was rebuilt{failures}")

    with stoppable():
        try:
            run(follow)
        except ServiceError as error:
            fail(error.message, 1)
        except OSError as error:
            fail(str(error), 2)
