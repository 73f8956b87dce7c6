"""A deferred trigger with which PostgreSQL itself fails at the commit of a transaction."""

from __future__ import annotations

from tests.support.cluster import fetch

_INSTALL = (
    "CREATE SEQUENCE IF NOT EXISTS test_faults MINVALUE -1000",
    "CREATE TABLE IF NOT EXISTS test_fault AS SELECT ''::text AS kind, ''::text AS content",
    """
    CREATE OR REPLACE FUNCTION test_fault() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
        fault record;
    BEGIN
        SELECT * INTO fault FROM test_fault;
        IF coalesce(to_jsonb(NEW)->>'content', '') NOT LIKE fault.content
            OR nextval('test_faults') >= 0
        THEN
            RETURN NULL;
        END IF;
        IF fault.kind = 'terminate' THEN
            PERFORM pg_terminate_backend(pg_backend_pid());
        ELSE
            RAISE 'a fault of the tests' USING ERRCODE = fault.kind;
        END IF;
        RETURN NULL;
    END $$
    """,
)


async def install(database_url: str, table: str = "chat_messages", event: str = "INSERT") -> None:
    """Create the trigger on a table of a test's database; it does nothing until it is armed."""
    for statement in (
        *_INSTALL,
        f"DROP TRIGGER IF EXISTS test_fault ON {table}",
        f"""
        CREATE CONSTRAINT TRIGGER test_fault AFTER {event} ON {table} DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION test_fault()
        """,
    ):
        await fetch(database_url, statement)
    await arm(database_url, "40001", 0)


async def arm(database_url: str, kind: str, count: int, content: str = "%") -> None:
    """Make the next `count` transactions that write to the table fail at their commit.

    Args:
        kind: The SQLSTATE to fail with, or `terminate`: the backend ends itself.
        count: The number of transactions.
        content: Only rows whose content is LIKE this make a transaction fail.
    """
    await fetch(database_url, "UPDATE test_fault SET kind = $1, content = $2", kind, content)
    await fetch(database_url, "SELECT setval('test_faults', $1, false)", -count)
