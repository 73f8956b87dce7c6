"""The estimate of a message's token count, for clients that do not count tokens."""

from __future__ import annotations

_BYTES_PER_TOKEN = 4
"""Average of common tokenizers on English prose."""


def estimate_tokens(content: str, parts: str | None) -> int:
    """Estimate how many tokens a message takes in a prompt.

    The estimate is one token for every 4 bytes of the content in UTF-8 and of the parts in JSON,
    rounded up. Characters of the parts are counted, not bytes.
    """
    return -(-(len(content.encode()) + len(parts or "")) // _BYTES_PER_TOKEN)
