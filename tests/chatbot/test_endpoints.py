"""The chatbot's endpoints over HTTP, with a real history service."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any

import pytest

from chathistory_client import ChatHistoryClient
from examples.chatbot.convert import title_from_question
from examples.chatbot.loader import load, split_into_chunks
from examples.chatbot.settings import Settings
from service.server import Server
from tests.support.chatbots import Browser, ModelServer, server_sent_events, serving_chatbot
from tests.support.clients import client_of
from tests.support.servers import serving


async def test_questions_of_one_conversation_are_stored_in_order(browser: Browser) -> None:
    first = await browser.ask("What is a heron?")
    second = await browser.ask("And an egret?", session_uuid=first["session_uuid"])

    assert (first["saved"], second["saved"]) == (True, True)
    assert second["session_uuid"] == first["session_uuid"]
    assert (first["title"], second["title"]) == ("What is a heron?", None)
    messages = await browser.read(first["session_uuid"])
    assert [(message["seq"], message["role"]) for message in messages] == [
        (1, "user"), (2, "assistant"), (3, "user"), (4, "assistant"),
    ]  # fmt: skip
    assert [message["content"] for message in messages] == [
        "What is a heron?", first["answer"], "And an egret?", second["answer"],
    ]  # fmt: skip
    assert {"id", "seq", "role", "content", "created_at"} <= set(messages[0])
    times = [message["created_at"] for message in messages]
    assert times == sorted(times)


async def test_question_without_session_or_cookie_is_answered_and_saved(bot: str) -> None:
    async with Browser(bot) as browser:
        reply = await browser.ask("Hello?")
    assert reply["answer"]
    assert reply["saved"]


async def test_repeated_message_id_returns_the_stored_answer_and_stores_nothing(
    model_browser: Browser, model: ModelServer
) -> None:
    message_id = str(uuid.uuid4())
    first = await model_browser.ask("Hello?", message_id=message_id)
    model.words = ["Another ", "answer."]
    repeated = [
        await model_browser.ask("Hello?", message_id=message_id),
        await model_browser.ask(
            "Hello?", message_id=message_id, session_uuid=first["session_uuid"]
        ),
    ]

    assert {reply["answer"] for reply in repeated} == {first["answer"]} == {"Herons wade."}
    assert {reply["session_uuid"] for reply in repeated} == {first["session_uuid"]}
    assert all(reply["saved"] for reply in repeated)
    assert len(await model_browser.read(first["session_uuid"])) == 2
    assert len(model.prompts) == 1

    reused = await model_browser.post(
        "/chat", json={"message": "Something else", "message_id": message_id}
    )
    assert (reused.status_code, reused.json()["reason"]) == (409, "MESSAGE_ID_REUSED")


async def test_concurrent_requests_with_the_same_message_id_are_stored_once(
    model_browser: Browser, model: ModelServer
) -> None:
    model.pause = 0.05
    message_id = str(uuid.uuid4())
    replies = await asyncio.gather(
        *(model_browser.ask("Hello?", message_id=message_id) for _ in range(8))
    )

    # Without a cookie every request may be another user; each of them has the turn once.
    for session in {reply["session_uuid"] for reply in replies}:
        reply = await model_browser.get(f"/api/sessions/{session}/messages")
        if reply.status_code == 200:
            assert [message["role"] for message in reply.json()["messages"]] == [
                "user",
                "assistant",
            ]


async def test_conversation_of_another_user_is_not_found(
    browser: Browser, other_browser: Browser
) -> None:
    session = (await browser.ask("A secret"))["session_uuid"]
    await other_browser.ask("Hello?")

    listed = (await other_browser.get("/api/sessions")).json()["sessions"]
    assert [listed_session["title"] for listed_session in listed] == ["Hello?"]
    for reply in (
        await other_browser.get(f"/api/sessions/{session}"),
        await other_browser.get(f"/api/sessions/{session}/messages"),
        await other_browser.patch(f"/api/sessions/{session}", json={"title": "x"}),
        await other_browser.delete(f"/api/sessions/{session}"),
        await other_browser.post("/chat", json={"message": "x", "session_uuid": session}),
        await other_browser.post("/chat/stream", json={"message": "x", "session_uuid": session}),
        await other_browser.get(f"/api/sessions/{uuid.uuid4()}/messages"),
    ):
        assert (reply.status_code, reply.json()["reason"]) == (404, "SESSION_NOT_FOUND"), (
            reply.request
        )
    assert (await other_browser.get("/api/search", params={"q": "secret"})).json() == {"hits": []}
    assert len(await browser.read(session)) == 2


@pytest.mark.parametrize(
    "forged", ["", "x", "ImFiYyI.AAAA", "00000000-0000-4000-8000-000000000001"]
)
async def test_forged_cookie_is_treated_as_a_new_user(browser: Browser, forged: str) -> None:
    session = (await browser.ask("A secret"))["session_uuid"]
    genuine = browser.cookies["chatbot_user"]
    browser.cookies.clear()
    # Not the last letter: some of its bits are padding.
    browser.cookies.set(
        "chatbot_user", forged or genuine[:-5] + ("A" if genuine[-5] != "A" else "B") + genuine[-4:]
    )
    assert (await browser.get(f"/api/sessions/{session}")).status_code == 404


async def test_cookie_is_set_once_and_hidden_from_scripts(browser: Browser) -> None:
    first = await browser.get("/api/sessions")
    second = await browser.get("/api/sessions")
    cookie = first.headers["set-cookie"]

    assert "set-cookie" not in second.headers
    assert "HttpOnly" in cookie
    assert "samesite=lax" in cookie.lower()
    browser.cookies.clear()
    assert "set-cookie" not in (await browser.get("/db-health")).headers


async def test_conversations_can_be_listed_renamed_and_deleted(browser: Browser) -> None:
    sessions = [(await browser.ask(f"Question {n}"))["session_uuid"] for n in range(3)]
    page = (await browser.get("/api/sessions", params={"page_size": 2})).json()
    last_page = (
        await browser.get(
            "/api/sessions", params={"page_size": 2, "page_token": page["next_page_token"]}
        )
    ).json()

    listed = [session["session_uuid"] for session in page["sessions"] + last_page["sessions"]]
    assert listed == sessions[::-1]
    assert last_page["next_page_token"] == ""
    assert page["sessions"][0]["message_count"] == 2

    renamed = await browser.patch(f"/api/sessions/{sessions[0]}", json={"title": "  Better  "})
    assert renamed.json()["title"] == "Better"
    assert (await browser.delete(f"/api/sessions/{sessions[0]}")).status_code == 204
    assert (await browser.get(f"/api/sessions/{sessions[0]}")).status_code == 404
    assert len((await browser.get("/api/sessions")).json()["sessions"]) == 2


async def test_search_returns_an_escaped_snippet_with_the_words_marked(browser: Browser) -> None:
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
async def test_malformed_request_is_rejected_with_reason_and_detail(
    browser: Browser, method: str, path: str, body: Any
) -> None:
    await browser.ask("Hello?")  # Creates the user.
    reply = await browser.request(method, path, json=body)
    assert reply.status_code == 422
    assert reply.json()["reason"] in ("FIELD_VIOLATION", "BAD_PAGE_TOKEN")
    assert reply.json()["detail"]


async def test_stream_sends_pieces_of_a_model_that_gets_the_conversation(
    model_browser: Browser, model: ModelServer
) -> None:
    await model_browser.ask("What is a heron?")
    session = (await model_browser.get("/api/sessions")).json()["sessions"][0]["session_uuid"]
    model.words = ["A ", "white ", "heron."]
    async with model_browser.stream(
        "POST", "/chat/stream", json={"message": "And an egret?", "session_uuid": session}
    ) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        received = [event async for event in server_sent_events(reply)]

    names = [name for name, _ in received]
    assert names == ["begin", "delta", "delta", "delta", "done"]
    assert (received[0][1]["saved"], received[0][1]["session_uuid"]) == (True, session)
    assert "".join(data["text"] for name, data in received if name == "delta") == "A white heron."
    assert (received[-1][1]["answer"], received[-1][1]["saved"], received[-1][1]["stopped"]) == (
        "A white heron.",
        True,
        False,
    )
    assert [(message["role"], message["content"]) for message in model.prompts[-1]][1:] == [
        ("user", "What is a heron?"), ("assistant", "Herons wade."), ("user", "And an egret?"),
    ]  # fmt: skip


@pytest.mark.parametrize("is_repeated", [False, True])
async def test_partial_answer_is_stored_when_the_browser_disconnects(
    model_browser: Browser, model: ModelServer, is_repeated: bool
) -> None:
    model.words = [f"word{n} " for n in range(200)]
    model.pause = 0.02
    message_id = str(uuid.uuid4())
    async with model_browser.stream(
        "POST", "/chat/stream", json={"message": "Go on", "message_id": message_id}
    ) as reply:
        count = 0
        async for name, _ in server_sent_events(reply):
            count += name == "delta"
            if count == 5:
                break
    await model_browser.get("/")
    [session] = (await model_browser.get("/api/sessions")).json()["sessions"]
    async with asyncio.timeout(30):
        while len(messages := await model_browser.read(session["session_uuid"])) < 2:
            await asyncio.sleep(0.05)

    assert messages[1]["content"].startswith("word0 word1 word2 word3 word4 ")
    assert messages[1]["stopped"] is True
    assert model.words_sent < 100
    if is_repeated:  # The repeated request returns the stored text.
        repeated = await model_browser.ask("Go on", message_id=message_id)
        assert (repeated["answer"], repeated["stopped"], repeated["saved"]) == (
            messages[1]["content"],
            True,
            True,
        )


async def test_partial_answer_is_stored_when_the_backend_stops(
    server: Server, model: ModelServer
) -> None:
    model.words = [f"word{n} " for n in range(1000)]
    model.pause = 0.02
    async with model.serving() as settings, Browser("http://nowhere") as browser:
        async with serving_chatbot(server.address, **settings) as address:
            asking = asyncio.create_task(browser.post(f"{address}/chat", json={"message": "Go on"}))
            while model.words_sent < 10:
                await asyncio.sleep(0.02)
        await asyncio.wait([asking])
        asking.exception()
        async with serving_chatbot(server.address) as address, client_of(server.address) as client:
            stored = [
                answer
                async for user in client.list_users()
                for answer in await _answers(client, user.id)
            ]

    assert len(stored) == 1
    assert stored[0].startswith("word0 word1 ")


async def _answers(client: ChatHistoryClient, user_id: str) -> list[str]:
    return [
        message.content
        async for session in client.list_sessions(user_id=user_id)
        async for message in client.list_messages(user_id=user_id, session_id=session.id)
        if message.seq % 2 == 0
    ]


async def test_answer_without_model_output_is_saved_when_the_model_fails(
    model_browser: Browser, model: ModelServer
) -> None:
    model.status = 400
    reply = await model_browser.ask("Hello?")
    assert reply["saved"]
    assert "No language model" in reply["answer"] or "did not answer" in reply["answer"]


async def test_partial_answer_is_stored_when_the_model_connection_breaks(
    model_browser: Browser, model: ModelServer
) -> None:
    model.words, model.breaks_after = ["One ", "two ", "three"], 2
    reply = await model_browser.ask("Hello?")
    assert (reply["answer"], reply["stopped"], reply["saved"]) == ("One two ", True, True)


async def test_answer_quotes_documents_with_sources_without_a_model(
    database_url: str, tmp_path: Path
) -> None:
    async with (
        serving(database_url, search="on", data_dir=tmp_path) as server,
        client_of(server.address) as client,
    ):
        assert await load(client) == 6
        assert await load(client) == 6  # Stores nothing twice.
        documents = [document async for document in client.list_documents()]
        assert len(documents) == 6
        async with (
            serving_chatbot(server.address) as address,
            Browser(address) as browser,
            asyncio.timeout(40),
        ):
            while not (
                reply := await browser.ask("What happens when the database is unavailable?")
            )["sources"]:
                await asyncio.sleep(0.2)
            messages = await browser.read(reply["session_uuid"])
            health = (await browser.get("/db-health")).json()

    assert "No language model is configured" in reply["answer"]
    assert reply["sources"][0]["title"] == "Outages: The database is unavailable"
    assert reply["sources"][0]["uri"] == "file:outages.md"
    assert reply["sources"][0]["text"][:50] in reply["answer"]
    assert messages[1]["sources"] == reply["sources"]
    assert (health["database"], health["search"], health["model"]) == ("serving", "serving", None)


async def test_openapi_describes_every_endpoint_and_error(browser: Browser) -> None:
    api = (await browser.get("/openapi.json")).json()
    assert set(api["paths"]) == {
        "/chat", "/chat/stream", "/api/sessions", "/api/sessions/{session_uuid}",
        "/api/sessions/{session_uuid}/messages", "/api/search", "/db-health",
    }  # fmt: skip
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"], (path, method)
            codes = set(operation["responses"])
            assert "503" in codes, (path, method)
            if "{session_uuid}" in path or path.startswith("/chat"):
                assert {"404", "422"} <= codes, (path, method)
            if path != "/db-health":
                for code in codes - {"200", "204"}:
                    schema = operation["responses"][code]["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/Error"}, (path, method, code)
    assert (
        "text/event-stream" in api["paths"]["/chat/stream"]["post"]["responses"]["200"]["content"]
    )


async def test_page_is_served_with_a_strict_content_security_policy(browser: Browser) -> None:
    for path in ("/", f"/s/{uuid.uuid4()}"):
        page = await browser.get(path)
        assert page.status_code == 200
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert "style=" not in page.text
    for name in ("style.css", "app.js", "theme.js", "icon.svg"):
        assert (await browser.get(f"/static/{name}")).status_code == 200


def test_title_of_a_long_question_ends_at_a_word() -> None:
    assert title_from_question("What\nis  a heron?") == "What is a heron?"
    assert title_from_question("word " * 40) == ("word " * 12).strip() + "…"
    assert len(title_from_question("x" * 500)) == 61


def test_text_is_split_at_headings_and_paragraphs() -> None:
    assert split_into_chunks("# Herons\n\nThey\nwade.\n\n## Food\n\nFish.", "x") == (
        "Herons",
        ["They wade.", "## Food\n\nFish."],
    )
    title, chunks = split_into_chunks("no heading\n\n" + "\n\n".join(["word " * 100] * 6), "name")
    assert title == "name"
    assert max(map(len, chunks)) <= 1300
    assert len(chunks) == 3


def test_cookie_secret_is_generated_once_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    settings = Settings(_env_file=None, data_dir=tmp_path)  # type: ignore[call-arg]
    secret = settings.cookie_secret()
    assert len(secret) >= 32
    assert settings.cookie_secret() == secret
    assert (tmp_path / "chatbot-secret").stat().st_mode & 0o077 == 0
