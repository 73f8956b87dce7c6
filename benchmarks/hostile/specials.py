"""The attacks that one field of one request does not express."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.hostile import connections, contents, queries

if TYPE_CHECKING:
    from benchmarks.hostile.assault import Assault


class Special(NamedTuple):
    """A kind of attack."""

    run: Callable[[Assault], Awaitable[None]]
    choices: Mapping[str, tuple[Any, ...]]
    """The values of each parameter, one of which is drawn."""
    needs_search: bool = False
    is_default: bool = True
    """Whether it is drawn unless it is named."""


SPECIALS: dict[str, Special] = {
    # Searches and reads
    "excluded terms": Special(
        queries.lexical, {"query": ("excluded", "excluded pair"), "concurrency": (6, 32, 100)}
    ),
    "long queries": Special(
        queries.lexical,
        {
            "query": ("alternatives", "phrase", "words", "stems", "random"),
            "concurrency": (8, 64, 500),
        },
    ),
    "search flood": Special(
        queries.semantic,
        {
            "rpc": ("SearchDocuments", "SearchMessages"),
            "length": (10, 1_000, 8_000),
            "concurrency": (64, 500),
        },
        needs_search=True,
    ),
    "abandoned searches": Special(
        queries.abandoned,
        {"rpc": ("SearchDocuments", "SearchMessages"), "concurrency": (64, 500)},
        needs_search=True,
    ),
    "contexts": Special(
        queries.contexts,
        {"session": ("system", "tombstones", "long", "page", "emoji"), "concurrency": (8, 100)},
    ),
    "large lists": Special(
        queries.lists,
        {
            "rpc": ("ListSessions", "ListDocuments", "ListMessages", "ListDocumentChunks"),
            "concurrency": (1, 6, 64),
        },
    ),
    "exports": Special(queries.exports, {"concurrency": (1, 8, 64)}),
    "forged page tokens": Special(queries.forged_tokens, {"concurrency": (8, 64)}),
    # Contents
    "objects": Special(
        contents.objects,
        {
            "shape": ("nulls", "numbers", "nested", "wide", "texts", "emoji"),
            "place": ("data", "metadata"),
            "concurrency": (1, 8, 64),
        },
    ),
    "large appends": Special(contents.large_appends, {"concurrency": (8, 100)}),
    "bulk": Special(
        contents.bulk, {"rpc": ("AppendMessages", "CreateDocument", "AppendDocumentChunks")}
    ),
    "update masks": Special(
        contents.update_masks, {"paths": (60, 1_000, 100_000), "concurrency": (8, 64)}
    ),
    "forks": Special(contents.forks, {"concurrency": (1, 8, 64)}),
    "large deletions": Special(
        contents.large_deletions, {"messages": (20_000,), "sessions": (1, 4)}
    ),
    "deletions during appends": Special(contents.deletion_race, {"concurrency": (8, 64)}),
    "tombstones": Special(contents.tombstones, {"concurrency": (8, 64)}),
    "duplicate users": Special(contents.duplicate_users, {"concurrency": (12, 64)}),
    "one session": Special(contents.one_session, {"concurrency": (64, 500)}),
    "snippets": Special(contents.snippets, {"concurrency": (1, 8, 64)}),
    # Connections
    "unread replies": Special(
        connections.unread_replies,
        {
            "rpc": (
                "ListMessages",
                "GetContext",
                "ListSessions",
                "SearchMessages",
                "ExportUserData",
                "WatchMessages",
                "ListDocumentChunks",
            ),
            "window": (0, 1, 65_535),
            "connections": (1, 4, 20),
        },
    ),
    "resets": Special(
        connections.resets,
        {"rpc": ("ListMessages", "AppendMessages", "WatchMessages", "SearchMessages")},
    ),
    "silent connections": Special(
        connections.silent, {"sends": ("nothing", "preface", "garbage"), "connections": (500,)}
    ),
    # 500 new connections a second. Without a rate this would measure the kernel and gRPC's own
    # threads, as it would for control frames (20,000 a second): a limit in front of the service,
    # and not its code, bounds them.
    "connection churn": Special(connections.churn, {"concurrency": (8, 64)}),
    # Thousands of new connections a second, each with calls: an attack by volume, which a proxy or
    # a firewall in front of the service has to limit.
    "abandoned connections": Special(
        connections.abandoned_connections, {"concurrency": (8, 64)}, is_default=False
    ),
    "slow senders": Special(connections.slow_senders, {"connections": (1, 4), "streams": (100,)}),
    "malformed messages": Special(
        connections.malformed,
        {"form": ("random", "deep", "length", "gzip", "empty"), "concurrency": (8, 64)},
    ),
    "large headers": Special(
        connections.large_headers, {"bytes": (4_000, 16_000, 300_000), "concurrency": (8, 64)}
    ),
    "forged tokens": Special(connections.forged_bearers, {"concurrency": (8, 64, 500)}),
    "control frames": Special(
        connections.control_frames, {"frame": ("ping", "settings", "empty data", "window")}
    ),
    "watch churn": Special(connections.watch_churn, {"concurrency": (8, 64)}),
    "short deadlines": Special(
        connections.short_deadlines,
        {"rpc": ("AppendMessages", "ListMessages", "SearchMessages", "GetContext")},
    ),
}
