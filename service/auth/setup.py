"""From the configuration to what tells callers apart: tokens, certificates, and what the operator should be told about them."""

from __future__ import annotations

import structlog

from service.auth import bearer, jwks
from service.auth.caller import Authenticate, BearerTokens, by_certificate, by_external_id, trust
from service.auth.tls import Certificates, Files
from service.config import PREFIX, BadConfiguration, Settings, is_loopback, split_address
from service.store.db.database import Database

_log = structlog.get_logger(__name__)


def authenticator(settings: Settings, database: Database) -> Authenticate:
    """Return how callers are told apart.

    Raises:
        BadConfiguration: the key cannot be used.
    """
    if settings.auth == "none":
        return trust if settings.tls_client_ca is None else by_certificate
    keys, notes = _keys(settings)
    for note in notes + _notes(settings):
        _log.warning(note)
    subjects = frozenset(filter(None, map(str.strip, settings.jwt_service_subjects.split(","))))
    verifier = bearer.Verifier(
        keys, bearer.Rules(settings.jwt_issuer, settings.jwt_audience, subjects)
    )
    return BearerTokens(
        verifier, by_external_id(database) if settings.jwt_subject == "external_id" else None
    )


def close(authenticate: Authenticate) -> None:
    """End what an authenticator does in the background."""
    if isinstance(authenticate, BearerTokens):
        authenticate.close()


def certificates(settings: Settings) -> Certificates | None:
    """Return the server's certificates; None to serve in plaintext.

    Raises:
        BadConfiguration: they cannot be used.
    """
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    try:
        return Certificates(Files(settings.tls_cert, settings.tls_key, settings.tls_client_ca))
    except ValueError as error:
        raise BadConfiguration([str(error)]) from None


def check(settings: Settings) -> list[str]:
    """Try what the configuration says of keys and certificates, without serving, and return what the operator should be told.

    Raises:
        BadConfiguration: a key or a certificate cannot be used.
    """
    certificates(settings)
    return [] if settings.auth == "none" else _keys(settings)[1] + _notes(settings)


def _keys(settings: Settings) -> tuple[bearer.Keys, list[str]]:
    try:
        import jwt  # noqa: F401, PLC0415 - asked for once, to say what is missing
    except ImportError:
        raise BadConfiguration(
            [f"{PREFIX}AUTH=jwt needs PyJWT: pip install 'chathistory-service[auth]'"]
        ) from None
    if settings.jwks_url is not None:
        try:
            fetch = jwks.over_http(settings.jwks_url, settings.jwks_ca, settings.jwks_token_file)
        except ValueError as error:
            raise BadConfiguration([f"{PREFIX}JWKS_CA: {error}"]) from None
        return jwks.Jwks(fetch), []
    value = settings.jwt_key.get_secret_value() if settings.jwt_key else ""
    try:
        key, notes = bearer.load_key(value)
    except ValueError as error:
        raise BadConfiguration([f"{PREFIX}JWT_KEY: {error}"]) from None
    return bearer.OneKey(key), [f"{PREFIX}JWT_KEY: {note}" for note in notes]


def _notes(settings: Settings) -> list[str]:
    notes = []
    if not settings.jwt_audience:
        notes.append(
            f"{PREFIX}JWT_AUDIENCE is not set: a token without an audience that was made for another service with the same key is accepted, "
            "and every token with one is refused"
        )
    if settings.tls_cert is None and not is_loopback(split_address(settings.listen)[0]):
        notes.append(
            f"{PREFIX}TLS_CERT is not set: tokens travel in plaintext unless something in front encrypts"
        )
    return notes
