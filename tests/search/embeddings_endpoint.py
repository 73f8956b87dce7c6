"""`EmbeddingsEndpoint`: a local stand-in for an OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any


class EmbeddingsEndpoint:
    """Serves `POST /v1/embeddings`: the vector of a text is four numbers of its hash."""

    def __init__(self) -> None:
        self.status = 200
        self.rejected_text = "\0"
        """Requests with this in a text are answered with `rejected_status`."""
        self.rejected_status = 400
        self.malformed_text = "\0"
        """The vector of a text with this is malformed: it has a `null`."""
        self.delay_s = 0.0
        """Time from a request to its reply."""
        self.max_in_flight = 0
        """Most requests that were in flight at a time."""
        self._in_flight = 0
        self.requests: list[tuple[str, dict[str, Any]]] = []
        """Head and body of each request."""
        self.url = ""
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Serve on a free port."""
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    async def stop(self) -> None:
        """Stop serving."""
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next(
            int(line.split(":")[1])
            for line in head.lower().splitlines()
            if line.startswith("content-length")
        )
        request = json.loads(await reader.readexactly(length))
        self.requests.append((head, request))
        self._in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self._in_flight)
        try:
            await asyncio.sleep(self.delay_s)
        finally:
            self._in_flight -= 1
        is_rejected = any(self.rejected_text in text for text in request["input"])
        status = self.rejected_status if is_rejected else self.status
        reply = self._embed(request) if status == 200 else {"error": {"message": "no"}}
        body = json.dumps(reply).encode()
        writer.write(
            f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
            + body
        )
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    def _embed(self, request: dict[str, Any]) -> dict[str, Any]:
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": self._vector(text),
            }
            for index, text in enumerate(request["input"])
        ]
        # Not in the order of the texts: `index` assigns the vectors.
        return {
            "object": "list",
            "data": data[::-1],
            "model": request["model"],
            "usage": {"prompt_tokens": 1, "total_tokens": 1},
        }

    def _vector(self, text: str) -> list[float | None]:
        if self.malformed_text in text:
            return [0.5, None, 0.5, 0.5]
        return [byte / 255 for byte in hashlib.sha256(text.encode()).digest()[:4]]
