"""Bearer tokens: the callers that they authenticate, and the tokens that are rejected."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import grpc
import pytest
from chathistory.v1 import message_pb2, session_pb2, user_pb2
from chathistory.v1.chat_history_service_pb2 import DESCRIPTOR
from cryptography.hazmat.primitives.asymmetric import rsa

from service.auth import bearer, credentials, jwks
from service.config import BadConfiguration
from service.rpc import pipeline
from tests.support import issuer
from tests.support.chat import Chat, new_id
from tests.support.failures import Failure, assert_fails, failure_of
from tests.support.issuer import (
    KeyServer,
    bearer_metadata,
    ec_key,
    ed_key,
    rsa_key,
    service_token,
    token,
)
from tests.support.servers import channel, connected, serving, settings
from tests.support.untyped_messages import Message, User

HS = {
    "auth": "jwt",
    "jwt_key": issuer.SECRET,
    "jwt_issuer": issuer.ISSUER,
    "jwt_audience": issuer.AUDIENCE,
}
USER = new_id()


def list_sessions(stub: Any, shown: list[tuple[str, str]], user_id: str = "") -> Any:
    return stub.ListSessions(session_pb2.ListSessionsRequest(user_id=user_id), metadata=shown)


@pytest.mark.case(n=21)
async def test_every_invalid_token_gets_the_same_error(database_url: str) -> None:
    answers: dict[str, Failure] = {}
    async with serving(database_url, **HS) as server, connected(server.address) as stub:
        await list_sessions(stub, bearer_metadata(token(USER)))
        for kind, bad in issuer.bad_tokens(USER).items():
            answers[kind] = await assert_fails(
                list_sessions(stub, bearer_metadata(bad)), "TOKEN_INVALID"
            )
        good = token(USER)
        shown: dict[str, list[tuple[str, str]]] = {
            "none": [],
            "basic": [("authorization", f"Basic {good}")],
            "bare": [("authorization", good)],
            "two": bearer_metadata(good) + bearer_metadata(token(new_id())),
            "elsewhere": [("x-authorization", f"Bearer {good}")],
        }
        for kind, metadata in shown.items():
            answers[kind] = await assert_fails(list_sessions(stub, metadata), "TOKEN_INVALID")
        await list_sessions(stub, [("authorization", f"bearer  {good}")])
    assert len(set(map(str, answers.values()))) == 1, "an error reveals more than the others"


async def test_flood_of_invalid_tokens_is_answered_late(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "PROMPT_FAILURES", 3)
    monkeypatch.setattr(pipeline, "FAILURE_DELAY_S", 3600)
    metadata = bearer_metadata("invalid")
    async with serving(database_url, **HS) as server, connected(server.address) as stub:
        calls = [list_sessions(stub, metadata) for _ in range(5)]
        async with asyncio.timeout(30):
            while sum(call.done() for call in calls) < 3:
                await asyncio.sleep(0.01)
        await list_sessions(stub, bearer_metadata(token(USER)))
        answered = [call for call in calls if call.done()]
        assert len(answered) == 3
        for call in answered:
            await assert_fails(call, "TOKEN_INVALID")
        for call in calls:
            call.cancel()


async def test_user_id_is_the_tokens_subject(database_url: str) -> None:
    async with serving(database_url, **HS) as server, connected(server.address) as stub:
        created = await stub.CreateUser(
            user_pb2.CreateUserRequest(user=User()), metadata=bearer_metadata(service_token())
        )
        mine = bearer_metadata(token(created.user.id.upper()))
        appended = await stub.AppendMessages(
            message_pb2.AppendMessagesRequest(messages=[Message(role=1, content="hi")]),
            metadata=mine,
        )
        assert [session.id for session in (await list_sessions(stub, mine)).sessions] == [
            appended.session_id
        ]
        await assert_fails(
            list_sessions(stub, bearer_metadata(token(USER)), created.user.id), "USER_MISMATCH"
        )
        request = user_pb2.CreateUserRequest(user=User())
        await assert_fails(stub.CreateUser(request, metadata=mine), "SERVICE_ONLY")


@pytest.mark.parametrize(
    "changes",
    [
        {"scope": "a chathistory.service b"},
        {"scope": ["chathistory.service"]},
        {"scp": "chathistory.service"},
    ],
)
async def test_scope_in_a_token_makes_the_caller_a_service(
    database_url: str, changes: dict[str, Any]
) -> None:
    async with serving(database_url, **HS) as server, connected(server.address) as stub:
        await stub.ListUsers(
            user_pb2.ListUsersRequest(), metadata=bearer_metadata(token("backend", **changes))
        )
        for near in (
            "chathistory.services",
            "xchathistory.service",
            "chathistory,service",
            7,
            {"chathistory.service": 1},
        ):
            call = stub.ListUsers(
                user_pb2.ListUsersRequest(), metadata=bearer_metadata(token(USER, scope=near))
            )
            await assert_fails(call, "SERVICE_ONLY")


async def test_cached_token_is_rejected_after_its_expiry(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bearer, "LEEWAY_S", 0.0)
    async with serving(database_url, **HS) as server, connected(server.address) as stub:
        ends = int(time.time()) + 5
        short = bearer_metadata(token(USER, exp=ends))
        await list_sessions(stub, short)
        await asyncio.sleep(ends - time.time() + 0.1)
        await assert_fails(list_sessions(stub, short), "TOKEN_INVALID")


async def test_watch_ends_when_its_token_expires(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bearer, "LEEWAY_S", 0.0)
    async with serving(database_url, **HS) as server, connected(server.address) as stub:
        created_user = await stub.CreateUser(
            user_pb2.CreateUserRequest(user=User()), metadata=bearer_metadata(service_token())
        )
        short = bearer_metadata(token(created_user.user.id, exp=int(time.time()) + 5))
        created = await stub.CreateSession(session_pb2.CreateSessionRequest(), metadata=short)
        call = stub.WatchMessages(
            message_pb2.WatchMessagesRequest(session_id=created.session.id),
            metadata=short,
            timeout=30,
        )
        assert (await failure_of(_drain(call))).code is grpc.StatusCode.UNAUTHENTICATED


async def _drain(call: Any) -> None:
    async for _ in call:
        pass


async def test_external_id_in_a_token_must_belong_to_a_user(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        serving(database_url, jwt_subject="external_id", **HS) as server,
        connected(server.address) as stub,
    ):
        mine = bearer_metadata(token("auth0|7"))
        await assert_fails(list_sessions(stub, mine), "TOKEN_INVALID")
        await assert_fails(list_sessions(stub, bearer_metadata(token("a\0b"))), "TOKEN_INVALID")
        user = User(external_id="auth0|7")
        created = await stub.CreateUser(
            user_pb2.CreateUserRequest(user=user), metadata=bearer_metadata(service_token())
        )
        got = await stub.GetUser(user_pb2.GetUserRequest(), metadata=mine)
        assert got.user.id == created.user.id
        await assert_fails(
            list_sessions(stub, bearer_metadata(token(created.user.id))), "TOKEN_INVALID"
        )
        await stub.DeleteUser(
            user_pb2.DeleteUserRequest(user_id=created.user.id),
            metadata=bearer_metadata(service_token()),
        )
        ahead = time.time() + 60
        monkeypatch.setattr("service.auth.authenticators.time.time", lambda: ahead)
        await assert_fails(list_sessions(stub, mine), "TOKEN_INVALID")


@pytest.mark.parametrize(
    ("key", "alg"),
    [(rsa_key(), "RS256"), (rsa_key(), "PS512"), (ec_key(), "ES256"), (ed_key(), "EdDSA")],
)
async def test_token_is_verified_with_a_public_key_file(
    database_url: str, tmp_path: Path, key: Any, alg: str
) -> None:
    pem = tmp_path / "key.pem"
    pem.write_text(issuer.public_pem(key))
    async with (
        serving(database_url, **HS | {"jwt_key": str(pem)}) as server,
        connected(server.address) as stub,
    ):
        await list_sessions(stub, bearer_metadata(token(USER, key=key, alg=alg)))
        as_secret = issuer.hs256_token(pem.read_bytes(), issuer.claims(USER))
        await assert_fails(list_sessions(stub, bearer_metadata(as_secret)), "TOKEN_INVALID")
        as_secret = issuer.hs256_token(pem.read_bytes().strip(), issuer.claims(USER))
        await assert_fails(list_sessions(stub, bearer_metadata(as_secret)), "TOKEN_INVALID")
        await assert_fails(
            list_sessions(stub, bearer_metadata(token(USER, key=rsa_key(1), alg="RS256"))),
            "TOKEN_INVALID",
        )


@pytest.fixture
def served() -> Generator[KeyServer]:
    with issuer.key_server() as started:
        yield started


def by_url(served: KeyServer, **more: Any) -> dict[str, Any]:
    return HS | {"jwt_key": None, "jwks_url": served.url} | more


def signed(
    kid: str, key: Any, alg: str = "RS256", subject: str = USER, **changes: Any
) -> list[tuple[str, str]]:
    return bearer_metadata(token(subject, key=key, alg=alg, headers={"kid": kid}, **changes))


async def test_token_is_verified_with_keys_from_a_url(database_url: str, served: KeyServer) -> None:
    served.publish(a=rsa_key(), b=ec_key())
    async with serving(database_url, **by_url(served)) as server, connected(server.address) as stub:
        await asyncio.gather(*(list_sessions(stub, signed("a", rsa_key())) for _ in range(20)))
        await list_sessions(stub, signed("b", ec_key(), "ES256"))
        assert served.request_count == 1
        await assert_fails(list_sessions(stub, signed("b", rsa_key())), "TOKEN_INVALID")
        await assert_fails(
            list_sessions(stub, bearer_metadata(token(USER, key=rsa_key(), alg="RS256"))),
            "TOKEN_INVALID",
        )
        await assert_fails(
            list_sessions(stub, signed("a", issuer.SECRET, "HS256")), "TOKEN_INVALID"
        )


@pytest.mark.case(n=21)
async def test_flood_of_unknown_key_ids_causes_one_fetch_per_cool_down(
    database_url: str, served: KeyServer
) -> None:
    served.publish(a=rsa_key())
    async with serving(database_url, **by_url(served)) as server, connected(server.address) as stub:
        await list_sessions(stub, signed("a", rsa_key()))
        kids = itertools.count()
        for _ in range(10):
            flood = (list_sessions(stub, signed(f"x{next(kids)}", rsa_key(1))) for _ in range(50))
            answers = await asyncio.gather(*map(failure_of, flood))
            assert {answer.reason for answer in answers} == {"TOKEN_INVALID"}
        assert served.request_count == 1


async def test_new_key_is_fetched_and_withdrawn_key_is_rejected(
    database_url: str, served: KeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.publish(a=rsa_key())
    async with serving(database_url, **by_url(served)) as server, connected(server.address) as stub:
        await list_sessions(stub, signed("a", rsa_key()))
        served.publish(b=rsa_key(1))
        await assert_fails(
            list_sessions(stub, signed("b", rsa_key(1))), "TOKEN_INVALID"
        )  # Cooling down.
        await list_sessions(stub, signed("a", rsa_key()))
        monkeypatch.setattr(jwks, "COOL_DOWN_S", 0.0)
        await list_sessions(stub, signed("b", rsa_key(1)))
        await assert_fails(list_sessions(stub, signed("a", rsa_key())), "TOKEN_INVALID")


async def test_last_good_keys_are_kept_when_fetches_fail(
    database_url: str, served: KeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwks, "COOL_DOWN_S", 0.0)
    monkeypatch.setattr(jwks, "REFRESH_AFTER_S", 0.0)
    served.publish(a=rsa_key())
    async with serving(database_url, **by_url(served)) as server, connected(server.address) as stub:
        await list_sessions(stub, signed("a", rsa_key()))
        for broken in (True, False):
            served.is_failing, served.keys = broken, []
            for n in range(3):
                await list_sessions(stub, signed("a", rsa_key(), jti=f"{broken}{n}"))
                await asyncio.sleep(0.05)
        assert served.request_count > 3


async def test_calls_before_the_first_key_are_unavailable(
    database_url: str, served: KeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.is_failing = True
    async with serving(database_url, **by_url(served)) as server, connected(server.address) as stub:
        assert (
            await failure_of(list_sessions(stub, signed("a", rsa_key())))
        ).reason == "KEYS_UNAVAILABLE"
        served.is_failing = False
        served.publish(a=rsa_key())
        request_count = served.request_count
        assert (
            await failure_of(list_sessions(stub, signed("a", rsa_key())))
        ).reason == "KEYS_UNAVAILABLE"
        assert served.request_count == request_count  # Cooling down.
        monkeypatch.setattr(jwks, "FIRST_COOL_DOWN_S", 0.0)
        await list_sessions(stub, signed("a", rsa_key()))


async def test_failed_refresh_is_retried_after_the_cool_down(
    database_url: str, served: KeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only when the keys are old again: a withdrawn key must not be valid for that long."""
    served.publish(a=rsa_key())
    async with serving(database_url, **by_url(served)) as server, connected(server.address) as stub:
        old = signed("a", rsa_key())
        await list_sessions(stub, old)
        served.publish(b=rsa_key(1))
        served.is_failing = True
        keys = server.authenticate._keys  # type: ignore[attr-defined]
        keys._fetched_at = keys._attempted_at = float("-inf")  # A long time ago.
        await list_sessions(stub, old)
        async with asyncio.timeout(30):
            while served.request_count < 2 or keys._task is not None:
                await asyncio.sleep(0.01)
        served.is_failing = False
        await list_sessions(stub, old)
        assert served.request_count == 2
        monkeypatch.setattr(jwks, "COOL_DOWN_S", 0.0)
        async with asyncio.timeout(30):
            while (await status_of(list_sessions(stub, old))) == "OK":
                await asyncio.sleep(0.01)


