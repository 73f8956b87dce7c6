"""Attacks by reads: searches, contexts, lists and exports."""

from __future__ import annotations

import base64
import random
from typing import TYPE_CHECKING

from chathistory.v1 import (
    document_pb2,
    export_pb2,
    message_pb2,
    session_pb2,
)

from benchmarks.hostile.matrix import BASE_REQUESTS

if TYPE_CHECKING:
    from benchmarks.hostile.assault import Assault

_QUERY_BYTES = 8_190
_WORDS = ("hello", "world", "a", "b", "plan", "office", "needle", "alpha", "über", "日本")
_ABANDONED_AFTER_S = 0.05


def query(kind: str, chance: random.Random) -> str:
    """Return a lexical query that is expensive in one way."""
    match kind:
        case "excluded":
            text = "-x " * 2_700
        case "excluded pair":
            text = "-x -y"
        case "alternatives":
            text = " or ".join(f"word{index}" for index in range(900))
        case "phrase":
            text = '"' + "hello world a b c d e " * 370 + '"'
        case "words":
            text = "hello world a b c d e " * 370
        case "stems":
            text = " ".join(f"{chance.choice(_WORDS)}{index}" for index in range(1_000))
        case _:
            operators = ("-", "or ", '"', "", "", "")
            text = " ".join(
                chance.choice(operators) + chance.choice(_WORDS)
                for _ in range(chance.randint(1, 1_500))
            )
    return text.encode()[:_QUERY_BYTES].decode(errors="ignore")


async def lexical(assault: Assault) -> None:
    """Search the user's messages by words, with queries that are expensive to evaluate."""
    bodies = [
        message_pb2.SearchMessagesRequest(
            user_id=assault.account.user_id,
            query=query(assault.parameter("query"), assault.chance),
            limit=100,
            mode=message_pb2.SEARCH_MODE_LEXICAL,
        ).SerializeToString()
        for _ in range(16)
    ]
    await assault.begin()
    await assault.flood("SearchMessages", bodies, concurrency=assault.parameter("concurrency"))


def _semantic_bodies(assault: Assault, rpc: str, length: int) -> list[bytes]:
    user_id = assault.account.user_id
    bodies = []
    for index in range(64):
        text = f"{index} " + " ".join(assault.chance.choice(_WORDS) for _ in range(length))
        text = text.encode()[:length].decode(errors="ignore")
        if rpc == "SearchDocuments":
            request = document_pb2.SearchDocumentsRequest(user_id=user_id, query=text, limit=100)
            bodies.append(request.SerializeToString())
        else:
            search = message_pb2.SearchMessagesRequest(
                user_id=user_id, query=text, limit=100, mode=message_pb2.SEARCH_MODE_HYBRID
            )
            bodies.append(search.SerializeToString())
    return bodies


async def semantic(assault: Assault) -> None:
    """Search by meaning, with many long queries."""
    rpc = assault.parameter("rpc")
    bodies = _semantic_bodies(assault, rpc, assault.parameter("length"))
    await assault.begin()
    await assault.flood(rpc, bodies, concurrency=assault.parameter("concurrency"), connections=2)


async def abandoned(assault: Assault) -> None:
    """Search by meaning, with deadlines that end before the search does."""
    rpc = assault.parameter("rpc")
    bodies = _semantic_bodies(assault, rpc, 8_000)
    await assault.begin()
    await assault.flood(
        rpc,
        bodies,
        concurrency=assault.parameter("concurrency"),
        timeout_s=_ABANDONED_AFTER_S,
    )


async def contexts(assault: Assault) -> None:
    """Read contexts of sessions that are long in one way."""
    body = message_pb2.GetContextRequest(
        user_id=assault.account.user_id,
        session_id=assault.account.sessions[assault.parameter("session")],
        max_messages=1000,
    ).SerializeToString()
    await assault.begin()
    await assault.flood("GetContext", [body], concurrency=assault.parameter("concurrency"))


async def lists(assault: Assault) -> None:
    """Read the largest pages."""
    account = assault.account
    rpc = assault.parameter("rpc")
    bodies = [BASE_REQUESTS[rpc](account).SerializeToString()]
    if rpc == "ListMessages":
        bodies = [
            message_pb2.ListMessagesRequest(
                user_id=account.user_id, session_id=account.sessions[name], page_size=1000
            ).SerializeToString()
            for name in ("page", "emoji", "objects")
        ]
    await assault.begin()
    await assault.flood(rpc, bodies, concurrency=assault.parameter("concurrency"))


async def exports(assault: Assault) -> None:
    """Export everything, as often as possible."""
    body = export_pb2.ExportUserDataRequest(user_id=assault.account.user_id).SerializeToString()
    await assault.begin()
    await assault.flood("ExportUserData", [body], concurrency=assault.parameter("concurrency"))


async def forged_tokens(assault: Assault) -> None:
    """Page with tokens that the service did not make."""
    account, chance = assault.account, assault.chance
    tokens = [
        base64.urlsafe_b64encode(chance.randbytes(chance.choice((1, 9, 40, 700)))).decode()
        for _ in range(40)
    ]
    tokens += ["abc", "=" * 1024, "A" * 1024, "\u0661" * 100, "-" * 16]
    bodies = [
        session_pb2.ListSessionsRequest(
            user_id=account.user_id, page_token=token[:1024]
        ).SerializeToString()
        for token in tokens
    ]
    await assault.begin()
    await assault.flood("ListSessions", bodies, concurrency=assault.parameter("concurrency"))
