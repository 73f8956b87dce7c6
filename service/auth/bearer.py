"""Bearer tokens: verification of their signature and claims, and the keys to verify with.

Nothing in a token is trusted before its signature. The allowed algorithms follow from the type of
*our* key, so a public key cannot be used as a shared secret, and no key allows `none`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from service.errors import Unauthenticated

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

LEEWAY_S = 10.0
"""Tolerated difference between our clock and the issuer's."""
SERVICE_SCOPE = "chathistory.service"
"""The scope that makes a caller a service."""
MIN_SECRET_BYTES = 16
"""A shorter shared secret can be guessed offline from a single token."""
RECOMMENDED_SECRET_BYTES = 32
"""The length that RFC 7518, 3.2 requires of a secret for HS256."""
MIN_RSA_BITS = 2048
_NEW_SECRET = "`openssl rand -hex 32`"  # noqa: S105 - a command

_HMAC = {0: "HS256", 48: "HS384", 64: "HS512"}
"""Algorithms of a shared secret by the minimum number of its bytes."""
_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
# Matches values that are probably meant as a file's name. An attacker could guess a mistyped name
# that was used as the shared secret.
_FILE_NAME = re.compile(r"(~?|\.{1,2})/.*|.*\.(pem|key|pub|crt|txt|secret)", re.DOTALL)


class VerificationKey(NamedTuple):
    """A key that verifies tokens, and the algorithms that its type allows."""

    key: RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey | bytes
    algorithms: tuple[str, ...]


class KeySource(Protocol):
    """Provides the keys that verify tokens."""

    generation: int
    """Increases when a key is withdrawn: tokens verified before must be verified again."""

    async def find(self, kid: object) -> VerificationKey | None:
        """Return the key with an id, or None.

        Raises:
            Unavailable: no key has been obtained yet.
        """

    def refresh_if_old(self) -> None:
        """Start a refresh in the background if the keys, which are in use, are old."""

    def close(self) -> None:
        """Stop background work."""


