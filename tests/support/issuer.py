"""An issuer of tokens: keys of every kind, genuine and forged tokens, and a JWKS endpoint."""

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
    """Return the key with this number; each number has a key of its own."""
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
    """Return the claims of a valid token, with changes; a change to None removes the claim.

    The token is valid for a day: some are issued when pytest collects the tests, and on a slow
    machine the last of these tests begins much later.
    """
    now = int(time.time())
    changed = {
        "sub": subject,
        "iss": ISSUER,
        "aud": AUDIENCE,
        "iat": now,
        "exp": now + 86_400,
    } | changes
    return {name: value for name, value in changed.items() if value is not None}


def token(
    subject: str,
    *,
    key: Any = SECRET,
    alg: str = "HS256",
    headers: Mapping[str, Any] | None = None,
    **changes: Any,
) -> str:
    """Issue a token; by default a valid one, signed with the shared secret."""
    return jwt.encode(claims(subject, **changes), key, alg, headers=dict(headers or {}))


def service_token(subject: str = "backend", **changes: Any) -> str:
    return token(subject, scope=f"openid {SERVICE}", **changes)


def assemble_token(
    header: Mapping[str, Any], body: Mapping[str, Any], signature: bytes = b""
) -> str:
    """Join the parts of a token without checking or signing them."""
    return ".".join(
        _b64(part) for part in (json.dumps(header).encode(), json.dumps(body).encode(), signature)
    )


def hs256_token(secret: bytes, body: Mapping[str, Any]) -> str:
    """Sign with any bytes, even with a public key, which PyJWT refuses as a secret."""
    signed = assemble_token({"alg": "HS256", "typ": "JWT"}, body).rpartition(".")[0]
    return signed + "." + _b64(hmac.digest(secret, signed.encode(), hashlib.sha256))


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def bearer_metadata(value: str) -> list[tuple[str, str]]:
    """Return the call metadata that carries a token."""
    return [("authorization", f"Bearer {value}")]


def bad_tokens(subject: str) -> dict[str, str]:
    """Return tokens that a service configured with SECRET, ISSUER and AUDIENCE must reject."""
    now = int(time.time())
    head, body, signature = token(subject).split(".")
    elevated = json.dumps(claims(subject, scope=SERVICE)).encode()
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
        "claims changed": f"{head}.{_b64(elevated)}.{signature}",
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
    """A JWKS endpoint that counts its requests."""

    def __init__(self) -> None:
        self.keys: list[dict[str, Any]] = []
        self.request_count = 0
        self.authorization_headers: list[str | None] = []
        """The Authorization header of each request."""
        self.is_failing = False
        self.url = ""

    def publish(self, **keys: Any) -> None:
        """Replace the published keys by the public keys of these, named by key id."""
        self.keys = [public_jwk(key) | {"kid": kid} for kid, key in keys.items()]


def public_jwk(key: Any) -> dict[str, Any]:
    kinds = {
        rsa.RSAPrivateKey: "RS256",
        ec.EllipticCurvePrivateKey: "ES256",
        ed25519.Ed25519PrivateKey: "EdDSA",
    }
    name = next(name for kind, name in kinds.items() if isinstance(key, kind))
    jwk: dict[str, Any] = get_default_algorithms()[name].to_jwk(key.public_key(), as_dict=True)
    return jwk | {"use": "sig"}


@contextmanager
def key_server() -> Generator[KeyServer]:
    """Serve keys on a free port of the loopback interface."""
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
    """Serve a key set that is sent byte by byte and never ends; provide its URL.

    The server stops sending once the reader has disconnected.
    """

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
