"""The estimate of a message's token count, for clients that do not count tokens."""

from __future__ import annotations

_BYTES_PER_TOKEN = 4
"""Average of common tokenizers on English prose."""


def estimate_tokens(content: str, parts: str | None) -> int:
    """Estimate how many tokens a message takes in a prompt, for clients that do not count them.

    One token per 4 bytes of the content in UTF-8 and per 4 characters of the parts in JSON, rounded
    up.
    """
    return -(-(len(content.encode()) + len(parts or "")) // _BYTES_PER_TOKEN)
