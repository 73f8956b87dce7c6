"""Checks that the packages of search are installed; imports none of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from service.config import Settings

QDRANT_CLIENT = "1.20"
"""The release series of qdrant-client whose internals the embedded index replaces.

`worker/qdrant_local.py` was tested with it. pyproject.toml pins the same series.
"""


def find_problem(settings: Settings) -> str | None:
    """Return the message about a missing or wrong package, None if search can run."""
    is_needed_by_name = {
        "wordllama": settings.embeddings_url is None,
        "qdrant_client": True,
        "openai": True,
    }
    for name, is_needed in is_needed_by_name.items():
        if is_needed and importlib.util.find_spec(name) is None:
            return (
                f"search is on but {name} is not installed: "
                "pip install 'chathistory-service[search]', or set CHAT_HISTORY_SEARCH=off"
            )
    return find_version_problem() if settings.qdrant_url is None else None


def find_version_problem() -> str | None:
    """Return why the installed qdrant-client cannot serve the embedded index, or None.

    A Qdrant server works with any version, because only the client's public interface is used.
    """
    installed = importlib.metadata.version("qdrant-client")
    if installed.split(".")[:2] == QDRANT_CLIENT.split("."):
        return None
    return (
        f"qdrant-client {installed} is installed, and the embedded search index needs "
        f"{QDRANT_CLIENT}.x: pip install 'qdrant-client~={QDRANT_CLIENT}.0', "
        "or set QDRANT_URL to use a Qdrant server, or set CHAT_HISTORY_SEARCH=off"
    )
