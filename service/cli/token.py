"""The command `token`."""

from __future__ import annotations

from typing import Annotated

import typer

from service.cli.common import configuration, fail


def token_command(
    subject: Annotated[
        str, typer.Argument(help="Subject of the token: a user's id, or any name with --service.")
    ],
    as_service: Annotated[
        bool, typer.Option("--service", help="Allow the caller to act for every user.")
    ] = False,
    lifetime: Annotated[float, typer.Option(help="Seconds until the token expires.", min=1)] = 3600,
    key: Annotated[
        str | None,
        typer.Option(help="File with a private key (PEM). Default: the configured secret."),
    ] = None,
    kid: Annotated[
        str | None, typer.Option(help="Key id, needed when the server reads keys from a URL.")
    ] = None,
) -> None:
    """Print a signed token for development."""
    from service.auth import bearer

    settings, _ = configuration()
    signing_key = key or (settings.jwt_key.get_secret_value() if settings.jwt_key else None)
    if signing_key is None:
        fail(
            "no key to sign with: set CHAT_HISTORY_AUTH=jwt and CHAT_HISTORY_JWT_KEY, "
            "or pass --key",
            2,
        )
    claims = {"issuer": settings.jwt_issuer, "audience": settings.jwt_audience, "kid": kid}
    try:
        print(
            bearer.make_token(
                signing_key, subject, lifetime_s=lifetime, is_service=as_service, **claims
            )
        )
    except ValueError as error:
        fail(str(error), 2)
