"""The backends of docs/how-to/fastapi.md, before and after, and the way from one to the other."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from types import ModuleType
from uuid import uuid4

import grpc
import pytest

from chathistory_client import (
    Conflict,
    Overloaded,
    PermissionDenied,
    SessionState,
    Unauthenticated,
    Unavailable,
)
from service.server import Server
from tests.docs.fences import fences_of
from tests.support.chatbots import Browser, serving_http
from tests.support.clients import client_of
from tests.support.cluster import TESTS_APPLICATION, Cluster, fetch
from tests.support.servers import ROOT

PAGE = ROOT / "docs" / "how-to" / "fastapi.md"
IMPORT_PAGE = ROOT / "docs" / "how-to" / "import-export.md"
FOREIGN_SESSION = "00000000-0000-4000-8000-000000000009"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Write the files of the page into a folder from which they can be imported."""
    for fence in fences_of(PAGE, ROOT):
        if name := fence.directives.get("file"):
            path = tmp_path / name
            is_added = "append" in fence.directives
            path.write_text((path.read_text() if is_added else "") + "\n" + fence.code)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("backend", "llm", "old_backend"):
        sys.modules.pop(name, None)


def load(files: Path, name: str) -> ModuleType:
    """Import a file of the page."""
    spec = importlib.util.spec_from_file_location(name, files / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def backend(files: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("HISTORY", server.address)
    return load(files, "backend")


@pytest.fixture
async def browser(backend: ModuleType) -> AsyncGenerator[Browser]:
    async with serving_http(backend.app) as address, Browser(address) as opened:
        opened.headers["x-user"] = "7"
        yield opened


@pytest.mark.parametrize("user", ["7", str(uuid4())], ids=["integer id", "UUID"])
async def test_a_new_user_talks_and_is_remembered(browser: Browser, user: str) -> None:
    browser.headers["x-user"] = user
    first = await browser.ask("Hello")
    second = await browser.ask("And?", session_id=first["session_id"])
    assert second == {
        "answer": "You have asked 2 questions.",
        "session_id": first["session_id"],
    }
    [listed] = (await browser.get("/sessions")).json()["sessions"]
    assert listed == {"id": first["session_id"], "title": "Hello"}
    stored = (await browser.get(f"/sessions/{listed['id']}/messages")).json()["messages"]
    assert [entry["role"] for entry in stored] == ["user", "assistant"] * 2
    assert (await browser.get("/db-health")).json() == {"database": "serving"}


async def test_a_repeated_message_id_returns_the_stored_answer(
    browser: Browser, backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await browser.ask("Hello", message_id=(message_id := str(uuid4())))

    async def another(_conversation: object) -> str:
        return "another answer"

    monkeypatch.setattr(backend, "llm", another)
    assert await browser.ask("Hello", message_id=message_id) == first
    [listed] = (await browser.get("/sessions")).json()["sessions"]
    stored = (await browser.get(f"/sessions/{listed['id']}/messages")).json()["messages"]
    assert len(stored) == 2


async def test_a_concurrently_repeated_question_has_one_answer(
    browser: Browser, backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def varying(_conversation: object) -> str:
        await asyncio.sleep(0.05)
        return f"answer {uuid4()}"

    monkeypatch.setattr(backend, "llm", varying)
    message_id = str(uuid4())
    replies = await asyncio.gather(*(browser.ask("Hello", message_id=message_id) for _ in range(5)))
    assert len({reply["answer"] for reply in replies}) == 1


async def test_twenty_simultaneous_first_messages_of_a_new_user_succeed(browser: Browser) -> None:
    replies = await asyncio.gather(*(browser.ask(f"Question {n}") for n in range(20)))
    assert len({reply["session_id"] for reply in replies}) == 20
    assert len((await browser.get("/sessions")).json()["sessions"]) == 20


async def test_errors_have_the_documented_status(
    browser: Browser, backend: ModuleType, server: Server
) -> None:
    mine = await browser.ask("Hello", message_id=(message_id := str(uuid4())))
    cases = {
        "bad page token": await browser.get("/sessions", params={"page_token": "bad"}),
        "foreign session": await browser.post(
            "/chat", json={"message": "?", "session_id": FOREIGN_SESSION}
        ),
        "reused id": await browser.post(
            "/chat",
            json={"message": "other", "message_id": message_id, "session_id": mine["session_id"]},
        ),
    }
    async with client_of(server.address) as client:
        await client.update_session(
            user_id=backend.history_id(7),
            session_id=mine["session_id"],
            state=SessionState.SESSION_STATE_ARCHIVED,
        )
    cases["archived"] = await browser.post(
        "/chat", json={"message": "?", "session_id": mine["session_id"]}
    )
    assert {name: (reply.status_code, reply.json()["reason"]) for name, reply in cases.items()} == {
        "bad page token": (400, "BAD_PAGE_TOKEN"),
        "foreign session": (404, "SESSION_NOT_FOUND"),
        "reused id": (409, "MESSAGE_ID_REUSED"),
        "archived": (409, "SESSION_ARCHIVED"),
    }


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (Overloaded("full", reason="OVERLOADED", retry_after=1.2), 503, "2"),
        (Overloaded("large", reason="REQUEST_TOO_LARGE"), 413, None),
        (Unavailable("down", reason="DATABASE_UNAVAILABLE", retry_after=1), 503, "1"),
        (Conflict("moved", reason="LAST_SEQ_MISMATCH"), 409, None),
        (PermissionDenied("no", reason="USER_MISMATCH"), 403, None),
        (Unauthenticated("expired", code=grpc.StatusCode.UNAUTHENTICATED), 500, None),
    ],
)
async def test_errors_that_other_calls_raise_have_the_documented_status(
    backend: ModuleType, error: Exception, status: int, retry_after: str | None
) -> None:
    reply = await backend.history_failed(None, error)
    assert (reply.status_code, reply.headers.get("retry-after")) == (status, retry_after)


async def test_a_reader_without_any_history_gets_empty_pages(browser: Browser) -> None:
    reply = await browser.get("/sessions")
    assert reply.json() == {"sessions": [], "next_page_token": ""}


async def test_conversations_of_the_old_backend_are_visible_in_the_new_one(
    files: Path,
    browser: Browser,
    backend: ModuleType,
    database_url: str,
    cluster: Cluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = await cluster.create_database(empty=True)
    # Marks the old backend's statements as no statements of the service.
    await fetch(
        cluster.url(name), f"ALTER DATABASE {name} SET application_name = '{TESTS_APPLICATION}'"
    )
    try:
        await talk_to_the_old_backend(files, cluster.url(name), monkeypatch)
        [query] = [fence.code for fence in fences_of(IMPORT_PAGE, ROOT) if fence.language == "sql"]
        lines = [row[0] for row in await fetch(cluster.url(name), query)]
        export = files / "history.jsonl"
        export.write_text("".join(f"{line}\n" for line in lines))
        assert json.loads(lines[0])["user"]["id"] == "1"
        monkeypatch.setenv("DATABASE_URL", database_url)
        for _ in range(2):
            await run_import(export)
            browser.headers["x-user"] = "1"
            [listed] = (await browser.get("/sessions")).json()["sessions"]
            assert listed["title"] == "What is a heron?"
            stored = (await browser.get(f"/sessions/{listed['id']}/messages")).json()["messages"]
            assert [entry["content"] for entry in stored][:4] == [
                "What is a heron?",
                "You have asked 1 questions.",
                "Does it wade?",
                "You have asked 2 questions.",
            ]
            again = await browser.ask(
                "Does it fly?", session_id=listed["id"], message_id=FOREIGN_SESSION
            )
            assert again["answer"] == "You have asked 3 questions."
    finally:
        await cluster.drop_database(name)


async def talk_to_the_old_backend(files: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLD_DATABASE_URL", url.replace("postgresql://", "postgresql+asyncpg://"))
    old = load(files, "old_backend")
    async with old.engine.begin() as connection:
        await connection.run_sync(old.Base.metadata.create_all)
    async with old.new_session() as db:
        db.add(old.User(email="ada@example.com"))
        await db.commit()
    async with serving_http(old.app) as address, Browser(address) as browser:
        browser.headers["x-user"] = "1"
        first = await browser.ask("What is a heron?")
        await browser.ask("Does it wade?", session_id=first["session_id"])
        browser.headers["x-user"] = "2"
        foreign = await browser.post("/chat", json={"message": "?", "session_id": 1})
        assert foreign.status_code == 404
    await old.engine.dispose()


async def run_import(export: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "service", "import", str(export), cwd=export.parent
    )
    assert await process.wait() == 0
