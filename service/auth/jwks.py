"""`Jwks`: the key set that an issuer publishes at a URL (JWKS), fetched off the event loop."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
import urllib.request
from collections.abc import Callable
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import structlog

from service.auth.bearer import VerificationKey, public_key
from service.errors import Unavailable

COOL_DOWN_S = 30.0
"""Minimum time between two fetches, so that a flood of unknown key ids causes few of them."""
FIRST_COOL_DOWN_S = 2.0
"""The same until the first key: no token can be verified yet, and the issuer may be starting."""
REFRESH_AFTER_S = 300.0
"""Age at which keys in use are fetched again, so that a withdrawn key is dropped."""
READ_TIMEOUT_S = 5.0
"""Time that a fetch waits for the issuer's next bytes."""
FETCH_TIMEOUT_S = 10.0
"""Limit of a whole fetch."""
MAX_KEY_SET_BYTES = 1024 * 1024

Fetch = Callable[[], bytes]

_log = structlog.get_logger(__name__)


class Jwks:
    """The published keys by id.

    They are fetched again for an unknown id, and in the background while they are in use. If a
    fetch fails, the last good keys stay.
    """

    def __init__(self, fetch: Fetch) -> None:
        self.generation = 0
        self._fetch = fetch
        self._keys: dict[str | None, VerificationKey] = {}
        self._published = b""
        self._attempted_at = self._fetched_at = float("-inf")
        self._task: asyncio.Task[None] | None = None

    async def find(self, kid: object) -> VerificationKey | None:
        """Return the key with an id; without an id, the key of a set that has only one.

        Raises:
            Unavailable: no key has been fetched yet.
        """
        key = self._known_key(kid)
        if key is None:
            self._start_fetch()
            if (task := self._task) is not None:
                # All callers share one fetch, and none of them can cancel it.
                await asyncio.wait((task,))
            key = self._known_key(kid)
        if key is None and not self._keys:
            raise Unavailable(
                "the token issuer's keys cannot be fetched; retry",
                reason="KEYS_UNAVAILABLE",
                retry_after=FIRST_COOL_DOWN_S,
            )
        return key

    def _known_key(self, kid: object) -> VerificationKey | None:
        if kid is None:
            return next(iter(self._keys.values())) if len(self._keys) == 1 else None
        return self._keys.get(kid) if isinstance(kid, str) else None

    def refresh_if_old(self) -> None:
        """Fetch in the background if the keys are old."""
        if asyncio.get_running_loop().time() - self._fetched_at >= REFRESH_AFTER_S:
            self._start_fetch()

    def close(self) -> None:
        """Cancel a fetch in progress."""
        if self._task is not None:
            self._task.cancel()

    def _start_fetch(self) -> None:
        """Start a fetch, unless one is in progress or the last one was too recent."""
        loop = asyncio.get_running_loop()
        cool_down_s = COOL_DOWN_S if self._keys else FIRST_COOL_DOWN_S
        if self._task is None and loop.time() - self._attempted_at >= cool_down_s:
            self._attempted_at = loop.time()
            self._task = loop.create_task(self._refresh())

    async def _refresh(self) -> None:
        try:
            async with asyncio.timeout(FETCH_TIMEOUT_S + READ_TIMEOUT_S):
                published = await asyncio.to_thread(self._fetch)
            if published != self._published:
                self._replace_keys(published)
            self._fetched_at = asyncio.get_running_loop().time()
        except Exception as error:  # noqa: BLE001 - the last good keys stay, whatever the failure
            _log.warning(
                "token keys could not be fetched",
                error=type(error).__name__,
                keys_kept=len(self._keys),
            )
        finally:
            self._task = None

    def _replace_keys(self, published: bytes) -> None:
        keys = parse_key_set(published)
        if not keys:
            raise ValueError("the key set has no usable key")
        withdrawn = [
            kid
            for kid, key in self._keys.items()
            if kid not in keys or not _are_equal(keys[kid], key)
        ]
        self._keys, self._published = keys, published
        if withdrawn:
            self.generation += 1
        _log.info("token keys fetched", keys=len(keys), withdrawn=len(withdrawn))


def _are_equal(key: VerificationKey, other: VerificationKey) -> bool:
    return key.algorithms == other.algorithms and bool(key.key == other.key)


def parse_key_set(published: bytes) -> dict[str | None, VerificationKey]:
    """Parse a key set; keys that do not verify tokens, or are too weak, are skipped.

    Raises:
        ValueError, LookupError, TypeError: it is not a key set.
    """
    document = json.loads(published)
    keys: dict[str | None, VerificationKey] = {}
    for entry in document["keys"]:
        if not isinstance(entry, dict) or entry.get("use", "sig") != "sig":
            continue
        try:
            keys[entry.get("kid")] = _parse_key(entry)
        except Exception as error:  # noqa: BLE001 - a key of another kind must not hide the others
            _log.debug("token key skipped", kid=entry.get("kid"), error=type(error).__name__)
    return keys


def _parse_key(entry: dict[str, Any]) -> VerificationKey:
    from jwt import PyJWK  # noqa: PLC0415 - an extra

    # `public_key` rejects shared secrets, which must not be in a published document.
    return public_key(PyJWK(entry).key, entry.get("alg"))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it could lead to an attacker's keys."""

    def redirect_request(self, *_: object) -> None:
        return None


def _read_body(response: HTTPResponse) -> bytes:
    """Read a response within FETCH_TIMEOUT_S, which the timeout of each read alone cannot ensure.

    Raises:
        ValueError: it is too large.
        TimeoutError: it takes too long.
    """
    deadline = time.monotonic() + FETCH_TIMEOUT_S
    body = b""
    while block := response.read1(MAX_KEY_SET_BYTES + 1 - len(body)):
        body += block
        if len(body) > MAX_KEY_SET_BYTES:
            raise ValueError(f"the key set is too large: more than {MAX_KEY_SET_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    return body


def over_http(url: str, ca: Path | None = None, token_file: Path | None = None) -> Fetch:
    """Return a function that fetches a URL; it blocks, so it must be called in a thread.

    Args:
        url: HTTPS; plain HTTP only on this machine, which the settings enforce.
        ca: Authorities that may sign the issuer's certificate; None for the system's.
        token_file: A bearer token to send. It is read for each fetch, since Kubernetes rotates it.

    Raises:
        ValueError: `ca` cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise ValueError(f"the authorities in {ca} cannot be read: {error.strerror}") from None
    proxy = [urllib.request.ProxyHandler({})] if urlsplit(url).scheme == "http" else []
    opener = urllib.request.build_opener(
        _NoRedirect(), urllib.request.HTTPSHandler(context=context), *proxy
    )

    def fetch() -> bytes:
        headers = {"Accept": "application/jwk-set+json, application/json, */*;q=0.1"}
        if token_file is not None:
            headers["Authorization"] = f"Bearer {token_file.read_text().strip()}"
        request = urllib.request.Request(url, headers=headers)  # noqa: S310 - the settings check it
        with opener.open(request, timeout=READ_TIMEOUT_S) as response:
            return _read_body(response)

    return fetch
