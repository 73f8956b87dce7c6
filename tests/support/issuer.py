"""An issuer of tokens for tests: keys of every kind, genuine and forged tokens, and a JWKS endpoint on this machine."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from jwt.algorithms import get_default_algorithms

SECRET = "a shared secret that only the tests know, long enough for HS256"
ISSUER = "https://issuer.example"
AUDIENCE = "chathistory"
SERVICE = "chathistory.service"


@cache
def rsa_key(number: int = 0) -> rsa.RSAPrivateKey:
    """Return a key; another number is another key."""
    return rsa.generate_private_key(65537, 2048)


@cache
def ec_key(number: int = 0) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@cache
def ed_key(number: int = 0) -> ed25519.Ed25519PrivateKey:
    return ed25519.Ed25519PrivateKey.generate()


def public_pem(key: Any) -> str:
    pem: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem.decode()


def private_pem(key: Any) -> str:
    pem: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem.decode()


def claims(subject: str, **changes: Any) -> dict[str, Any]:
    """Return what a good token says; a change of None leaves a claim out.

    It is good for a day: some are made when pytest collects the tests, and a slow machine takes its time to come to the last of them.
    """
    now = int(time.time())
    all_ = {
        "sub": subject,
        "iss": ISSUER,
        "aud": AUDIENCE,
        "iat": now,
        "exp": now + 86_400,
    } | changes
    return {name: value for name, value in all_.items() if value is not None}


def token(
    subject: str,
    *,
    key: Any = SECRET,
    alg: str = "HS256",
    headers: Mapping[str, Any] | None = None,
    **changes: Any,
) -> str:
    """Make a token; by default a good one of the shared secret."""
    return jwt.encode(claims(subject, **changes), key, alg, headers=dict(headers or {}))


def service_token(subject: str = "backend", **changes: Any) -> str:
    return token(subject, scope=f"openid {SERVICE}", **changes)


def assemble_token(
    header: Mapping[str, Any], body: Mapping[str, Any], signature: bytes = b""
) -> str:
    """Put a token together as it is, signed by nobody."""
    return ".".join(
        _b64(part) for part in (json.dumps(header).encode(), json.dumps(body).encode(), signature)
    )


def hs256_token(secret: bytes, body: Mapping[str, Any]) -> str:
    """Sign with any bytes: PyJWT itself refuses a public key as a secret."""
    start = assemble_token({"alg": "HS256", "typ": "JWT"}, body).rpartition(".")[0]
    return start + "." + _b64(hmac.digest(secret, start.encode(), hashlib.sha256))


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def bearer_metadata(value: str) -> list[tuple[str, str]]:
    """Return the metadata that shows a token."""
    return [("authorization", f"Bearer {value}")]


def bad_tokens(subject: str) -> dict[str, str]:
    """Return tokens of every kind that must be refused where SECRET, ISSUER and AUDIENCE are configured."""
    now = int(time.time())
    good = token(subject)
    head, body, signature = good.split(".")
    return {
        "empty": "",
        "garbage": "garbage",
        "three dots": "...",
        "not JSON": ".".join(_b64(b"\xff{") for _ in range(3)),
        "deep JSON": f"{_b64(b'[' * 5000)}.{body}.{signature}",
        "alg none": assemble_token({"alg": "none", "typ": "JWT"}, claims(subject)),
        "alg None, old signature": assemble_token({"alg": "None"}, claims(subject)) + signature,
        "alg missing": assemble_token({"typ": "JWT"}, claims(subject)),
        "signature cut": f"{head}.{body}.",
        "signature of another secret": token(
            subject, key="another secret, just as long as the first"
        ),
        "claims changed": f"{head}.{_b64(json.dumps(claims(subject, scope=SERVICE)).encode())}.{signature}",
        "RS256": token(subject, key=rsa_key(), alg="RS256"),
        "wrong audience": token(subject, aud="somebody else"),
        "no audience": token(subject, aud=None),
        "wrong issuer": token(subject, iss="https://else.example"),
        "no issuer": token(subject, iss=None),
        "expired": token(subject, exp=now - 60),
        "never expires": token(subject, exp=None),
        "expiry is no number": token(subject, exp=None)
        and hs256_token(SECRET.encode(), claims(subject, exp="soon")),
        "expiry is infinite": hs256_token(SECRET.encode(), claims(subject, exp=float("inf"))),
        "not yet valid": token(subject, nbf=now + 120),
        "issued in the future": token(subject, iat=now + 120),
        "no subject": token(subject, sub=None),
        "subject is no id": token("somebody"),
        "subject is a number": hs256_token(SECRET.encode(), claims(subject, sub=42)),
        "subject is the system": token("00000000-0000-0000-0000-000000000000"),
        "critical extension": token(subject, headers={"crit": ["exp"], "exp": now}),
        "unsigned payload": assemble_token(
            {"alg": "HS256", "b64": False, "crit": ["b64"]}, claims(subject)
        ),
    }


class KeyServer:
    """A JWKS endpoint; counts who asks."""

    def __init__(self) -> None:
        self.keys: list[dict[str, Any]] = []
        self.request_count = 0
        self.authorization_headers: list[str | None] = []
        """The Authorization header of each question."""
        self.is_failing = False
        self.url = ""

    def publish(self, **keys: Any) -> None:
        """Publish these public keys, by id, and no others."""
        self.keys = [public_jwk(key) | {"kid": kid} for kid, key in keys.items()]


def public_jwk(key: Any) -> dict[str, Any]:
    kinds = {
        rsa.RSAPrivateKey: "RS256",
        ec.EllipticCurvePrivateKey: "ES256",
        ed25519.Ed25519PrivateKey: "EdDSA",
    }
    name = next(name for kind, name in kinds.items() if isinstance(key, kind))
    found: dict[str, Any] = get_default_algorithms()[name].to_jwk(key.public_key(), as_dict=True)
    return found | {"use": "sig"}


@contextmanager
def key_server() -> Generator[KeyServer]:
    """Serve keys on a free port of this machine."""
    served = KeyServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.request_count += 1
            served.authorization_headers.append(self.headers.get("Authorization"))
            body = json.dumps({"keys": served.keys}).encode()
            self.send_response(503 if served.is_failing else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with _serving(Handler) as url:
        served.url = url
        yield served


@contextmanager
def endless_key_server() -> Generator[str]:
    """Serve a key set that comes byte by byte and never ends, until its reader goes; give its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                while True:
                    self.wfile.write(b" ")
                    time.sleep(0.02)

        def log_message(self, *_: object) -> None:
            pass

    with _serving(Handler) as url:
        yield url


@contextmanager
def _serving(handler: type[BaseHTTPRequestHandler]) -> Generator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/jwks"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
