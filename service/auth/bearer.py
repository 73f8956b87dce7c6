"""Bearer tokens: whether one is genuine and for us, and whom it names.

What a token says of itself is never believed before its signature: the algorithms follow from the type of *our* key, so a public key
cannot be taken for a shared secret, and `none` is no algorithm of any key.
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

LEEWAY = 10.0
"""Seconds that clocks may differ."""
SERVICE_SCOPE = "chathistory.service"
"""The scope that makes a caller a service."""
MIN_SECRET_BYTES = 16
"""A shorter shared secret can be guessed from one token, offline."""
STRONG_SECRET_BYTES = 32
"""What RFC 7518 asks of a secret for HS256."""
MIN_RSA_BITS = 2048
_HOW_TO = "`openssl rand -hex 32`"

_HMAC = {0: "HS256", 48: "HS384", 64: "HS512"}
_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
# What is meant as the name of a file; were it taken for a secret after a typing error, everybody could guess it.
_FILE_NAME = re.compile(r"(~?|\.{1,2})/.*|.*\.(pem|key|pub|crt|txt|secret)", re.DOTALL)


class Key(NamedTuple):
    """A key that verifies tokens, and the algorithms that its type allows."""

    key: RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey | bytes
    algorithms: tuple[str, ...]


class Keys(Protocol):
    """Where verifying keys come from."""

    generation: int
    """Rises when a key is withdrawn: what was verified before no longer counts."""

    async def find(self, kid: object) -> Key | None:
        """Return the key with an id, or None.

        Raises:
            Unavailable: no key has been obtained yet.
        """

    def touch(self) -> None:
        """Note that the keys are in use, so that they are kept fresh."""

    def close(self) -> None:
        """End what goes on in the background."""


class OneKey:
    """A key of the configuration."""

    def __init__(self, key: Key) -> None:
        self.generation = 0
        self._key = key

    async def find(self, _kid: object) -> Key | None:
        """Return the key, whatever id the token gives it."""
        return self._key

    def touch(self) -> None:
        """Nothing to do: it changes at a restart."""

    def close(self) -> None:
        """Nothing to do."""


class Identity(NamedTuple):
    """Whom a token names."""

    subject: str
    is_service: bool
    expires_at: float
    """In seconds since 1970, with the leeway."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a token must say beside its signature."""

    issuer: str | None = None
    audience: str | None = None
    service_subjects: frozenset[str] = frozenset()
    """Subjects that are services without the scope, such as system:serviceaccount:NAMESPACE:NAME."""


class Verifier:
    """Tells genuine tokens from others."""

    def __init__(self, keys: Keys, rules: Rules) -> None:
        import jwt  # noqa: PLC0415 - an extra: a service that trusts its callers does without

        self.keys = keys
        self._rules = rules
        self._header = jwt.get_unverified_header
        self._decode = jwt.decode

    async def verify(self, token: str) -> Identity:
        """Return whom a token names.

        Raises:
            Unauthenticated: it is not genuine, not for us, or not valid now; which of these, nobody is told.
            Unavailable: no key has been obtained yet.
        """
        try:
            header = self._header(token)
            kid = header.get("kid")
        except Exception:  # noqa: BLE001 - whatever goes wrong with a token, the answer is no
            raise refused() from None
        # We know no extension, and a token that asks for one must not pass without it (RFC 7515, 4.1.11).
        key = None if "crit" in header else await self.keys.find(kid)
        if key is None:
            raise refused()
        try:
            claims = self._decode(
                token,
                key.key,
                algorithms=key.algorithms,
                issuer=self._rules.issuer,
                audience=self._rules.audience,
                leeway=LEEWAY,
                options={"require": ["exp"]},
            )
            return self._identity(claims)
        except Exception:  # noqa: BLE001 - as above
            raise refused() from None

    def _identity(self, claims: Mapping[str, Any]) -> Identity:
        subject = str(claims.get("sub") or "")
        scopes = {*_words(claims.get("scope")), *_words(claims.get("scp"))}
        is_service = SERVICE_SCOPE in scopes or subject in self._rules.service_subjects
        if not subject and not is_service:
            raise refused()
        return Identity(subject, is_service, int(claims["exp"]) + LEEWAY)


def refused() -> Unauthenticated:
    """Make the one error of every token that is not accepted: a reason would help whoever forges one."""
    return Unauthenticated("a valid bearer token is required")