class StaticKey:
    """The key of the configuration, which changes only by a restart."""

    def __init__(self, key: VerificationKey) -> None:
        self.generation = 0
        self._key = key

    async def find(self, _kid: object) -> VerificationKey | None:
        """Return the key, whatever id a token names."""
        return self._key

    def refresh_if_old(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class TokenIdentity(NamedTuple):
    """The claims of a verified token that identify its caller."""

    subject: str
    is_service: bool
    expires_at: float
    """In seconds since 1970, including the leeway."""


@dataclass(frozen=True, slots=True)
class ClaimRules:
    """Rules for a token's claims."""

    issuer: str | None = None
    audience: str | None = None
    service_subjects: frozenset[str] = frozenset()
    """Subjects that are services without the scope: system:serviceaccount:NAMESPACE:NAME."""


class TokenVerifier:
    """Verifies the signature and the claims of tokens."""

    def __init__(self, keys: KeySource, rules: ClaimRules) -> None:
        import jwt  # noqa: PLC0415 - an extra, not installed where AUTH=none

        self.keys = keys
        self._rules = rules
        self._header = jwt.get_unverified_header
        self._decode = jwt.decode

    async def verify(self, token: str) -> TokenIdentity:
        """Return the identity in a token.

        Raises:
            Unauthenticated: it is forged, for another audience, or not valid now. The error is the
                same in each case.
            Unavailable: no key has been obtained yet.
        """
        try:
            header = self._header(token)
            kid = header.get("kid")
        except Exception:  # noqa: BLE001 - every failure to parse means that it is not valid
            raise invalid_token() from None
        # We support no extension; a token that requires one must be rejected (RFC 7515, 4.1.11).
        key = None if "crit" in header else await self.keys.find(kid)
        if key is None:
            raise invalid_token()
        try:
            claims = self._decode(
                token,
                key.key,
                algorithms=key.algorithms,
                issuer=self._rules.issuer,
                audience=self._rules.audience,
                leeway=LEEWAY_S,
                options={"require": ["exp"]},
            )
            return self._identity(claims)
        except Exception:  # noqa: BLE001 - as above
            raise invalid_token() from None

    def _identity(self, claims: Mapping[str, Any]) -> TokenIdentity:
        subject = str(claims.get("sub") or "")
        scopes = {*_scopes(claims.get("scope")), *_scopes(claims.get("scp"))}
        is_service = SERVICE_SCOPE in scopes or subject in self._rules.service_subjects
        if not subject and not is_service:
            raise invalid_token()
        return TokenIdentity(subject, is_service, int(claims["exp"]) + LEEWAY_S)


def invalid_token() -> Unauthenticated:
    """Return the one error for every rejected token: a reason would help an attacker."""
    return Unauthenticated("a valid bearer token is required")


def _scopes(value: object) -> list[str]:
    """Read a scope claim: one string of words (RFC 8693), or a list, as some issuers write it."""
    if isinstance(value, str):
        return value.split()
    return [scope for scope in value if isinstance(scope, str)] if isinstance(value, list) else []


def load_key(value: str) -> tuple[VerificationKey, list[str]]:
    """Load a configured key: a shared secret, a public key (PEM), or the name of its file.

    Returns:
        The key, and warnings for the operator.

    Raises:
        ValueError: it cannot be used. The text does not contain the key.
    """
    text = value.strip()
    if "-----BEGIN" not in text and (content := _read_key_file(text)) is not None:
        text = content.strip()
    if "-----BEGIN" in text:
        return public_key(_parse_pem(text.encode())), []
    secret = text.encode()
    if len(secret) < MIN_SECRET_BYTES:
        raise ValueError(
            f"the shared secret has fewer than {MIN_SECRET_BYTES} bytes; create one with "
            f"{_NEW_SECRET}"
        )
    warnings = []
    if len(secret) < RECOMMENDED_SECRET_BYTES:
        from warnings import filterwarnings  # noqa: PLC0415

        # PyJWT would repeat this warning.
        filterwarnings("ignore", message="The HMAC key is")
        warnings.append(
            f"the shared secret has fewer than {RECOMMENDED_SECRET_BYTES} bytes; create a longer "
            f"one with {_NEW_SECRET}"
        )
    algorithms = tuple(name for min_bytes, name in _HMAC.items() if len(secret) >= min_bytes)
    return VerificationKey(secret, algorithms), warnings


def _read_key_file(name: str) -> str | None:
    """Read a key's file; return None if the value does not name a file.

    Raises:
        ValueError: it looks like a file's name, and the file cannot be read.
    """
    try:
        path = Path(name).expanduser()
        if not _FILE_NAME.fullmatch(name) and not path.is_file():
            return None
        return path.read_text()
    except (OSError, RuntimeError, ValueError) as error:
        if not _FILE_NAME.fullmatch(name):
            return None
        reason = getattr(error, "strerror", None) or "it is not a text file"
        # The name is not part of the message, since it may be the secret itself: one in 64 secrets
        # in base64 begins with a slash.
        raise ValueError(
            "the value looks like the name of a file, and that file cannot be read: "
            f"{reason}. If it is a shared secret, use one that does not look like a file's name: "
            f"{_NEW_SECRET}"
        ) from None


def _parse_pem(text: bytes) -> object:
    from cryptography.hazmat.primitives.serialization import load_pem_public_key  # noqa: PLC0415
    from cryptography.x509 import load_pem_x509_certificate  # noqa: PLC0415

    if b"PRIVATE KEY" in text:
        raise ValueError(
            "this is a private key, and the service needs the public key: "
            "`openssl pkey -in FILE -pubout`"
        )
    try:
        if b"BEGIN CERTIFICATE" in text:
            return load_pem_x509_certificate(text).public_key()
        return load_pem_public_key(text)
    except Exception:  # noqa: BLE001 - the library's message may contain parts of the key
        raise ValueError("this is not a public key or certificate in PEM form") from None


def public_key(key: object, only_algorithm: str | None = None) -> VerificationKey:
    """Return a public key with the algorithms that its type allows.

    Args:
        key: The key.
        only_algorithm: The single algorithm that the key's publisher allows for it.

    Raises:
        ValueError: its type or size is not supported, or contradicts `only_algorithm`.
    """
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa  # noqa: PLC0415

    match key:
        case rsa.RSAPublicKey() if key.key_size >= MIN_RSA_BITS:
            verification_key = VerificationKey(key, _RSA)
        case ec.EllipticCurvePublicKey() if key.curve.name in _CURVES:
            verification_key = VerificationKey(key, (_CURVES[key.curve.name],))
        case ed25519.Ed25519PublicKey():
            verification_key = VerificationKey(key, ("EdDSA",))
        case _:
            raise ValueError(
                f"the key must be RSA with at least {MIN_RSA_BITS} bits, EC (P-256, P-384 or "
                "P-521) or Ed25519"
            )
    if only_algorithm is None:
        return verification_key
    if only_algorithm not in verification_key.algorithms:
        raise ValueError("the key's algorithm does not fit its type")
    return verification_key._replace(algorithms=(only_algorithm,))


def make_token(
    key: str,
    subject: str,
    *,
    lifetime_s: float,
    issuer: str | None,
    audience: str | None,
    is_service: bool,
    kid: str | None = None,
) -> str:
    """Sign a token for development, with the shared secret or a private key (PEM).

    Args:
        key: The key, or the name of its file.
        subject: The user's id, or any name for a service.
        lifetime_s: Seconds until the token expires.
        issuer: The `iss` claim.
        audience: The `aud` claim.
        is_service: Whether the token gets the service scope.
        kid: The id of the key.

    Raises:
        ValueError: the key cannot sign.
    """
    import jwt  # noqa: PLC0415

    now = int(time.time())
    claims: dict[str, Any] = {"sub": subject, "iat": now, "exp": now + int(lifetime_s)}
    claims |= {name: value for name, value in (("iss", issuer), ("aud", audience)) if value}
    if is_service:
        claims["scope"] = SERVICE_SCOPE
    signing_key, algorithm = _signing_key(key)
    return jwt.encode(claims, signing_key, algorithm, headers={"kid": kid} if kid else None)


def _signing_key(value: str) -> tuple[Any, str]:
    text = value.strip()
    if "-----BEGIN" not in text and (content := _read_key_file(text)) is not None:
        text = content.strip()
    if "PRIVATE KEY" not in text:
        key = load_key(value)[0]
        if not isinstance(key.key, bytes):
            raise ValueError("a public key cannot sign; pass the private key with --key")
        return key.key, key.algorithms[0]
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

    try:
        private_key = load_pem_private_key(text.encode(), None)
    except Exception:  # noqa: BLE001 - the library's message may contain parts of the key
        raise ValueError(
            "the private key cannot be read; it must be in PEM form and have no passphrase"
        ) from None
    return private_key, public_key(private_key.public_key()).algorithms[0]
