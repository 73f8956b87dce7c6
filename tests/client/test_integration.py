"""The code of docs/how-to/fastapi.md, assembled in its order, works as a backend."""

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
    """Return the code blocks of a section, except those introduced with "Before:"."""
    [section] = re.findall(rf"^## {heading}.*?(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return [
        code
        for text, code in re.findall(
            r"(.*?)^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL
        )
        if "Before:" not in text
    ]


class ChatIn(BaseModel):
    """The backend's existing model, with the field that the page adds."""

    message: str
    session_id: UUID | None = None
    message_id: UUID | None = None


class ChatOut(BaseModel):
    answer: str
    session_id: UUID


async def llm(conversation: list[dict[str, str]]) -> str:
    return f"You have said {sum(item['role'] == 'user' for item in conversation)} things."


async def current_user(request: Request) -> Any:
    return SimpleNamespace(id=request.headers["x-user"])


def backend_names() -> dict[str, Any]:
    """Return the names that an existing backend defines: framework, models and language model."""
    return {
        "Annotated": Annotated,
        "AsyncIterator": AsyncIterator,
        "ChatIn": ChatIn,
        "ChatOut": ChatOut,
        "Depends": Depends,
        "FastAPI": FastAPI,
        "HTTPException": HTTPException,
        "JSONResponse": JSONResponse,
        "MyUser": SimpleNamespace,
        "Request": Request,
        "User": Annotated[Any, Depends(current_user)],
        "asynccontextmanager": asynccontextmanager,
        "llm": llm,
        "os": os,
    }


async def run_sections(namespace: dict[str, Any], *headings: str) -> None:
    """Run the code of the sections, in the given order."""
    for heading in headings:
        for code in blocks(heading):
            compiled = compile(
                code, f"fastapi.md, {heading}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
            )
            result = eval(compiled, namespace)
            if inspect.iscoroutine(result):
                await result


async def test_backend_built_from_the_page_works(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HISTORY", server.address)
    monkeypatch.setenv("GRPC_ENABLE_HTTP_PROXY", "0")
    namespace = backend_names()
    await run_sections(namespace, "3", "4", "5", "7")
    async with (
        client_of(server.address) as client,
        serving_http(namespace["app"]) as address,
        Browser(address) as browser,
    ):
        me = await namespace["history_user"](client, SimpleNamespace(id=7, name="Ada"))
        assert me == await namespace["history_user"](client, SimpleNamespace(id=7, name="Ada"))
        browser.headers["x-user"] = me
        first = await browser.ask("Hello", message_id=(message_id := str(uuid4())))
        assert first == await browser.ask("Hello", message_id=message_id)
        second = await browser.ask("And?", session_id=first["session_id"])
        assert second == {"answer": "You have said 2 things.", "session_id": first["session_id"]}
        page = await client.list_messages(user_id=me, session_id=first["session_id"])
        assert [item.seq for item in page.messages] == [1, 2, 3, 4]
        foreign = await browser.post("/chat", json={"message": "?", "session_id": OTHERS})
        assert (foreign.status_code, foreign.json()["reason"]) == (404, "SESSION_NOT_FOUND")
        assert (await browser.get("/db-health")).json() == {"database": "serving"}


async def test_import_of_old_conversations_can_be_repeated(client: ChatHistoryClient) -> None:
    now = datetime.now(UTC)
    user, session = (
        SimpleNamespace(id=uuid4(), login="ada"),
        SimpleNamespace(id=uuid4(), title="Old"),
    )
    rows = [
        SimpleNamespace(id=uuid4(), role="user", content=f"{n}", created_at=now) for n in range(250)
    ]

    async def single(item: Any) -> AsyncIterator[Any]:
        yield item

    namespace = backend_names() | {
        "history": client,
        "old_users": lambda: single(user),
        "old_sessions": lambda _: single(session),
        "old_messages": lambda _: rows,
    }
    for _ in range(2):  # "It can be broken off and run again."
        await run_sections(namespace, "8")
        stored = [
            item
            async for item in client.list_messages(user_id=str(user.id), session_id=str(session.id))
        ]
        assert [item.content for item in stored] == [row.content for row in rows]
    assert (
        await client.get_session(user_id=str(user.id), session_id=str(session.id))
    ).title == "Old"
