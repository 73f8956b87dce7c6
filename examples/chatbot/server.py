"""Runs the application under uvicorn."""

from __future__ import annotations

import uvicorn

from .app import create_app
from .settings import Settings

STREAM_GRACE_S = 3
"""Seconds that open streams get at shutdown; partial answers are stored afterwards."""


def create_server(settings: Settings) -> uvicorn.Server:
    """Return a uvicorn server of the application, not started yet."""
    host, _, port = settings.listen.rpartition(":")
    return uvicorn.Server(
        uvicorn.Config(
            create_app(settings),
            host=host.strip("[]"),
            port=int(port),
            timeout_graceful_shutdown=STREAM_GRACE_S,
            log_level="warning",
            proxy_headers=True,
        )
    )


def serve() -> None:
    """Serve until Ctrl-C or SIGTERM."""
    settings = Settings()
    print(f"the chatbot is at http://{settings.listen}")
    create_server(settings).run()
