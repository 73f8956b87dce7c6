"""docs/how-to/fastapi.md, followed word for word: what it says to write is put together, run and used."""

from __future__ import annotations

import ast
import inspect
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any
from uuid import UUID, uuid4

import pytest
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from chathistory_client import ChatHistoryClient
from service.server import Server
from tests.support.chatbots import Browser, serving_http
from tests.support.clients import client_of

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "fastapi.md").read_text()
OTHERS = "00000000-0000-4000-8000-000000000009"


def blocks(heading: str) -> list[str]:
    """Return the code of a section, without what stands there as the code of before."""
    [section] = re.findall(rf"^## {heading}.*?(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return [
        code
        for said, code in re.findall(
            r"(.*?)^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL
        )
        if "Before:" not in said
    ]


class ChatIn(BaseModel):
    """What the backend's developer has already; with the field that the page says to add."""

    message: str
    session_id: UUID | None = None
    message_id: UUID | None = None


class ChatOut(BaseModel):
    answer: str
    session_id: UUID


async def llm(conversation: list[dict[str, str]]) -> str:
    return f"You have said {sum(each['role'] == 'user' for each in conversation)} things."


async def somebody(request: Request) -> Any:
    return SimpleNamespace(id=request.headers["x-user"])


def developers_own() -> dict[str, Any]:
    """Return the names that an existing backend has: its framework's, its models', its language model."""
    return {
        "Annotated": Annotated, "AsyncIterator": AsyncIterator, "ChatIn": ChatIn, "ChatOut": ChatOut, "Depends": Depends,
        "FastAPI": FastAPI, "HTTPException": HTTPException, "JSONResponse": JSONResponse, "MyUser": SimpleNamespace,
        "Request": Request, "User": Annotated[Any, Depends(somebody)], "asynccontextmanager": asynccontextmanager,
        "llm": llm, "os": os,
    }  # fmt: skip


async def written(namespace: dict[str, Any], *headings: str) -> None:
    """Run the code of sections, in their order."""
    for heading in headings:
        for code in blocks(heading):
            compiled = compile(
                code, f"fastapi.md, {heading}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
            )
            done = eval(compiled, namespace)
            if inspect.iscoroutine(done):
                await done


async def test_a_backend_as_the_page_says(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTORY", server.address)
    monkeypatch.setenv("GRPC_ENABLE_HTTP_PROXY", "0")
    namespace = developers_own()
    await written(namespace, "3", "4", "5", "7")
    async with (
        client_of(server.address) as client,
        serving_http(namespace["app"]) as address,
        Browser(address) as browser,
    ):
        me = await namespace["history_user"](client, SimpleNamespace(id=7, name="Ada"))
        assert me == await namespace["history_user"](client, SimpleNamespace(id=7, name="Ada"))
        browser.headers["x-user"] = me
        first = await browser.ask("Hello", message_id=(again := str(uuid4())))
        assert first == await browser.ask("Hello", message_id=again)
        second = await browser.ask("And?", session_id=first["session_id"])
        assert second == {"answer": "You have said 2 things.", "session_id": first["session_id"]}
        page = await client.list_messages(user_id=me, session_id=first["session_id"])
        assert [each.seq for each in page.messages] == [1, 2, 3, 4]
        foreign = await browser.post("/chat", json={"message": "?", "session_id": OTHERS})
        assert (foreign.status_code, foreign.json()["reason"]) == (404, "SESSION_NOT_FOUND")
        assert (await browser.get("/db-health")).json() == {"database": "serving"}


async def test_old_conversations_come_along_as_the_page_says(client: ChatHistoryClient) -> None:
    now = datetime.now(UTC)
    user, session = (
        SimpleNamespace(id=uuid4(), login="ada"),
        SimpleNamespace(id=uuid4(), title="Of old"),
    )
    rows = [
        SimpleNamespace(id=uuid4(), role="user", content=f"{n}", created_at=now) for n in range(250)
    ]

    async def one(thing: Any) -> AsyncIterator[Any]:
        yield thing

    namespace = developers_own() | {
        "history": client, "old_users": lambda: one(user), "old_sessions": lambda _: one(session), "old_messages": lambda _: rows,
    }  # fmt: skip
    for _ in range(2):  # "It can be broken off and run again."
        await written(namespace, "8")
        found = [
            each
            async for each in client.list_messages(user_id=str(user.id), session_id=str(session.id))
        ]
        assert [each.content for each in found] == [row.content for row in rows]
    assert (
        await client.get_session(user_id=str(user.id), session_id=str(session.id))
    ).title == "Of old"
