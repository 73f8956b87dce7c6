"""Loads texts for the chatbot to answer from: `python -m examples.chatbot.loader [FOLDER]`. Loading again changes nothing."""

from __future__ import annotations

import asyncio
import hashlib
import re
import sys
from pathlib import Path

from chathistory_client import ChatHistoryClient, DocumentScope

from .settings import Settings

SAMPLES = Path(__file__).parent / "knowledge"
CHUNK = 1200
"""Characters of a chunk at the most, roughly: a passage that can be read at a glance."""


async def load(client: ChatHistoryClient, folder: Path = SAMPLES) -> int:
    """Load a folder's Markdown and text files as documents that everybody finds, and return how many there are.

    A file that has changed replaces what was loaded of it before.
    """
    texts = _read(folder)
    for uri, content in texts.items():
        digest = hashlib.sha256(content).hexdigest()
        shared = client.list_documents(source_uri=uri, scope=DocumentScope.DOCUMENT_SCOPE_SHARED)
        before = [each async for each in shared]
        title, chunks = cut(content.decode(), Path(uri.removeprefix("file:")).stem)
        await client.create_document(
            title=title,
            chunks=chunks,
            scope=DocumentScope.DOCUMENT_SCOPE_SHARED,
            source_uri=uri,
            mime_type="text/markdown" if uri.endswith(".md") else "text/plain",
            content_sha256=digest,
            size_bytes=len(content),
        )
        for old in before:
            if old.content_sha256 != digest:
                await client.delete_document(document_id=old.id, allow_missing=True)
    return len(texts)


def _read(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".md", ".txt"))
    return {f"file:{path.relative_to(folder)}": path.read_bytes() for path in files}


def cut(text: str, name: str) -> tuple[str, list[str]]:
    """Return a text's title, and the text in chunks: one a section, and long sections at their paragraphs."""
    found = re.match(r"#\s+(.+)\n", text.lstrip())
    title = found[1].strip() if found else name
    body = text.lstrip()[found.end() :] if found else text
    chunks: list[str] = []
    for section in re.split(r"\n(?=#{1,6}\s)", body.strip()):
        chunk = ""
        for wrapped in re.split(r"\n\s*\n", section.strip()):
            # Lines that were broken for the eye only; lists and code stay as they are.
            paragraph = (
                wrapped
                if re.search(r"^(\s|[-*+>|`#]|\d+\.)", wrapped, re.MULTILINE)
                else " ".join(wrapped.split("\n"))
            )
            if chunk and len(chunk) + len(paragraph) > CHUNK:
                chunks.append(chunk)
                chunk = ""
            chunk = f"{chunk}\n\n{paragraph}" if chunk else paragraph
        if chunk:
            chunks.append(chunk)
    return title, chunks


async def _main() -> None:
    settings = Settings()
    token = settings.history_token.get_secret_value() if settings.history_token else None
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else SAMPLES
    async with ChatHistoryClient(
        settings.history_target, tls=settings.history_tls, token=token
    ) as client:
        print(f"{await load(client, folder)} documents are loaded")


if __name__ == "__main__":
    asyncio.run(_main())
