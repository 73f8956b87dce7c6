"""The command `reindex`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.common import configuration, fail, print_message, run, stoppable

if TYPE_CHECKING:
    from service.config import Settings
    from service.rpc.reindex_client import TlsFiles

TOKEN_LIFETIME_S = 3600.0
"""Validity in seconds of the token that the command signs."""


def reindex_command(
    address: Annotated[
        str | None, typer.Option(help="Address of the server. Default: the configured one.")
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="CHAT_HISTORY_TOKEN",
            help="Token of a service, if the server requires one. Default: signed with the "
            "configured secret.",
        ),
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(help="Certificates (PEM) that verify the server.")
    ] = None,
) -> None:
    """Rebuild the search index of a running server. Search stays available while it runs."""
    from rich.progress import Progress

    from service.errors import ServiceError
    from service.rpc.reindex_client import reindex

    settings, _ = configuration()
    if token is None:
        token = _sign_token(settings)
    tls = _tls_files(settings, ca)

    async def follow() -> None:
        with Progress(transient=True) as progress:
            task = progress.add_task("indexing", total=None)
            failed = 0
            async for progress_report in reindex(address or settings.listen, token, tls):
                progress.update(task, total=progress_report.total, completed=progress_report.done)
                failed = progress_report.failed
        failures = f"; {failed} items could not be indexed: see the server's log" if failed else ""
        print_message(f"the search index was rebuilt{failures}")

    with stoppable():
        try:
            run(follow)
        except ServiceError as error:
            fail(error.message, 1)
        except OSError as error:
            fail(str(error), 2)


def _sign_token(settings: Settings) -> str | None:
    """Return a token of a service; None if the server requires none, or no configured key signs."""
    from service.auth.bearer import make_token

    if settings.auth != "jwt" or settings.jwt_key is None:
        return None
    with suppress(ValueError):  # A public key cannot sign.
        return make_token(
            settings.jwt_key.get_secret_value(),
            "reindex",
            lifetime_s=TOKEN_LIFETIME_S,
            is_service=True,
            issuer=settings.jwt_issuer,
            audience=settings.jwt_audience,
        )
    return None


def _tls_files(settings: Settings, ca: Path | None) -> TlsFiles | None:
    """Return the certificates to connect with; None when the server does not use TLS.

    Without `ca` the server's own certificate is trusted, and under mutual TLS it is presented as
    the client's, too.
    """
    from service.rpc.reindex_client import TlsFiles

    root = ca or settings.tls_cert
    if root is None:
        return None
    if settings.tls_client_ca is None:
        return TlsFiles(root, None, None)
    return TlsFiles(root, settings.tls_cert, settings.tls_key)
