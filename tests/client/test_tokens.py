"""Tokens and TLS, against a server that requires them."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest

from chathistory_client import (
    ChatHistoryClient,
    DeadlineExceeded,
    HealthStatus,
    Tls,
    Unauthenticated,
    message,
    new_id,
)
from chathistory_client.bearer_tokens import TokenCache
from tests.support import certificates, issuer
from tests.support.clients import client_of
from tests.support.ports import UNUSED_ADDRESS
from tests.support.servers import serving

JWT: dict[str, Any] = {
    "auth": "jwt",
    "jwt_key": issuer.SECRET,
    "jwt_issuer": issuer.ISSUER,
    "jwt_audience": issuer.AUDIENCE,
}


class TokenSequence:
    """A token source that returns the tokens in turn, then the last one again."""

    def __init__(self, *tokens: str) -> None:
        self._tokens = list(tokens)
        self.call_count = 0

    async def __call__(self) -> str:
        self.call_count += 1
        await asyncio.sleep(0.01)
        return self._tokens.pop(0) if len(self._tokens) > 1 else self._tokens[0]


async def test_rejected_token_is_refreshed_once_and_the_calls_succeed(database_url: str) -> None:
    source = TokenSequence("invalid", issuer.service_token())
    async with (
        serving(database_url, **JWT) as server,
        client_of(server.address, token=source) as client,
    ):
        users = await asyncio.gather(*(client.create_user() for _ in range(5)))

    assert len({user.id for user in users}) == 5
    assert source.call_count == 2


async def test_call_fails_after_one_refresh_if_the_new_token_is_rejected_too(
    database_url: str,
) -> None:
    source = TokenSequence("bad", "worse", "worst")
    async with (
        serving(database_url, **JWT) as server,
        client_of(server.address, token=source) as client,
    ):
        with pytest.raises(Unauthenticated) as caught:
            await client.create_user()
        with pytest.raises(Unauthenticated):
            async with client_of(server.address, token="static") as other:
                await other.create_user()
        assert await client.check_health() is HealthStatus.SERVING

    assert caught.value.reason == "TOKEN_INVALID"
    assert source.call_count == 2


async def test_watch_resumes_with_a_new_token_when_its_token_expires(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.auth.bearer.LEEWAY_S", 0)
    seen: list[int] = []
    async with (
        serving(database_url, **JWT) as server,
        client_of(server.address, token=issuer.service_token()) as backend,
    ):
        user = await backend.create_user()
        reply = await backend.append_messages(user_id=user.id, messages=[message("user", "1")])
        # The client cannot read the expiry, so it learns about it from the rejection only.
        source = TokenSequence(
            issuer.token(user.id, exp=int(time.time()) + 2), issuer.token(user.id)
        )
        monkeypatch.setattr("chathistory_client.bearer_tokens._expiry", lambda _token: float("inf"))

        async def watch(client: ChatHistoryClient) -> None:
            async for item in client.watch_messages(session_id=reply.session_id):
                seen.append(item.seq)
                if item.seq == 2:
                    break

        async with client_of(server.address, token=source) as client, asyncio.timeout(20):
            watching = asyncio.create_task(watch(client))
            while source.call_count < 2:
                await asyncio.sleep(0.05)
            await client.append_messages(
                session_id=reply.session_id, messages=[message("user", "2")]
            )
            await watching

    assert seen == [1, 2]


async def test_token_source_that_never_returns_raises_deadline_exceeded() -> None:
    async def never() -> str:
        await asyncio.sleep(3600)
        raise AssertionError("unreachable")

    async with client_of(UNUSED_ADDRESS, token=never) as client:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="no token"):
            await client.get_user(user_id=new_id(), timeout=0.2)
        assert time.monotonic() - started < 8


async def test_jwt_is_refreshed_before_it_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    def jwt(exp: float) -> str:
        body = base64.urlsafe_b64encode(json.dumps({"exp": exp}).encode()).decode().rstrip("=")
        return f"e30.{body}.sig"

    now = 1_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    source = TokenSequence(jwt(now + 300), jwt(now + 600))
    tokens = TokenCache(source)

    first = await tokens.get()
    now += 269
    assert await tokens.get() == first
    now += 2
    assert await tokens.get() != first
    assert source.call_count == 2


@pytest.mark.parametrize("target", ["history.example:50051", "dns:///10.0.0.7:50051"])
def test_token_for_another_machine_without_tls_raises_value_error(target: str) -> None:
    with pytest.raises(ValueError, match="plaintext"):
        client_of(target, token="secret")
    client_of(target, token="secret", tls=True)
    client_of(target, token="secret", allow_insecure_token=True)


async def test_mutual_tls_accepts_known_certificates_and_rejects_others(
    database_url: str, tmp_path: Path
) -> None:
    authority = certificates.CertificateAuthority()
    files = certificates.write_tls_files(tmp_path, authority.issue(), authority.pem)
    client_certificate = authority.issue("backend")
    async with serving(database_url, **files) as server:
        mutual = Tls(
            root_certificates=authority.pem,
            private_key=client_certificate.key,
            certificate_chain=client_certificate.cert,
        )
        async with client_of(server.address, tls=mutual) as client:
            assert (await client.create_user(name="Ada")).name == "Ada"
        untrusting = Tls(root_certificates=certificates.CertificateAuthority().pem)
        async with client_of(server.address, tls=untrusting, wait_for_ready=False) as client:
            assert await client.check_health() is HealthStatus.UNREACHABLE
