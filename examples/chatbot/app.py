"""The application: what it is made of, and what lives as long as it does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

from chathistory_client import ChatHistoryClient

from . import problems, routes
from .history import History
from .identity import Identity
from .model import Model
from .settings import Settings
from .turns import Turns

STATIC = Path(__file__).parent / "static"
_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'; "
    "form-action 'self'",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


def create_app(settings: Settings | None = None) -> FastAPI:
    """Make the application; uvicorn takes this as a factory."""
    settings = settings or Settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        token = settings.history_token.get_secret_value() if settings.history_token else None
        model = Model(settings)
        async with ChatHistoryClient(
            settings.history_target,
            tls=settings.history_tls,
            token=token,
            timeout=settings.history_timeout,
        ) as client:
            app.state.history = History(client)
            app.state.model = model
            app.state.turns = Turns(
                app.state.history,
                model,
                context_tokens=settings.context_tokens,
                require_history=settings.require_history,
            )
            yield
            await app.state.turns.close()
        await model.close()

    app = FastAPI(
        title="Example chatbot",
        version="0.1.0",
        summary="A chatbot whose conversations are kept by the ChatHistory service.",
        lifespan=lifespan,
    )
    app.add_middleware(Identity, secret=settings.cookie_secret())
    problems.install(app)
    app.include_router(routes.router)
    app.include_router(routes.health)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")

    @app.get("/", include_in_schema=False)
    @app.get("/s/{session_uuid}", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers=_PAGE_HEADERS)

    return app
