"""Builds the authenticator and the server's TLS certificates from the settings."""

from __future__ import annotations

import structlog

from service.auth import bearer, jwks
from service.auth.authenticators import (
    Authenticate,
    BearerAuthenticator,
    FindUserId,
    by_certificate,
    trust_all,
)
from service.auth.tls import CertificateFiles, Certificates
from service.config import PREFIX, BadConfiguration, Settings, is_loopback, split_address

_log = structlog.get_logger(__name__)


def make_authenticator(settings: Settings, find_user_id: FindUserId) -> Authenticate:
    """Return the authenticator that the settings ask for.

    Args:
        settings: The settings.
        find_user_id: Finds users by external id, for `CHAT_HISTORY_JWT_SUBJECT=external_id`.

    Raises:
        BadConfiguration: the key cannot be used.
    """
    if settings.auth == "none":
        return trust_all if settings.tls_client_ca is None else by_certificate
    keys, warnings = _key_source(settings)
    for warning in warnings + _warnings(settings):
        _log.warning("identity settings", problem=warning)
    subjects = frozenset(filter(None, map(str.strip, settings.jwt_service_subjects.split(","))))
    verifier = bearer.TokenVerifier(
        keys, bearer.ClaimRules(settings.jwt_issuer, settings.jwt_audience, subjects)
    )
    return BearerAuthenticator(
        verifier, find_user_id if settings.jwt_subject == "external_id" else None
    )


def close_authenticator(authenticate: Authenticate) -> None:
    """Stop the background work of an authenticator."""
    if isinstance(authenticate, BearerAuthenticator):
        authenticate.close()


def load_certificates(settings: Settings) -> Certificates | None:
    """Return the server's certificates; None to serve in plaintext.

    Raises:
        BadConfiguration: they cannot be used.
    """
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    files = CertificateFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    try:
        return Certificates(files)
    except ValueError as error:
        raise BadConfiguration([str(error)]) from None


def check(settings: Settings) -> list[str]:
    """Load the configured keys and certificates without serving; return warnings for the operator.

    Raises:
        BadConfiguration: a key or a certificate cannot be used.
    """
    load_certificates(settings)
    return [] if settings.auth == "none" else _key_source(settings)[1] + _warnings(settings)


def _key_source(settings: Settings) -> tuple[bearer.KeySource, list[str]]:
    try:
        import jwt  # noqa: F401, PLC0415 - only to report what is missing
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
        key, warnings = bearer.load_key(value)
    except ValueError as error:
        raise BadConfiguration([f"{PREFIX}JWT_KEY: {error}"]) from None
    return bearer.StaticKey(key), [f"{PREFIX}JWT_KEY: {warning}" for warning in warnings]


def _warnings(settings: Settings) -> list[str]:
    warnings = []
    if not settings.jwt_audience:
        warnings.append(
            f"{PREFIX}JWT_AUDIENCE is not set: a token without an audience that was issued for "
            "another service with the same key is accepted, and every token with one is rejected"
        )
    if settings.tls_cert is None and not is_loopback(split_address(settings.listen)[0]):
        warnings.append(
            f"{PREFIX}TLS_CERT is not set: tokens travel in plaintext unless a proxy in front of "
            "the service encrypts"
        )
    return warnings
