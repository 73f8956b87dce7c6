"""Takes a database back in time, as a failover or a restore does."""

from __future__ import annotations

from tests.support.cluster import fetch


async def lose_messages(url: str, session_id: str, *, after_seq: int) -> None:
    """Remove the messages of a session after a seq, as a failover does that loses commits."""
    await fetch(
        url,
        "WITH lost AS (DELETE FROM chat_messages WHERE session_id = $1 AND seq > $2)"
        " UPDATE chat_sessions SET last_seq = $2, message_count = $2 WHERE id = $1",
        session_id,
        after_seq,
    )


async def set_counter(url: str, counter: int) -> None:
    """Set the counter of the history's epoch, as a restore does that takes it back."""
    await fetch(url, "UPDATE history_epoch SET counter = $1", counter)


async def stored_epoch(url: str) -> tuple[str, int]:
    """Return the id of the history's epoch, and its counter."""
    [row] = await fetch(url, "SELECT epoch::text, counter FROM history_epoch")
    return row[0], row[1]


async def set_building(url: str, collection: str) -> None:
    """Set the collection that is being built, as the restore of a dump from a rebuild does."""
    await fetch(url, "UPDATE search_indexes SET building = $1", collection)
