"""`chat-history check` names the cause and the remedy of what an operator can cause."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Generator
from typing import NamedTuple

import asyncpg
import pytest

from service.doctor import Verdict, describe, explain
from service.store import tables
from service.store.db.db_errors import DATABASE_ERRORS
from service.store.db.dsn import parse
from tests.support import tls_postgres
from tests.support.certificates import CertificateAuthority
from tests.support.cluster import Cluster, connected_to, fetch
from tests.support.findings import findings_of, select
from tests.support.roles import Role, service_role
from tests.support.statements import database_name
from tests.support.tls_postgres import TlsPostgres
from tests.support.tools import skip_or_fail

pytestmark = pytest.mark.faults


@pytest.fixture
async def role(database_url: str) -> AsyncGenerator[Role]:
    """Provide a role with the documented rights."""
    async with service_role(database_url) as role:
        yield role


async def explanation_of(url: str) -> str:
    """Return why a database cannot be used."""
    with pytest.raises(DATABASE_ERRORS) as caught:
        await describe(parse(url), 5.0)
    return explain(caught.value, parse(url))


# --- What an operator can cause, and what is reported while the service can still connect.


class Cause(NamedTuple):
    """Something that an operator did, and the finding on it."""

    statement: str
    """Run on the database as its owner. `{role}` and `{name}` are the role and the database."""
    subject: str
    verdict: Verdict
    words: str
    """In the message: the cause and the remedy, as a regular expression."""


TODO, NOTE = Verdict.TODO, Verdict.NOTE
CAUSES = {
    "database read-only": Cause(
        "ALTER DATABASE {name} SET default_transaction_read_only = on",
        "connection",
        TODO,
        "read-only.*run ALTER DATABASE {name} RESET default_transaction_read_only",
    ),
    "role read-only": Cause(
        "ALTER ROLE {role} SET default_transaction_read_only = on",
        "connection",
        TODO,
        "read-only.*run ALTER ROLE {role} RESET default_transaction_read_only",
    ),
    "role read-only in the database": Cause(
        "ALTER ROLE {role} IN DATABASE {name} SET default_transaction_read_only = on",
        "connection",
        TODO,
        "run ALTER ROLE {role} IN DATABASE {name} RESET default_transaction_read_only",
    ),
    "no space": Cause(
        "ALTER DATABASE {name} SET temp_file_limit = '64kB'",
        "writes",
        TODO,
        "temp_file_limit is reached .*53400",
    ),
    "statement_timeout": Cause(
        "ALTER ROLE {role} SET statement_timeout = '4s'",
        "statement_timeout",
        TODO,
        "4000 ms: .*receive UNAVAILABLE; run ALTER ROLE {role} RESET statement_timeout",
    ),
    "transaction_timeout": Cause(
        "ALTER DATABASE {name} SET transaction_timeout = '4s'",
        "transaction_timeout",
        TODO,
        "4000 ms: .*run ALTER DATABASE {name} RESET transaction_timeout",
    ),
    "idle_in_transaction_session_timeout": Cause(
        "ALTER ROLE ALL IN DATABASE {name} SET idle_in_transaction_session_timeout = '1s'",
        "idle_in_transaction_session_timeout",
        TODO,
        "1000 ms: .*RESET idle_in_transaction_session_timeout",
    ),
    "idle_session_timeout": Cause(
        "ALTER ROLE {role} SET idle_session_timeout = '20s'",
        "idle_session_timeout",
        NOTE,
        "20000 ms: .*closes connections.*run ALTER ROLE {role} RESET idle_session_timeout",
    ),
    "synchronous_commit": Cause(
        "ALTER ROLE {role} SET synchronous_commit = off",
        "synchronous_commit",
        TODO,
        "off: a crash may lose acknowledged writes.*ALTER ROLE … SET synchronous_commit = on",
    ),
    "client_min_messages": Cause(
        "ALTER ROLE {role} SET client_min_messages = error",
        "client_min_messages",
        NOTE,
        "hides the warning.*ALTER ROLE … SET client_min_messages = warning",
    ),
    "isolation": Cause(
        "ALTER ROLE {role} SET default_transaction_isolation = 'repeatable read'",
        "default_transaction_isolation",
        NOTE,
        "slower; run ALTER ROLE … SET default_transaction_isolation = 'read committed'",
    ),
    "privilege": Cause(
        "REVOKE INSERT ON chathistory.chat_messages FROM {role}",
        "privileges",
        TODO,
        "lacks INSERT on chathistory.chat_messages: run GRANT SELECT, INSERT, UPDATE, DELETE ON "
        "ALL TABLES IN SCHEMA chathistory TO {role}, as the owner",
    ),
    "all privileges": Cause(
        "REVOKE ALL ON ALL TABLES IN SCHEMA chathistory FROM {role}",
        "privileges",
        TODO,
        "lacks SELECT on chathistory.alembic_version and [0-9]+ further privileges: run GRANT",
    ),
    "schema that cannot be read": Cause(
        "REVOKE ALL ON ALL TABLES IN SCHEMA chathistory FROM {role}",
        "schema",
        TODO,
        "version of the schema chathistory cannot be read: .*lacks privileges",
    ),
    "schema that cannot be used": Cause(
        "REVOKE USAGE ON SCHEMA chathistory FROM {role}",
        "schema",
        TODO,
        "may not use the schema chathistory.*GRANT USAGE ON SCHEMA chathistory TO the role",
    ),
    "limit of the role": Cause(
        "ALTER ROLE {role} CONNECTION LIMIT 11",
        "pool",
        TODO,
        "up to 12 connections.*the role {role} may have 11: run ALTER ROLE … CONNECTION LIMIT -1, "
        "or lower CHAT_HISTORY_DB_POOL_SIZE",
    ),
    "limit of the database": Cause(
        "ALTER DATABASE {name} CONNECTION LIMIT 11",
        "pool",
        TODO,
        "the database may have 11: run ALTER DATABASE … CONNECTION LIMIT -1, or lower",
    ),
    "schema behind": Cause(
        "UPDATE chathistory.alembic_version SET version_num = '0003'",
        "schema",
        TODO,
        "at revision 0003 and this build needs .*: run `chat-history migrate`",
    ),
    "schema ahead": Cause(
        f"UPDATE chathistory.schema_info SET min_build = {tables.BUILD + 1}",
        "schema",
        TODO,
        "needs build .* or newer, .*: deploy a newer one",
    ),
}


@pytest.mark.usefixtures("durable_server")
@pytest.mark.parametrize("cause", CAUSES)
async def test_check_names_cause_and_remedy(database_url: str, role: Role, cause: str) -> None:
    """Before it, there is nothing to do."""
    before = await findings_of(role.url)
    assert not [finding for finding in before if finding.verdict is TODO]
    statement, subject, verdict, words = CAUSES[cause]
    values = {"role": role.name, "name": database_name(database_url)}
    if subject == "transaction_timeout" and not await fetch(
        database_url, "SELECT FROM pg_settings WHERE name = $1", subject
    ):
        pytest.skip("this PostgreSQL has no transaction_timeout")
    await fetch(database_url, statement.format(**values))
    finding = select(await findings_of(role.url), subject)
    assert finding.verdict is verdict
    assert re.search(words.format(**values), finding.message), finding.message
    assert finding not in before


@pytest.mark.case(n=507)
async def test_check_is_not_ended_by_the_timeouts_that_it_names(
    database_url: str, role: Role
) -> None:
    """A statement that waits for a lock takes longer than they allow."""
    await fetch(database_url, f"ALTER ROLE {role.name} SET statement_timeout = '500ms'")
    async with connected_to(database_url) as holder:
        await holder.execute("BEGIN; LOCK TABLE chathistory.search_outbox")
        findings = await findings_of(role.url)
    assert select(findings, "statement_timeout").verdict is TODO
    assert select(findings, "locks").verdict is NOTE


# --- What is reported when the service cannot connect.


REFUSALS = {
    "login": ("ALTER ROLE {role} NOLOGIN", "28000: run ALTER ROLE … LOGIN"),
    "privilege": (
        "REVOKE CONNECT ON DATABASE {name} FROM PUBLIC",
        "42501: run GRANT CONNECT ON DATABASE … TO the role",
    ),
    "limit of the role": (
        "ALTER ROLE {role} CONNECTION LIMIT 0",
        "53300: run ALTER ROLE … CONNECTION LIMIT -1, or lower CHAT_HISTORY_DB_POOL_SIZE",
    ),
    "limit of the database": (
        "ALTER DATABASE {name} CONNECTION LIMIT 0",
        "53300: run ALTER DATABASE … CONNECTION LIMIT -1, or lower CHAT_HISTORY_DB_POOL_SIZE",
    ),
    "connections": (
        "ALTER DATABASE {name} ALLOW_CONNECTIONS false",
        "55000: run ALTER DATABASE … ALLOW_CONNECTIONS true",
    ),
}


@pytest.mark.case(n=506)
@pytest.mark.parametrize("refusal", REFUSALS)
async def test_check_explains_a_rejected_connection(
    cluster: Cluster, database_url: str, role: Role, refusal: str
) -> None:
    statement, words = REFUSALS[refusal]
    admin, name = cluster.url("postgres"), database_name(database_url)
    await fetch(admin, statement.format(role=role.name, name=name))
    try:
        explanation = await explanation_of(role.url)
    finally:
        await fetch(admin, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    assert "rejected the connection" in explanation
    assert words in explanation


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("postgres@", "nobody@"), "28000: create the role, or correct the user in DATABASE_URL"),
        (("/test_", "/nowhere_"), "3D000: the database does not exist: create it"),
    ],
)
async def test_check_explains_a_name_that_does_not_exist(
    database_url: str, change: tuple[str, str], words: str
) -> None:
    assert words in await explanation_of(database_url.replace(*change, 1))


def test_check_explains_a_server_without_free_connections() -> None:
    """The server's limit concerns all databases, so no test can reach it."""
    error = asyncpg.TooManyConnectionsError("sorry, too many clients already")
    explanation = explain(error, parse("postgresql://u@h/d"))
    assert "raise max_connections" in explanation
    assert "CHAT_HISTORY_DB_POOL_SIZE" in explanation


@pytest.fixture(scope="module")
def password_server(cluster: object) -> Generator[TlsPostgres]:
    """Provide a PostgreSQL that requires TLS and a password."""
    if tls_postgres.find_programs() is None:
        skip_or_fail("Debian's postgresql is not installed")
    with TlsPostgres(CertificateAuthority().issue()) as postgres:
        yield postgres


@pytest.mark.case(n=506)
async def test_check_explains_a_wrong_password_without_showing_it(
    password_server: TlsPostgres,
) -> None:
    url = password_server.url(sslmode="require").replace(tls_postgres.PASSWORD, "npg_wrong")
    explanation = await explanation_of(url)
    assert "28P01: the server rejects the role or its password: check user and" in explanation
    assert "npg_" not in explanation


@pytest.mark.case(n=506)
async def test_check_explains_a_missing_line_of_pg_hba(password_server: TlsPostgres) -> None:
    explanation = await explanation_of(password_server.url(sslmode="disable"))
    assert "no pg_hba.conf entry" in explanation
    assert "28000: add a line for this role, database and address to pg_hba.conf" in explanation
