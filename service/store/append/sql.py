"""The statements of the append path; appender.py explains why they are correct."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

from service.store.append.request import Append, Entry, Key
from service.store.db.hot_pool import Record, Statement
from service.store.db.replication import CONFIRM
from service.store.session_tombstones import RETENTION
from service.store.tables import OPEN_END, OutboxKind, SessionState

# Written as text, so that the statement PostgreSQL receives can be read here. The arguments are
# arrays with one element for each session ($1 to $8), each expectation ($9 to $12) and each message
# ($14 to $29); $13 is the lock timeout.
#
# A session that the statement has created is recognised by its times. A new session's created_at
# and updated_at are equal, while an append to an existing one always sets updated_at beyond
# created_at, even after an import has set them. (xmax = 0 does not mean a new row: an updated row
# that other transactions had locked has it, too.)
#
# A statement that must not be committed divides by zero: the error has no text of a user. The
# divisor contains a column, so that the planner does not evaluate it.
#
# If messages are indexed, the session's row in the outbox holds the first message that is pending
# for the index. A row that holds a lower or equal one is not changed: only the first append after
# the indexer has leased it updates it, in place. It is locked nevertheless, so that the indexer
# cannot lease it before this transaction's messages are visible.
_ENQUEUE = f""", enqueued AS (
    INSERT INTO chathistory.search_outbox AS o (kind, user_id, entity_id, since, through)
    SELECT {OutboxKind.SESSION:d}, a.user_id, a.id, a.last_seq - i.count + 1, {OPEN_END}
    FROM appended AS a
    JOIN unnest($1::uuid[], $2::uuid[], $3::bigint[]) AS i (user_id, id, count)
      ON i.user_id = a.user_id AND i.id = a.id
    ORDER BY a.user_id, a.id
    ON CONFLICT (kind, user_id, entity_id) DO UPDATE SET
        version = o.version + 1,
        since = least(o.since, excluded.since),
        through = greatest(o.through, excluded.through),
        due_at = CASE WHEN o.due_at = 'infinity' THEN excluded.due_at ELSE o.due_at END
    WHERE o.since > excluded.since OR o.through < excluded.through OR o.due_at = 'infinity'
)"""  # noqa: S608 - only constants are inserted


# If the request names no session, the id of its session is derived, and a tombstone of that session
# refuses the append. `session_tombstones.py` explains why the statement also inserts a row for each
# of these sessions. $30 has one element for each session.
_NO_TOMBSTONE = f"""AND NOT (i.is_derived AND EXISTS (
               SELECT FROM chathistory.session_tombstones AS t
               WHERE t.user_id = i.user_id AND t.session_id = i.id
                 AND t.deleted_at > clock_timestamp() - interval '{RETENTION}'))"""
_GUARD = f""", guarded AS (
    INSERT INTO chathistory.session_tombstones AS t (user_id, session_id, deleted_at)
    SELECT a.user_id, a.id, '-infinity'
    FROM appended AS a
    JOIN unnest($1::uuid[], $2::uuid[], $30::boolean[]) AS d (user_id, id, is_derived)
      ON d.user_id = a.user_id AND d.id = a.id
    WHERE d.is_derived
    ORDER BY a.user_id, a.id
    ON CONFLICT (user_id, session_id) DO UPDATE SET
        deleted_at = to_timestamp(1 / (isfinite(t.deleted_at)::integer - 1))
    WHERE t.deleted_at > clock_timestamp() - interval '{RETENTION}'
)"""  # noqa: S608 - only a constant is inserted


# An append is as durable as promised also where the server or the role has a weaker setting. A
# start-up parameter would lower `remote_apply`.
_RAISE_SYNCHRONOUS_COMMIT = """,
               CASE WHEN current_setting('synchronous_commit') IN ('off', 'local', 'remote_write')
                    THEN set_config('synchronous_commit', 'on', true) END"""


def _append_statement(enqueue: str, durability: str, *, has_derived_ids: bool) -> Statement:
    argument, column, condition, guard = "", "", "", ""
    if has_derived_ids:
        argument, column = ", $30::boolean[]", ", is_derived"
        condition, guard = _NO_TOMBSTONE, _GUARD
    return Statement.from_text(f"""
