"""Runs the application under uvicorn."""

from __future__ import annotations

import socket

import uvicorn

from .app import create_app
from .settings import Settings

STREAM_GRACE_S = 3
"""Seconds that open streams get at shutdown; partial answers are stored afterwards."""


class Server(uvicorn.Server):
    """A uvicorn server that prints its address once it listens."""

    announcement = ""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        await super().startup(sockets)
        if self.started:
            print(self.announcement, flush=True)


def create_server(settings: Settings) -> Server:
    """Return a server of the application, not started yet."""
    host, _, port = settings.listen.rpartition(":")
    server = Server(
        uvicorn.Config(
            create_app(settings),
            host=host.strip("[]"),
            port=int(port),
            timeout_graceful_shutdown=STREAM_GRACE_S,
            log_level="warning",
            proxy_headers=True,
        )
    )
    server.announcement = f"the chatbot is at http://{settings.listen}"
    return server


def serve() -> None:
    """Serve until Ctrl-C or SIGTERM."""
    create_server(Settings()).run()
