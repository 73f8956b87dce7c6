"""`token`, and `reindex`, which shows one."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from service.cli.common import configuration, fail, run, say, stoppable


def token(
    subject: Annotated[
        str, typer.Argument(help="Whom it names: a user's id, or any name with --service.")
    ],
    as_service: Annotated[
        bool, typer.Option("--service", help="Let it act for every user.")
    ] = False,
    lifetime: Annotated[float, typer.Option(help="Seconds until it expires.", min=1)] = 3600,
    key: Annotated[
        str | None, typer.Option(help="File of a private key (PEM); else the configured secret.")
    ] = None,
    kid: Annotated[
        str | None, typer.Option(help="The key's id, where keys come from a URL.")
    ] = None,
) -> None:
    """Make a token for development."""
    from service.auth import bearer

    settings, _ = configuration()
    signing = key or (settings.jwt_key.get_secret_value() if settings.jwt_key else None)
    if signing is None:
        fail(
            "nothing to sign with: set CHAT_HISTORY_AUTH=jwt and CHAT_HISTORY_JWT_KEY, or give --key",
            2,
        )
    about = {"issuer": settings.jwt_issuer, "audience": settings.jwt_audience, "kid": kid}
    try:
        print(bearer.make_token(signing, subject, lifetime=lifetime, service=as_service, **about))
    except ValueError as error:
        fail(str(error), 2)


def reindex(
    address: Annotated[
        str | None, typer.Option(help="The server's address; else the configured one.")
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="CHAT_HISTORY_TOKEN", help="A service's token, where the server asks for one."
        ),
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(help="Certificates to know the server by (PEM).")
    ] = None,
) -> None:
    """Have the running server build its search index anew; search goes on meanwhile."""
    from rich.progress import Progress

    from service.auth.bearer import make_token
    from service.errors import ServiceError
    from service.rpc.reindex_client import Tls, rebuild

    settings, _ = configuration()
    if token is None and settings.auth == "jwt" and settings.jwt_key is not None:
        with suppress(ValueError):  # A public key signs nothing.
            token = make_token(
                settings.jwt_key.get_secret_value(),
                "reindex",
                lifetime=3600,
                service=True,
                issuer=settings.jwt_issuer,
                audience=settings.jwt_audience,
            )
    root = ca or settings.tls_cert
    tls = None
    if root is not None:
        shown = (settings.tls_cert, settings.tls_key) if settings.tls_client_ca else (None, None)
        tls = Tls(Path(root), *(Path(each) if each else None for each in shown))

    async def follow() -> None:
        with Progress(transient=True) as progress:
            task = progress.add_task("indexing", total=None)
            failed = 0
            async for now in rebuild(address or settings.listen, token, tls):
                progress.update(task, total=now.total, completed=now.done)
                failed = now.failed
        say(
            "the search index is built anew"
            + (f"; {failed} could not be indexed: see the server's log" if failed else "")
        )

    with stoppable():
        try:
            run(follow)
        except ServiceError as error:
            fail(error.message, 1)
        except OSError as error:
            fail(str(error), 2)