WITH appended AS (
    INSERT INTO chathistory.chat_sessions AS s
        (user_id, id, title, summary, metadata, last_seq, message_count, created_at, updated_at,
         fingerprint)
    SELECT i.user_id, i.id, i.title, i.summary, i.metadata, i.count, i.count, i.at, i.at,
           i.fingerprint
    FROM (
        SELECT i.*, clock_timestamp() AS at
        FROM (SELECT set_config('lock_timeout', $13, true){durability}) AS _,
             unnest($1::uuid[], $2::uuid[], $3::bigint[], $4::boolean[], $5::text[], $6::text[],
                    $7::jsonb[], $8::bytea[]{argument})
             AS i (user_id, id, count, may_create, title, summary, metadata,
                   fingerprint{column})
        WHERE (i.may_create
           OR EXISTS (SELECT FROM chathistory.chat_sessions AS c
                      WHERE c.user_id = i.user_id AND c.id = i.id))
           {condition}
        ORDER BY i.user_id, i.id
    ) AS i
    ON CONFLICT (user_id, id) DO UPDATE SET
        last_seq = s.last_seq + excluded.last_seq,
        message_count = s.message_count + excluded.message_count,
        updated_at = greatest(
            greatest(s.updated_at, s.created_at) + interval '1 microsecond', excluded.updated_at)
    WHERE s.state = {SessionState.ACTIVE:d}
      AND NOT EXISTS (
        SELECT FROM unnest($9::uuid[], $10::uuid[], $11::bigint[], $12::bigint[])
             AS e (user_id, id, last_seq, session_created_us)
        WHERE e.user_id = s.user_id AND e.id = s.id
          AND (e.last_seq <> s.last_seq
               OR e.session_created_us <> (date_part('epoch', s.created_at) * 1e6)::bigint))
    RETURNING s.user_id, s.id, s.last_seq, s.updated_at, s.updated_at = s.created_at AS created
), stored AS (
    INSERT INTO chathistory.chat_messages
        (user_id, session_id, seq, id, role, content, parts, metadata, token_count, token_estimate,
         size, author, feedback_score, feedback_comment, created_at, updated_at, fingerprint)
    SELECT a.user_id, a.id,
           CASE WHEN m.may_create OR NOT a.created THEN a.last_seq - m.back
                ELSE 1 / (a.last_seq - a.last_seq) /* the session was deleted concurrently */ END,
           m.id, m.role, m.content, m.parts, m.metadata, m.token_count, m.token_estimate, m.size,
           m.author, m.feedback_score, m.feedback_comment, a.updated_at, a.updated_at, m.fingerprint
    FROM unnest($14::uuid[], $15::uuid[], $16::bigint[], $17::boolean[], $18::uuid[],
                $19::smallint[], $20::text[], $21::jsonb[], $22::jsonb[], $23::integer[],
                $24::integer[], $25::integer[], $26::text[], $27::double precision[], $28::text[],
                $29::bytea[])
         AS m (user_id, session_id, back, may_create, id, role, content, parts, metadata,
               token_count, token_estimate, size, author, feedback_score, feedback_comment,
               fingerprint)
    JOIN appended AS a ON a.user_id = m.user_id AND a.id = m.session_id
){guard}{enqueue}
SELECT user_id::text, id::text AS session_id, last_seq,
       (date_part('epoch', updated_at) * 1e6)::bigint AS at, created
FROM appended
""")  # noqa: S608 - only constants are inserted


def _look_up_statement(durability: str) -> Statement:
    # One row for each message whose session exists, so that one snapshot holds both; `id` is NULL
    # if the message is not stored.
    #
    # A message that is found is acknowledged, although the commit that stored it may not have
    # waited for the synchronous standbys: the connection of its attempt was cut during the wait, or
    # the server restarted. So the look-up commits a message in PostgreSQL's log, and its own commit
    # waits for everything before it. A look-up that finds nothing acknowledges nothing, and writes
    # nothing. A standby cannot write, and `is_confirmed` is then false.
    return Statement.from_text(f"""