async def status_of(call: Any) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


def test_endless_key_set_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It arrives byte by byte, each in time; the thread that reads it must not be lost."""
    monkeypatch.setattr(jwks, "FETCH_TIMEOUT_S", 0.3)
    with issuer.endless_key_server() as url, pytest.raises(TimeoutError):
        jwks.over_http(url)()


def test_key_set_above_the_size_limit_is_rejected(served: KeyServer) -> None:
    served.keys = [{"kid": "x" * jwks.MAX_KEY_SET_BYTES}]
    with pytest.raises(ValueError, match="too large"):
        jwks.over_http(served.url)()


async def test_kubernetes_service_account_can_be_a_service(
    database_url: str, served: KeyServer, tmp_path: Path
) -> None:
    shown = tmp_path / "token"
    shown.write_text("the pod's own token\n")
    subject = "system:serviceaccount:chat:backend"
    more = {
        "jwt_service_subjects": f"system:serviceaccount:ops:import, {subject}",
        "jwks_token_file": shown,
    }
    served.publish(k8s=rsa_key())
    async with (
        serving(database_url, **by_url(served, **more)) as server,
        connected(server.address) as stub,
    ):

        def account(name: str) -> list[tuple[str, str]]:
            _, _, namespace, account = name.split(":")
            pod = {"name": f"{account}-6d4cf56db6-x7k2p", "uid": new_id()}
            about = {
                "namespace": namespace,
                "serviceaccount": {"name": account, "uid": new_id()},
                "pod": pod,
            }
            now = int(time.time())
            changes: dict[str, Any] = {
                "aud": [issuer.AUDIENCE],
                "nbf": now,
                "jti": new_id(),
                "kubernetes.io": about | {"warnafter": now + 3607},
            }
            return signed("k8s", rsa_key(), subject=name, **changes)

        await stub.ListUsers(user_pb2.ListUsersRequest(), metadata=account(subject))
        assert served.authorization_headers == ["Bearer the pod's own token"]
        for other in ("system:serviceaccount:chat:default", "system:serviceaccount:else:backend"):
            await assert_fails(
                stub.ListUsers(user_pb2.ListUsersRequest(), metadata=account(other)),
                "TOKEN_INVALID",
            )


@pytest.mark.case(n=1)
async def test_malformed_bytes_without_a_token_are_unauthenticated(database_url: str) -> None:
    path = f"/{DESCRIPTOR.services_by_name['ChatHistoryService'].full_name}/AppendMessages"
    async with serving(database_url, **HS) as server, channel(server.address) as opened:
        call = opened.unary_unary(
            path, request_serializer=lambda data: data, response_deserializer=lambda data: data
        )
        for bytes_ in (b"\xff\xff\xff", b"\x0a\x02\xc3\x28"):
            await assert_fails(call(bytes_), "TOKEN_INVALID")
            await assert_fails(
                call(bytes_, metadata=bearer_metadata(token(USER))), "MALFORMED_REQUEST"
            )


async def test_authentication_precedes_validation(database_url: str) -> None:
    async with serving(database_url, **HS) as server, connected(server.address) as stub:
        await assert_fails(
            stub.GetSession(session_pb2.GetSessionRequest(session_id="no id")), "TOKEN_INVALID"
        )


async def test_cache_of_verified_tokens_is_bounded(
    monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    monkeypatch.setattr("service.auth.authenticators.MAX_CACHED_TOKENS", 3)
    async with serving(database_url, **HS) as server, connected(server.address) as stub:
        for n in range(10):
            await list_sessions(stub, bearer_metadata(token(USER, jti=str(n))))
        known = server.authenticate._cache  # type: ignore[attr-defined]
        assert len(known) == 3
        assert all(isinstance(key, bytes) for key in known)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "short secret": ({"jwt_key": "hunter2"}, "fewer than 16 bytes"),
    "missing file": ({"jwt_key": "/nowhere/key.pem"}, "No such file"),
    "secret like a file's name": (
        {"jwt_key": "/hunter2hunter2hunter2hunter2hunter2hunter2"},
        "openssl",
    ),
    "folder": ({"jwt_key": "/"}, "directory"),
    "private key": ({"jwt_key": issuer.private_pem(ec_key())}, "private key"),
    "broken pem": (
        {"jwt_key": "-----BEGIN PUBLIC KEY-----\nhunter2\n-----END PUBLIC KEY-----"},
        "not a public key",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_unusable_key_is_reported_without_its_content(case: str) -> None:
    values, words = BAD[case]
    with pytest.raises(BadConfiguration, match=words) as caught:
        credentials.check(settings(**HS | values))
    assert "hunter2" not in str(caught.value)
    assert len(caught.value.problems) == 1
    assert "CHAT_HISTORY_JWT_KEY" in caught.value.problems[0]


@pytest.mark.parametrize(
    "values",
    [
        {"auth": "jwt"},
        {"jwt_key": issuer.SECRET},
        HS | {"jwks_url": "https://issuer.example/jwks"},
        HS | {"jwt_key": None, "jwks_url": "http://issuer.example/jwks"},
        HS | {"jwt_key": None, "jwks_url": "file:///etc/passwd"},
        HS | {"jwt_key": None, "jwks_url": "https://user:password@issuer.example/jwks"},
        HS | {"jwt_key": None, "jwks_url": "https://issuer.example/jwks", "jwt_audience": None},
        {"listen": "0.0.0.0:0"},
        {"listen": "[::]:0"},
        {"tls_cert": "cert.pem"},
        {"tls_client_ca": "ca.pem"},
        {"listen": "0.0.0.0:0", "tls_cert": "cert.pem", "tls_key": "key.pem"},
    ],
)
def test_contradicting_settings_are_rejected(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"CHAT_HISTORY_|jwks_url") as caught:
        settings(**values)
    assert issuer.SECRET not in str(caught.value)


def test_shared_secret_can_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(issuer.SECRET + "\n")
    assert bearer.load_key(str(tmp_path / "secret"))[0].key == issuer.SECRET.encode()


def test_weak_and_unsupported_published_keys_are_skipped() -> None:
    weak = issuer.public_jwk(rsa.generate_private_key(65537, 1024)) | {"kid": "weak"}
    good = issuer.public_jwk(rsa_key()) | {"kid": "good"}
    other = good | {"kid": "other", "use": "enc"}
    mixed = good | {"kid": "mixed", "alg": "HS256"}
    shared = {"kty": "oct", "k": "c2VjcmV0", "kid": "shared", "alg": "HS256"}
    narrowed = good | {"kid": "narrowed", "alg": "RS512"}
    keys = jwks.parse_key_set(
        json.dumps({"keys": [weak, good, other, mixed, shared, narrowed, 7, {"kty": "?"}]}).encode()
    )
    assert set(keys) == {"good", "narrowed"}
    assert keys["narrowed"].algorithms == ("RS512",)


async def test_tokens_of_the_token_command_are_accepted(database_url: str, tmp_path: Path) -> None:
    async with serving(database_url, **HS) as server, connected(server.address) as stub:
        made_token = bearer.make_token(
            issuer.SECRET,
            "dev",
            lifetime_s=60,
            issuer=issuer.ISSUER,
            audience=issuer.AUDIENCE,
            is_service=True,
        )
        await Chat(stub, "").stub.ListUsers(
            user_pb2.ListUsersRequest(), metadata=bearer_metadata(made_token)
        )
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    private.write_text(issuer.private_pem(ed_key()))
    public.write_text(issuer.public_pem(ed_key()))
    async with (
        serving(database_url, **HS | {"jwt_key": str(public)}) as server,
        connected(server.address) as stub,
    ):
        made_token = bearer.make_token(
            str(private),
            USER,
            lifetime_s=60,
            issuer=issuer.ISSUER,
            audience=issuer.AUDIENCE,
            is_service=False,
        )
        await list_sessions(stub, bearer_metadata(made_token))
