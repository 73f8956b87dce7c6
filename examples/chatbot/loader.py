"""`python -m examples.chatbot.loader [FOLDER]`: load texts for the chatbot to answer from.

Loading the same texts again changes nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import sys
from pathlib import Path

from chathistory_client import ChatHistoryClient, DocumentScope

from .history import create_client
from .settings import Settings

SAMPLE_DIR = Path(__file__).parent / "knowledge"
MAX_CHUNK_CHARS = 1200
"""Approximate upper limit of a chunk: a passage that can be read at a glance."""
_UNWRAPPABLE = re.compile(r"^(\s|[-*+>|`#]|\d+\.)", re.MULTILINE)
"""A line of a list, a quotation, a table, a heading or code, whose line breaks carry meaning."""


async def load(client: ChatHistoryClient, folder: Path = SAMPLE_DIR) -> int:
    """Store a folder's Markdown and text files as shared documents and return their number.

    A changed file replaces the document that was loaded from it before.
    """
    files = _read_files(folder)
    for uri, content in files.items():
        await _load_file(client, uri, content)
    return len(files)


async def _load_file(client: ChatHistoryClient, uri: str, content: bytes) -> None:
    digest = hashlib.sha256(content).hexdigest()
    shared = client.list_documents(source_uri=uri, scope=DocumentScope.DOCUMENT_SCOPE_SHARED)
    previous = [document async for document in shared]
    title, chunks = split_into_chunks(content.decode(), Path(uri.removeprefix("file:")).stem)
    # The service recognizes a document that it has by its hash and stores it once.
    await client.create_document(
        title=title,
        chunks=chunks,
        scope=DocumentScope.DOCUMENT_SCOPE_SHARED,
        source_uri=uri,
        mime_type="text/markdown" if uri.endswith(".md") else "text/plain",
        content_sha256=digest,
        size_bytes=len(content),
    )
    for document in previous:
        if document.content_sha256 != digest:
            await client.delete_document(document_id=document.id, allow_missing=True)


def _read_files(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".md", ".txt"))
    return {f"file:{path.relative_to(folder)}": path.read_bytes() for path in paths}


def split_into_chunks(text: str, default_title: str) -> tuple[str, list[str]]:
    """Return the title of a text and its chunks.

    A chunk is a section; sections that are too long are split between paragraphs. The title is
    the text's first heading, or `default_title`.
    """
    text = text.lstrip()
    heading = re.match(r"#\s+(.+)\n", text)
    title = heading[1].strip() if heading else default_title
    body = text[heading.end() :] if heading else text
    sections = re.split(r"\n(?=#{1,6}\s)", body.strip())
    return title, [chunk for section in sections for chunk in _split_section(section)]


def _split_section(section: str) -> list[str]:
    chunks: list[str] = []
    chunk = ""
    for block in re.split(r"\n\s*\n", section.strip()):
        paragraph = block if _UNWRAPPABLE.search(block) else " ".join(block.split("\n"))
        if chunk and len(chunk) + len(paragraph) > MAX_CHUNK_CHARS:
            chunks.append(chunk)
            chunk = ""
        chunk = f"{chunk}\n\n{paragraph}" if chunk else paragraph
    return [*chunks, chunk] if chunk else chunks


async def _main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else SAMPLE_DIR
    async with create_client(Settings()) as client:
        print(f"{await load(client, folder)} documents are loaded")


if __name__ == "__main__":
    asyncio.run(_main())