WITH looked_up AS MATERIALIZED (
    SELECT s.user_id::text AS user_id, s.id::text AS session_id, s.state, s.last_seq,
           (date_part('epoch', s.created_at) * 1e6)::bigint AS session_created_us,
           m.id::text AS id, m.seq, m.fingerprint,
           (date_part('epoch', m.created_at) * 1e6)::bigint AS at,
           date_part('epoch', clock_timestamp() - m.created_at) * 1e6 AS age
    FROM unnest($1::uuid[], $2::uuid[], $3::uuid[]) AS w (user_id, session_id, id)
    JOIN chathistory.chat_sessions AS s ON s.user_id = w.user_id AND s.id = w.session_id
    LEFT JOIN chathistory.chat_messages AS m
           ON m.user_id = w.user_id AND m.session_id = w.session_id AND m.id = w.id
), confirmed AS MATERIALIZED (
    SELECT {CONFIRM} AS is_confirmed{durability}
    WHERE EXISTS (SELECT FROM looked_up WHERE id IS NOT NULL)
)
SELECT looked_up.*, confirmed.is_confirmed FROM looked_up LEFT JOIN confirmed ON true
""")  # noqa: S608 - only constants are inserted


class Statements(NamedTuple):
    """The statements of an appender."""

    append: Statement
    append_derived: Statement
    """For batches with a derived id, so that other appends do not pay for the tombstones."""
    look_up: Statement


@cache
def statements(*, enqueues: bool, raises_synchronous_commit: bool = True) -> Statements:
    """Return the statements of an appender.

    Args:
        enqueues: Whether appended messages are enqueued for the search index.
        raises_synchronous_commit: Whether the statements wait for their commits to be durable,
            where the server or the role has a weaker `synchronous_commit`.
    """
    enqueue = _ENQUEUE if enqueues else ""
    durability = _RAISE_SYNCHRONOUS_COMMIT if raises_synchronous_commit else ""
    return Statements(
        _append_statement(enqueue, durability, has_derived_ids=False),
        _append_statement(enqueue, durability, has_derived_ids=True),
        _look_up_statement(durability),
    )


def in_seq_order(batch: Iterable[Append]) -> list[Append]:
    """Return the items in seq order: in each session, those that may create it come first."""
    return sorted(batch, key=lambda item: not item.may_insert_session)


def append_arguments(
    batch: Sequence[Append], lock_timeout: str, *, has_derived_ids: bool = False
) -> tuple[Any, ...]:
    """Return the arguments of the append statement, or of the one for derived ids.

    Args:
        batch: The items. Those of one session share its row. An item that is conditional or has a
            derived id is the only one of its session.
        lock_timeout: Time to wait for a locked session, with its unit.
        has_derived_ids: Whether any item has a derived id, which selects the statement.
    """
    items = in_seq_order(batch)
    counts: dict[Key, int] = {}
    first_items: dict[Key, Append] = {}
    for item in items:
        counts[item.key] = counts.get(item.key, 0) + len(item.pending)
        first_items.setdefault(item.key, item)
    conditional = [item for item in items if item.is_conditional]
    rows = [
        (item.key, first_items[item.key].may_insert_session, message)
        for item in items
        for message in item.pending
    ]
    messages = [message for _, _, message in rows]
    arguments = (
        [key[0] for key in counts],
        [key[1] for key in counts],
        list(counts.values()),
        [item.may_insert_session for item in first_items.values()],
        [item.new_session.title for item in first_items.values()],
        [item.new_session.summary for item in first_items.values()],
        [item.new_session.metadata for item in first_items.values()],
        [item.new_session.fingerprint for item in first_items.values()],
        [item.key[0] for item in conditional],
        [item.key[1] for item in conditional],
        [item.expected_last_seq for item in conditional],
        [item.session_created_us for item in conditional],
        lock_timeout,
        [key[0] for key, _, _ in rows],
        [key[1] for key, _, _ in rows],
        _distances(items, counts),
        [may_insert for _, may_insert, _ in rows],
        *map(list, zip(*messages, strict=True)),
    )
    if not has_derived_ids:
        return arguments
    return (*arguments, [item.has_derived_id for item in first_items.values()])


def _distances(items: Sequence[Append], counts: dict[Key, int]) -> list[int]:
    """Return the distance of each pending message from the new last_seq of its session."""
    distances: list[int] = []
    remaining = dict(counts)
    for item in items:
        end = remaining[item.key]
        remaining[item.key] = end - len(item.pending)
        distances.extend(range(end - 1, remaining[item.key] - 1, -1))
    return distances


def answer(batch: list[Append], sessions: dict[Key, Record]) -> list[Append]:
    """Answer the items of a committed batch, and return those that the statement left out."""
    left_out: list[Append] = []
    last_seqs = {key: row["last_seq"] for key, row in sessions.items()}
    # Backwards, since a session's row holds the seq of the last message of its last item.
    for item in reversed(in_seq_order(batch)):
        row = sessions.get(item.key)
        if row is None:
            left_out.append(item)
            continue
        first_seq = last_seqs[item.key] - len(item.pending) + 1
        last_seqs[item.key] = first_seq - 1
        created_us = row["at"]
        item.finish(
            (
                Entry(message.id, seq, created_us, False)
                for seq, message in enumerate(item.pending, first_seq)
            ),
            session_created=row["created"] and first_seq == 1,
        )
    return left_out[::-1]


def look_up_arguments(items: Iterable[Append]) -> tuple[list[str], list[str], list[str]]:
    """Return the arguments of the look-up for every message of these items."""
    keys = [(*item.key, message.id) for item in items for message in item.messages]
    return [key[0] for key in keys], [key[1] for key in keys], [key[2] for key in keys]
