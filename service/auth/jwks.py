"""The keys that an issuer publishes at a URL (JWKS), fetched off the event loop; the last good ones are kept."""

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

from service.auth.bearer import Key, public_key
from service.errors import Unavailable

COOL_DOWN = 30.0
"""Seconds between two fetches that unknown key ids cause: a flood of them must not become a flood of fetches."""
REFRESH = 300.0
"""Age, in seconds, at which keys in use are fetched again, so that a withdrawn one goes."""
FIRST_COOL_DOWN = 2.0
"""The same while there is no key at all: nobody can be served, and the issuer may only be starting."""
FETCH_TIMEOUT = 5.0
"""Seconds that the issuer may let a fetch wait for its next bytes."""
FETCH_SECONDS = 10.0
"""For all of them."""
MAX_BYTES = 1024 * 1024

Fetch = Callable[[], bytes]

_log = structlog.get_logger(__name__)


class Jwks:
    """Keys by their ids; asks the URL again for an id that it does not know, and in the background now and then while in use."""

    def __init__(self, fetch: Fetch) -> None:
        self.generation = 0
        self._fetch = fetch
        self._keys: dict[str | None, Key] = {}
        self._published = b""
        self._asked_at = self._fetched_at = float("-inf")
        self._task: asyncio.Task[None] | None = None

    async def find(self, kid: object) -> Key | None:
        """Return the key with an id; without one, the only key there is.

        Raises:
            Unavailable: no key could be fetched so far.
        """
        key = self._known(kid)
        if key is None:
            self._renew()
            if (task := self._task) is not None:
                # All who wait share the one fetch, and none of them can end it.
                await asyncio.wait((task,))
            key = self._known(kid)
        if key is None and not self._keys:
            raise Unavailable(
                "the keys of the token issuer cannot be fetched; try again",
                reason="KEYS_UNAVAILABLE",
                retry_after=FIRST_COOL_DOWN,
            )
        return key

    def _known(self, kid: object) -> Key | None:
        if kid is None:
            return next(iter(self._keys.values())) if len(self._keys) == 1 else None
        return self._keys.get(kid) if isinstance(kid, str) else None

    def touch(self) -> None:
        """Fetch in the background when the keys have become old."""
        if asyncio.get_running_loop().time() - self._fetched_at >= REFRESH:
            self._renew()

    def close(self) -> None:
        """End a fetch that is under way."""
        if self._task is not None:
            self._task.cancel()

    def _renew(self) -> None:
        """Start a fetch, unless one is under way or was a short while ago."""
        loop = asyncio.get_running_loop()
        pause = COOL_DOWN if self._keys else FIRST_COOL_DOWN
        if self._task is None and loop.time() - self._asked_at >= pause:
            self._asked_at = loop.time()
            self._task = loop.create_task(self._fetched())

    async def _fetched(self) -> None:
        try:
            async with asyncio.timeout(FETCH_SECONDS + FETCH_TIMEOUT):
                published = await asyncio.to_thread(self._fetch)
            if published != self._published:
                self._take(published)
            self._fetched_at = asyncio.get_running_loop().time()
        except Exception as error:  # noqa: BLE001 - the last good keys stay, whatever is wrong with the new ones
            _log.warning(
                "token keys could not be fetched",
                error=type(error).__name__,
                keys_kept=len(self._keys),
            )
        finally:
            self._task = None

    def _take(self, published: bytes) -> None:
        keys = read(published)
        if not keys:
            raise ValueError("no usable key")
        withdrawn = [
            kid for kid, key in self._keys.items() if kid not in keys or not _same(keys[kid], key)
        ]
        self._keys, self._published = keys, published
        if withdrawn:
            self.generation += 1
        _log.info("token keys fetched", keys=len(keys), withdrawn=len(withdrawn))


def _same(one: Key, other: Key) -> bool:
    return one.algorithms == other.algorithms and bool(one.key == other.key)


def read(published: bytes) -> dict[str | None, Key]:
    """Read a key set; what is no key for verifying tokens, or too weak, is left out.

    Raises:
        ValueError, LookupError, TypeError: it is no key set.
    """
    document = json.loads(published)
    keys: dict[str | None, Key] = {}
    for entry in document["keys"]:
        if not isinstance(entry, dict) or entry.get("use", "sig") != "sig":
            continue
        try:
            keys[entry.get("kid")] = _key(entry)
        except Exception as error:  # noqa: BLE001 - a key of another kind must not hide the others
            _log.debug("token key left out", kid=entry.get("kid"), error=type(error).__name__)
    return keys


def _key(entry: dict[str, Any]) -> Key:
    from jwt import PyJWK  # noqa: PLC0415 - an extra

    # A shared secret has no place in what everybody can read; `public_key` refuses it.
    return public_key(PyJWK(entry).key, entry.get("alg"))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Whoever can redirect could lead to keys of their own."""

    def redirect_request(self, *_: object) -> None:
        return None


def _body(reply: HTTPResponse) -> bytes:
    """Read a reply, of which each piece may come in time and all of them never end.

    Raises:
        ValueError: it is too large.
        TimeoutError: it takes too long.
    """
    give_up = time.monotonic() + FETCH_SECONDS
    body = b""
    while piece := reply.read1(MAX_BYTES + 1 - len(body)):
        body += piece
        if len(body) > MAX_BYTES:
            raise ValueError("the key set is too large")
        if time.monotonic() > give_up:
            raise TimeoutError
    return body


def over_http(url: str, ca: Path | None = None, token_file: Path | None = None) -> Fetch:
    """Return how to fetch a URL, to be called in a thread.

    Args:
        url: HTTPS; plain HTTP only on this machine, which the configuration sees to.
        ca: The authorities that the server's certificate may come from; None for the system's.
        token_file: A bearer token to show, read anew each time: Kubernetes rotates it.

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
        request = urllib.request.Request(url, headers=headers)  # noqa: S310 - the configuration has checked it
        with opener.open(request, timeout=FETCH_TIMEOUT) as reply:
            return _body(reply)

    return fetch
