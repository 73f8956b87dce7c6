"""The FastAPI application: its parts, and the objects that live as long as it does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

from . import error_handlers, routes
from .history import History, create_client
from .identity import IdentityMiddleware
from .model import Model
from .settings import Settings
from .turns import TurnRunner

STATIC_DIR = Path(__file__).parent / "static"
_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'; "
        "form-action 'self'"
    ),
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


def create_app(settings: Settings | None = None) -> FastAPI:
    """Create the application. uvicorn accepts this function as a factory."""
    settings = settings or Settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        model = Model(settings)
        async with create_client(settings, timeout=settings.history_timeout) as client:
            app.state.history = History(client)
            app.state.model = model
            app.state.turns = TurnRunner(
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
        summary="A chatbot that stores its conversations in the ChatHistory service.",
        lifespan=lifespan,
    )
    app.add_middleware(IdentityMiddleware, secret=settings.cookie_secret())
    error_handlers.install(app)
    app.include_router(routes.router)
    app.include_router(routes.health_router)
    _serve_page(app)
    return app


def _serve_page(app: FastAPI) -> None:
    app.mount("/static", StaticFiles(directory=STATIC_DIR), name="static")

    @app.get("/", include_in_schema=False)
    @app.get("/s/{session_uuid}", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC_DIR / "index.html", headers=_PAGE_HEADERS)