def _words(value: object) -> list[str]:
    """Read a scope claim: words in one string (RFC 8693), or a list of them, as some issuers write it."""
    if isinstance(value, str):
        return value.split()
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def load_key(value: str) -> tuple[Key, list[str]]:
    """Read a configured key: a shared secret, a public key (PEM), or the name of a file that holds either.

    Returns:
        The key, and what the operator should be told about it.

    Raises:
        ValueError: it cannot be used; the text does not hold it.
    """
    text = value.strip()
    if "-----BEGIN" not in text and (content := _file(text)) is not None:
        text = content.strip()
    if "-----BEGIN" in text:
        return public_key(_read_pem(text.encode())), []
    secret = text.encode()
    if len(secret) < MIN_SECRET_BYTES:
        raise ValueError(
            f"the shared secret has fewer than {MIN_SECRET_BYTES} bytes: make one with {_HOW_TO}"
        )
    notes = []
    if len(secret) < STRONG_SECRET_BYTES:
        import warnings  # noqa: PLC0415

        warnings.filterwarnings("ignore", message="The HMAC key is")  # Said once, here.
        notes.append(
            f"the shared secret has fewer than {STRONG_SECRET_BYTES} bytes: make a longer one with {_HOW_TO}"
        )
    return Key(
        secret, tuple(name for length, name in _HMAC.items() if len(secret) >= length)
    ), notes


def _file(name: str) -> str | None:
    """Read the file of that name; None when this is no name of a file.

    Raises:
        ValueError: it looks like one, and cannot be read.
    """
    try:
        path = Path(name).expanduser()
        if not _FILE_NAME.fullmatch(name) and not path.is_file():
            return None
        return path.read_text()
    except (OSError, RuntimeError, ValueError) as error:
        if not _FILE_NAME.fullmatch(name):
            return None
        reason = getattr(error, "strerror", None) or "it is no text"
        # Without the name: it may be the secret itself, as one in 64 that base64 writes begins with a slash.
        raise ValueError(
            f"it is written like the name of a file, which cannot be read: {reason}. If it is meant as a shared secret, take one "
            f"that is not written so: {_HOW_TO}"
        ) from None


def _read_pem(text: bytes) -> object:
    from cryptography.hazmat.primitives.serialization import load_pem_public_key  # noqa: PLC0415
    from cryptography.x509 import load_pem_x509_certificate  # noqa: PLC0415

    if b"PRIVATE KEY" in text:
        raise ValueError(
            "it holds a private key, and the service needs the public one: `openssl pkey -in FILE -pubout`"
        )
    try:
        if b"BEGIN CERTIFICATE" in text:
            return load_pem_x509_certificate(text).public_key()
        return load_pem_public_key(text)
    except Exception:  # noqa: BLE001 - the library's words may hold pieces of the key
        raise ValueError("the key is no public key in PEM form") from None


def public_key(key: object, only: str | None = None) -> Key:
    """Say which algorithms the type of a public key allows.

    Args:
        only: The one algorithm that the key's publisher names for it.

    Raises:
        ValueError: its type or size is not supported.
    """
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa  # noqa: PLC0415

    match key:
        case rsa.RSAPublicKey() if key.key_size >= MIN_RSA_BITS:
            found = Key(key, _RSA)
        case ec.EllipticCurvePublicKey() if key.curve.name in _CURVES:
            found = Key(key, (_CURVES[key.curve.name],))
        case ed25519.Ed25519PublicKey():
            found = Key(key, ("EdDSA",))
        case _:
            raise ValueError(
                f"the key must be RSA of {MIN_RSA_BITS} bits or more, EC (P-256, P-384, P-521) or Ed25519"
            )
    if only is None:
        return found
    if only not in found.algorithms:
        raise ValueError("the key's type and its algorithm contradict each other")
    return found._replace(algorithms=(only,))


def make(
    key: str,
    subject: str,
    *,
    lifetime: float,
    issuer: str | None,
    audience: str | None,
    service: bool,
    kid: str | None = None,
) -> str:
    """Make a token for development: signed with the shared secret, or with a private key (PEM).

    Raises:
        ValueError: the key cannot sign.
    """
    import jwt  # noqa: PLC0415

    now = int(time.time())
    claims: dict[str, Any] = {"sub": subject, "iat": now, "exp": now + int(lifetime)}
    claims |= {name: value for name, value in (("iss", issuer), ("aud", audience)) if value}
    if service:
        claims["scope"] = SERVICE_SCOPE
    signing, algorithm = _signing_key(key)
    return jwt.encode(claims, signing, algorithm, headers={"kid": kid} if kid else None)


def _signing_key(value: str) -> tuple[Any, str]:
    text = value.strip()
    if "-----BEGIN" not in text and (content := _file(text)) is not None:
        text = content.strip()
    if "PRIVATE KEY" not in text:
        key = load_key(value)[0]
        if not isinstance(key.key, bytes):
            raise ValueError("a public key cannot sign: give a private one with --key")
        return key.key, key.algorithms[0]
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

    try:
        private = load_pem_private_key(text.encode(), None)
    except Exception:  # noqa: BLE001 - the library's words may hold pieces of the key
        raise ValueError(
            "the private key cannot be read: it must be PEM, without a passphrase"
        ) from None
    return private, public_key(private.public_key()).algorithms[0]
