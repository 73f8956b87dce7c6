"""Runs the application under uvicorn."""

from __future__ import annotations

import uvicorn

from .app import create_app
from .settings import Settings

STREAMS_GRACE = 3
"""Seconds that open streams get at the end; what there is of their answers is stored."""


def configured(settings: Settings) -> uvicorn.Server:
    """Return a server that is ready to serve."""
    host, _, port = settings.listen.rpartition(":")
    return uvicorn.Server(
        uvicorn.Config(
            create_app(settings),
            host=host.strip("[]"),
            port=int(port),
            timeout_graceful_shutdown=STREAMS_GRACE,
            log_level="warning",
            proxy_headers=True,
        )
    )


def serve() -> None:
    """Serve until Ctrl-C or SIGTERM."""
    settings = Settings()
    print(f"the chatbot is at http://{settings.listen}")
    configured(settings).run()
