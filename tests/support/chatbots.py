"""The example chatbot over real HTTP, HTTP clients for it, and a model with scripted replies."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import uvicorn
from pydantic_settings import SettingsConfigDict
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from examples.chatbot.app import create_app
from examples.chatbot.settings import Settings


class _Settings(Settings):
    model_config = SettingsConfigDict(env_file=None)


@asynccontextmanager
async def serving_http(app: ASGIApp, grace: int = 3) -> AsyncGenerator[str]:
    """Serve an application on a free port and provide its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(
            app, log_level="error", timeout_graceful_shutdown=grace, lifespan="on"
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        while not server.started:
            assert not serving.done(), serving
            await asyncio.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


@asynccontextmanager
async def serving_chatbot(history: str, **settings: Any) -> AsyncGenerator[str]:
    """Serve the chatbot, with the history service at `history`, and provide its address."""
    defaults: dict[str, Any] = {"secret": "of the tests", "history_target": history}
    async with serving_http(create_app(_Settings(**(defaults | settings)))) as address:
        yield address


class Browser(httpx.AsyncClient):
    """One visitor: an HTTP client with a cookie jar of its own."""

    def __init__(self, address: str) -> None:
        super().__init__(base_url=address, timeout=30, trust_env=False)

    async def ask(self, message: str, **fields: Any) -> dict[str, Any]:
        """Send a message and return the chatbot's reply."""
        response = await self.post("/chat", json={"message": message, **fields})
        assert response.status_code == 200, response.text
        reply: dict[str, Any] = response.json()
        return reply

    async def read(self, session_uuid: str) -> list[dict[str, Any]]:
        """Return all messages of a conversation, read page by page."""
        messages: list[dict[str, Any]] = []
        token = ""
        while True:
            reply = await self.get(
                f"/api/sessions/{session_uuid}/messages",
                params={"page_token": token, "page_size": 3},
            )
            assert reply.status_code == 200, reply.text
            messages += reply.json()["messages"]
            token = reply.json()["next_page_token"]
            if not token:
                return messages


async def server_sent_events(reply: httpx.Response) -> AsyncIterator[tuple[str, Any]]:
    """Iterate over the server-sent events of a reply: their names and data."""
    name = ""
    async for line in reply.aiter_lines():
        if line.startswith("event:"):
            name = line.removeprefix("event:").strip()
        elif line.startswith("data:"):
            yield name, json.loads(line.removeprefix("data:"))


class ModelServer:
    """An OpenAI-compatible endpoint that streams `words`, one at a time."""

    def __init__(self) -> None:
        self.words = ["Herons ", "wade."]
        self.pause = 0.0
        """Seconds before each word but the first."""
        self.breaks_after: int | None = None
        """The number of words after which the connection breaks."""
        self.status = 200
        self.prompts: list[list[dict[str, str]]] = []
        """The messages of each request."""
        self.words_sent = 0

    @asynccontextmanager
    async def serving(self) -> AsyncGenerator[dict[str, Any]]:
        """Serve the endpoint and provide the chatbot's settings for it."""
        app = Starlette(routes=[Route("/v1/chat/completions", self._complete, methods=["POST"])])
        async with serving_http(app, grace=1) as address:
            yield {"model": "heron-1", "openai_base_url": f"{address}/v1", "openai_api_key": "key"}

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        assert body["model"] == "heron-1"
        assert body["stream"] is True
        self.prompts.append(body["messages"])
        if self.status != 200:
            return JSONResponse({"error": {"message": "no"}}, self.status)
        return StreamingResponse(self._words(), media_type="text/event-stream")

    async def _words(self) -> AsyncIterator[str]:
        for number, word in enumerate(self.words):
            if number == self.breaks_after:
                raise ConnectionError
            if number:
                await asyncio.sleep(self.pause)
            self.words_sent += 1
            choice = {
                "index": 0,
                "delta": {"role": "assistant", "content": word},
                "finish_reason": None,
            }
            chunk = {
                "id": "1",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": "heron-1",
                "choices": [choice],
            }
            yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"
