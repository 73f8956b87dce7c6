"""What the chatbot's endpoints answer, over HTTP, with a real history service behind them."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any

import pytest

from chathistory_client import ChatHistoryClient
from examples.chatbot.history import title_of
from examples.chatbot.loader import cut, load
from examples.chatbot.settings import Settings
from service.server import Server
from tests.support.chatbots import Browser, Model, chatting, events
from tests.support.clients import client_of
from tests.support.servers import serving


async def test_two_questions_of_one_conversation_are_stored_in_order(browser: Browser) -> None:
    first = await browser.ask("What is a heron?")
    second = await browser.ask("And an egret?", session_uuid=first["session_uuid"])

    assert (first["saved"], second["saved"]) == (True, True)
    assert second["session_uuid"] == first["session_uuid"]
    assert (first["title"], second["title"]) == ("What is a heron?", None)
    messages = await browser.read(first["session_uuid"])
    assert [(each["seq"], each["role"]) for each in messages] == [
        (1, "user"), (2, "assistant"), (3, "user"), (4, "assistant"),
    ]  # fmt: skip
    assert [each["content"] for each in messages] == [
        "What is a heron?", first["answer"], "And an egret?", second["answer"],
    ]  # fmt: skip
    assert {"id", "seq", "role", "content", "created_at"} <= set(messages[0])
    assert [each["created_at"] for each in messages] == sorted(
        each["created_at"] for each in messages
    )


async def test_a_client_that_knows_nothing_of_sessions_is_answered(bot: str) -> None:
    async with Browser(bot) as simple:
        reply = await simple.ask("Hello?")
    assert reply["answer"]
    assert reply["saved"]


async def test_a_repeated_message_id_stores_nothing_twice(clever: Browser, model: Model) -> None:
    message_id = str(uuid.uuid4())
    first = await clever.ask("Hello?", message_id=message_id)
    model.words = ["Another ", "answer."]
    again = [
        await clever.ask("Hello?", message_id=message_id),
        await clever.ask("Hello?", message_id=message_id, session_uuid=first["session_uuid"]),
    ]

    assert {each["answer"] for each in again} == {first["answer"]} == {"Herons wade."}
    assert {each["session_uuid"] for each in again} == {first["session_uuid"]}
    assert all(each["saved"] for each in again)
    assert len(await clever.read(first["session_uuid"])) == 2
    assert len(model.prompts) == 1

    reused = await clever.post(
        "/chat", json={"message": "Something else", "message_id": message_id}
    )
    assert (reused.status_code, reused.json()["reason"]) == (409, "MESSAGE_ID_REUSED")


async def test_the_same_turn_many_times_at_once_is_stored_once(
    clever: Browser, model: Model
) -> None:
    model.pause = 0.05
    message_id = str(uuid.uuid4())
    replies = await asyncio.gather(*(clever.ask("Hello?", message_id=message_id) for _ in range(8)))

    # The first request gives out the cookie, so these may be several users: each of them has it once.
    for session in {each["session_uuid"] for each in replies}:
        reply = await clever.get(f"/api/sessions/{session}/messages")
        if reply.status_code == 200:
            assert [each["role"] for each in reply.json()["messages"]] == ["user", "assistant"]


async def test_a_stranger_sees_nothing(browser: Browser, stranger: Browser) -> None:
    mine = (await browser.ask("A secret"))["session_uuid"]
    await stranger.ask("Hello?")

    assert [each["title"] for each in (await stranger.get("/api/sessions")).json()["sessions"]] == [
        "Hello?"
    ]
    for reply in (
        await stranger.get(f"/api/sessions/{mine}"),
        await stranger.get(f"/api/sessions/{mine}/messages"),
        await stranger.patch(f"/api/sessions/{mine}", json={"title": "x"}),
        await stranger.delete(f"/api/sessions/{mine}"),
        await stranger.post("/chat", json={"message": "x", "session_uuid": mine}),
        await stranger.post("/chat/stream", json={"message": "x", "session_uuid": mine}),
        await stranger.get(f"/api/sessions/{uuid.uuid4()}/messages"),
    ):
        assert (reply.status_code, reply.json()["reason"]) == (404, "SESSION_NOT_FOUND"), (
            reply.request
        )
    assert (await stranger.get("/api/search", params={"q": "secret"})).json() == {"hits": []}
    assert len(await browser.read(mine)) == 2


@pytest.mark.parametrize(
    "forged", ["", "x", "ImFiYyI.AAAA", "00000000-0000-4000-8000-000000000001"]
)
async def test_a_cookie_that_was_tampered_with_is_nobodys(browser: Browser, forged: str) -> None:
    session = (await browser.ask("A secret"))["session_uuid"]
    genuine = browser.cookies["chatbot_user"]
    browser.cookies.clear()
    # Not the last letter: some of its bits mean nothing.
    browser.cookies.set(
        "chatbot_user", forged or genuine[:-5] + ("A" if genuine[-5] != "A" else "B") + genuine[-4:]
    )
    assert (await browser.get(f"/api/sessions/{session}")).status_code == 404


async def test_the_cookie_is_given_once_and_kept_from_scripts(browser: Browser) -> None:
    first = await browser.get("/api/sessions")
    second = await browser.get("/api/sessions")
    cookie = first.headers["set-cookie"]

    assert "set-cookie" not in second.headers
    assert "HttpOnly" in cookie
    assert "samesite=lax" in cookie.lower()
    browser.cookies.clear()
    assert "set-cookie" not in (await browser.get("/db-health")).headers


async def test_conversations_are_listed_renamed_and_deleted(browser: Browser) -> None:
    made = [(await browser.ask(f"Question {n}"))["session_uuid"] for n in range(3)]
    page = (await browser.get("/api/sessions", params={"page_size": 2})).json()
    rest = (
        await browser.get(
            "/api/sessions", params={"page_size": 2, "page_token": page["next_page_token"]}
        )
    ).json()

    listed = [each["session_uuid"] for each in page["sessions"] + rest["sessions"]]
    assert listed == made[::-1]
    assert rest["next_page_token"] == ""
    assert page["sessions"][0]["message_count"] == 2

    renamed = await browser.patch(f"/api/sessions/{made[0]}", json={"title": "  Better  "})
    assert renamed.json()["title"] == "Better"
    assert (await browser.delete(f"/api/sessions/{made[0]}")).status_code == 204
    assert (await browser.get(f"/api/sessions/{made[0]}")).status_code == 404
    assert len((await browser.get("/api/sessions")).json()["sessions"]) == 2


async def test_what_was_said_is_found(browser: Browser) -> None:
    session = (await browser.ask("Do herons <b>wade</b>?"))["session_uuid"]
    [hit] = (await browser.get("/api/search", params={"q": "herons"})).json()["hits"]

    assert (hit["session_uuid"], hit["session_title"], hit["role"]) == (
        session,
        "Do herons <b>wade</b>?",
        "user",
    )
    assert "<mark>herons</mark>" in hit["snippet"]
    assert "<b>" not in hit["snippet"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/chat", {"message": "   "}),
        ("POST", "/chat", {"message": "x", "session_uuid": "no"}),
        ("POST", "/chat/stream", {}),
        ("GET", "/api/sessions/no/messages", None),
        ("GET", "/api/sessions?page_token=nonsense", None),
        ("GET", "/api/search?q=", None),
    ],
)
async def test_malformed_requests_say_what_is_wrong(
    browser: Browser, method: str, path: str, body: Any
) -> None:
    await browser.ask("Hello?")  # So that the user is there.
    reply = await browser.request(method, path, json=body)
    assert reply.status_code == 422
    assert reply.json()["reason"] in ("FIELD_VIOLATION", "BAD_PAGE_TOKEN")
    assert reply.json()["detail"]


async def test_the_model_sees_the_conversation_and_streams(clever: Browser, model: Model) -> None:
    await clever.ask("What is a heron?")
    session = (await clever.get("/api/sessions")).json()["sessions"][0]["session_uuid"]
    model.words = ["A ", "white ", "heron."]
    async with clever.stream(
        "POST", "/chat/stream", json={"message": "And an egret?", "session_uuid": session}
    ) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        seen = [event async for event in events(reply)]

    names = [name for name, _ in seen]
    assert names == ["begin", "delta", "delta", "delta", "done"]
    assert (seen[0][1]["saved"], seen[0][1]["session_uuid"]) == (True, session)
    assert "".join(data["text"] for name, data in seen if name == "delta") == "A white heron."
    assert (seen[-1][1]["answer"], seen[-1][1]["saved"], seen[-1][1]["stopped"]) == (
        "A white heron.",
        True,
        False,
    )
    assert [(each["role"], each["content"]) for each in model.prompts[-1]][1:] == [
        ("user", "What is a heron?"), ("assistant", "Herons wade."), ("user", "And an egret?"),
    ]  # fmt: skip


@pytest.mark.parametrize("twice", [False, True])
async def test_what_was_generated_is_stored_when_the_browser_leaves(
    clever: Browser, model: Model, twice: bool
) -> None:
    model.words = [f"word{n} " for n in range(200)]
    model.pause = 0.02
    message_id = str(uuid.uuid4())
    async with clever.stream(
        "POST", "/chat/stream", json={"message": "Go on", "message_id": message_id}
    ) as reply:
        count = 0
        async for name, _ in events(reply):
            count += name == "delta"
            if count == 5:
                break
    await clever.get("/")
    [session] = (await clever.get("/api/sessions")).json()["sessions"]
    async with asyncio.timeout(30):
        while len(messages := await clever.read(session["session_uuid"])) < 2:
            await asyncio.sleep(0.05)

    assert messages[1]["content"].startswith("word0 word1 word2 word3 word4 ")
    assert messages[1]["stopped"] is True
    assert model.said < 100
    if twice:  # The repetition gets what is stored.
        again = await clever.ask("Go on", message_id=message_id)
        assert (again["answer"], again["stopped"], again["saved"]) == (
            messages[1]["content"],
            True,
            True,
        )


async def test_what_was_generated_is_stored_when_the_backend_stops(
    server: Server, model: Model
) -> None:
    model.words = [f"word{n} " for n in range(1000)]
    model.pause = 0.02
    async with model.serving() as settings, Browser("http://nowhere") as browser:
        async with chatting(server.address, **settings) as address:
            asking = asyncio.create_task(browser.post(f"{address}/chat", json={"message": "Go on"}))
            while model.said < 10:
                await asyncio.sleep(0.02)
        await asyncio.wait([asking])
        asking.exception()
        async with chatting(server.address) as address, client_of(server.address) as client:
            stored = [
                each
                async for user in client.list_users()
                for each in await _answers(client, user.id)
            ]

    assert len(stored) == 1
    assert stored[0].startswith("word0 word1 ")


async def _answers(client: ChatHistoryClient, user_id: str) -> list[str]:
    return [
        each.content
        async for session in client.list_sessions(user_id=user_id)
        async for each in client.list_messages(user_id=user_id, session_id=session.id)
        if each.seq % 2 == 0
    ]


async def test_a_model_that_fails_leaves_the_documents_word(clever: Browser, model: Model) -> None:
    model.status = 400
    reply = await clever.ask("Hello?")
    assert reply["saved"]
    assert "No language model" in reply["answer"] or "did not answer" in reply["answer"]


async def test_a_model_that_breaks_off_is_kept_as_far_as_it_came(
    clever: Browser, model: Model
) -> None:
    model.words, model.breaks_after = ["One ", "two ", "three"], 2
    reply = await clever.ask("Hello?")
    assert (reply["answer"], reply["stopped"], reply["saved"]) == ("One two ", True, True)


async def test_without_a_model_the_documents_answer_with_sources(
    database_url: str, tmp_path: Path
) -> None:
    async with (
        serving(database_url, search="on", data_dir=tmp_path) as server,
        client_of(server.address) as client,
    ):
        assert await load(client) == 6
        assert await load(client) == 6  # Loads nothing twice.
        documents = [each async for each in client.list_documents()]
        assert len(documents) == 6
        async with (
            chatting(server.address) as address,
            Browser(address) as browser,
            asyncio.timeout(40),
        ):
            while not (reply := await browser.ask("What happens when the database is away?"))[
                "sources"
            ]:
                await asyncio.sleep(0.2)
            messages = await browser.read(reply["session_uuid"])
            health = (await browser.get("/db-health")).json()

    assert "No language model is set up" in reply["answer"]
    assert reply["sources"][0]["title"] == "When something is away: The database is away"
    assert reply["sources"][0]["uri"] == "file:outages.md"
    assert reply["sources"][0]["text"][:50] in reply["answer"]
    assert messages[1]["sources"] == reply["sources"]
    assert (health["database"], health["search"], health["model"]) == ("serving", "serving", None)


async def test_openapi_describes_all_of_it_with_errors(browser: Browser) -> None:
    api = (await browser.get("/openapi.json")).json()
    assert set(api["paths"]) == {
        "/chat", "/chat/stream", "/api/sessions", "/api/sessions/{session_uuid}",
        "/api/sessions/{session_uuid}/messages", "/api/search", "/db-health",
    }  # fmt: skip
    for path, methods in api["paths"].items():
        for method, about in methods.items():
            assert about["summary"], (path, method)
            codes = set(about["responses"])
            assert "503" in codes, (path, method)
            if "{session_uuid}" in path or path.startswith("/chat"):
                assert {"404", "422"} <= codes, (path, method)
            if path != "/db-health":
                for code in codes - {"200", "204"}:
                    schema = about["responses"][code]["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/Error"}, (path, method, code)
    assert (
        "text/event-stream" in api["paths"]["/chat/stream"]["post"]["responses"]["200"]["content"]
    )


async def test_the_page_is_served_with_a_strict_policy(browser: Browser) -> None:
    for path in ("/", f"/s/{uuid.uuid4()}"):
        page = await browser.get(path)
        assert page.status_code == 200
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert "style=" not in page.text
    for name in ("style.css", "app.js", "theme.js", "icon.svg"):
        assert (await browser.get(f"/static/{name}")).status_code == 200


def test_titles_are_cut_at_a_word() -> None:
    assert title_of("What\nis  a heron?") == "What is a heron?"
    assert title_of("word " * 40) == ("word " * 12).strip() + "…"
    assert len(title_of("x" * 500)) == 61


def test_texts_are_cut_at_headings_and_paragraphs() -> None:
    assert cut("# Herons\n\nThey\nwade.\n\n## Food\n\nFish.", "x") == (
        "Herons",
        ["They wade.", "## Food\n\nFish."],
    )
    title, chunks = cut("no heading\n\n" + "\n\n".join(["word " * 100] * 6), "name")
    assert title == "name"
    assert max(map(len, chunks)) <= 1300
    assert len(chunks) == 3


def test_the_secret_is_made_once_and_kept_private(tmp_path: Path) -> None:
    settings = Settings(_env_file=None, data_dir=tmp_path)  # type: ignore[call-arg]
    made = settings.cookie_secret()
    assert len(made) >= 32
    assert settings.cookie_secret() == made
    assert (tmp_path / "chatbot-secret").stat().st_mode & 0o077 == 0
