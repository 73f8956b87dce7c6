"""A local reproduction of Neon: PostgreSQL and a pooler with TLS, and the console's URLs.

The tests patch the resolution of Neon's two host names. A certificate authority of the tests takes
the place of the public one.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from chathistory.v1 import message_pb2
from sqlalchemy import text

from service import doctor
from service.store import tables
from service.store.db.db_errors import DATABASE_ERRORS
from service.store.db.dsn import parse
from service.store.db.engine import find_target_route
from service.store.schema import migrations
from tests.faults.conftest import calls_by_route
from tests.support import pgbouncer, tls_postgres
from tests.support.certificates import CertificateAuthority
from tests.support.chat import Chat, new_messages
from tests.support.cluster import fetch
from tests.support.history import read_valid_history
from tests.support.pgbouncer import PgBouncer
from tests.support.proxy import Proxy
from tests.support.servers import ROOT, connected, serving
from tests.support.tls_postgres import DATABASE, PASSWORD, USER, TlsPostgres
from tests.support.tools import skip_or_fail

ENDPOINT = "ep-cool-sun-a1b2c3d4"
REGION = "eu-central-1.aws.neon.tech"
DIRECT, POOLED = f"{ENDPOINT}.{REGION}", f"{ENDPOINT}-pooler.{REGION}"
TERMINATE_BACKENDS = """
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
WHERE datname = current_database() AND pid != pg_backend_pid()
"""


class Machine(NamedTuple):
    """A PostgreSQL with TLS, and the authority that has signed its certificate."""

    postgres: TlsPostgres
    authority: CertificateAuthority


@pytest.fixture(scope="module")
def machine(cluster: object) -> Generator[Machine]:
    """Provide a PostgreSQL whose certificate names localhost and Neon's hosts, not 127.0.0.1."""
    if tls_postgres.find_programs() is None:
        skip_or_fail("Debian's postgresql is not installed")
    authority = CertificateAuthority("the tests' public authority")
    with TlsPostgres(authority.issue(hosts=["localhost", f"*.{REGION}"])) as postgres:
        asyncio.run(migrations.upgrade(parse(f"{postgres.local_url}&sslmode=disable")))
        yield Machine(postgres, authority)


@pytest.fixture
def root(machine: Machine, tmp_path: Path) -> Path:
    """Provide the file of the authority that has signed the certificates."""
    file = tmp_path / "root.crt"
    file.write_bytes(machine.authority.pem)
    return file


@pytest.fixture
def other_root(tmp_path: Path) -> Path:
    """Provide the file of an authority that has signed none of the certificates."""
    file = tmp_path / "other.crt"
    file.write_bytes(CertificateAuthority("another authority").pem)
    return file


class Neon(NamedTuple):
    """A Neon compute: its PostgreSQL, and the local ports of its two hosts."""

    postgres: TlsPostgres
    ports: dict[str, int]
    """The port on this machine by host name."""


@pytest.fixture
def neon(machine: Machine, root: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Neon]:
    """Provide a compute with a pooler, whose names resolve and whose authority is trusted."""
    if pgbouncer.find_program() is None:
        skip_or_fail("pgbouncer is not installed")
    certificate = machine.authority.issue(hosts=[f"*.{REGION}"])
    settings = {
        "client_tls_sslmode": "require",
        "client_tls_cert_file": "{folder}/tls.crt",
        "client_tls_key_file": "{folder}/tls.key",
    }
    files = {"tls.crt": certificate.cert, "tls.key": certificate.key}
    with PgBouncer(machine.postgres.local_url, settings, files) as pooler:
        ports = {DIRECT: machine.postgres.port, POOLED: pooler.port}
        getaddrinfo = socket.getaddrinfo

        def resolve(host: Any, port: Any, *args: Any, **options: Any) -> Any:
            if host in ports:
                assert port == 5432, "the console's URLs name no port"
                host, port = "127.0.0.1", ports[host]
            return getaddrinfo(host, port, *args, **options)

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        # OpenSSL reads this file instead of the system's store of authorities.
        monkeypatch.setenv("SSL_CERT_FILE", str(root))
        yield Neon(machine.postgres, ports)


def console_url(host: str, query: str = "?sslmode=require&channel_binding=require") -> str:
    return f"postgresql://{USER}:{PASSWORD}@{host}/{DATABASE}{query}"


@pytest.fixture
async def proxy(neon: Neon) -> AsyncGenerator[Proxy]:
    """Provide a proxy that a test puts in front of one of the hosts."""
    async with Proxy(f"127.0.0.1:{neon.ports[POOLED]}") as proxy:
        yield proxy


# --- The console's connection strings.


@pytest.mark.parametrize(
    ("url", "is_prepared"),
    [
        (console_url(POOLED), False),
        (console_url(DIRECT), True),
        (f"psql '{console_url(POOLED)}'", False),
        (console_url(POOLED, "?sslmode=require"), False),
        (console_url(POOLED, ""), False),
        (console_url(DIRECT, f"?sslmode=require&options=endpoint%3D{ENDPOINT}"), True),
        (
            console_url(
                POOLED, f"?options=endpoint%3D{ENDPOINT}&sslmode=require&channel_binding=require"
            ),
            False,
        ),
        (console_url(POOLED, "?pgbouncer=true&connect_timeout=15&sslmode=require"), False),
    ],
)
async def test_connection_strings_of_the_console_work_unchanged(
    neon: Neon, url: str, is_prepared: bool
) -> None:
    target = await find_target_route(parse(url), connect_timeout_s=10)
    assert (target.prepared_statements, target.is_pooled) == (is_prepared, not is_prepared)
    async with serving(parse(url)) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        for _ in range(3):
            await asyncio.gather(*(call() for call in calls_by_route(chat, session_id).values()))
        assert (
            await read_valid_history(neon.postgres.local_url, chat.user_id, session_id)
        ).last_seq == 4
    description = await doctor.describe(target, 10.0)
    assert description.tls == "TLSv1.3"
    verdicts = {
        line.subject: line
        for line in doctor.diagnose(description, target, doctor.Pool(8, 4, 240, 12))
    }
    assert "certificate verified" in verdicts["TLS"].message
    assert ("through a transaction pooler" in verdicts["connection"].message) is not is_prepared
    assert PASSWORD not in str(verdicts)


async def test_migrations_connect_to_the_direct_host(neon: Neon) -> None:
    """The service is configured with the pooled host, which is down."""
    with socket.socket() as not_listening:
        not_listening.bind(("127.0.0.1", 0))
        neon.ports[POOLED] = not_listening.getsockname()[1]
        migration = await migrations.upgrade(parse(console_url(POOLED)))
        assert migration.after == tables.BUILD
        with pytest.raises(OSError, match="Connect call failed"):
            await doctor.describe(parse(console_url(POOLED)), 5.0)


@pytest.mark.parametrize("host", [DIRECT, POOLED])
async def test_sslmode_require_verifies_the_certificate_of_neon(
    neon: Neon, host: str, other_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A public authority signs Neon's certificates, so any other certificate is an impostor's."""
    monkeypatch.setenv("SSL_CERT_FILE", str(other_root))
    target = parse(console_url(host))
    with pytest.raises(DATABASE_ERRORS) as caught:
        await doctor.describe(target, 5.0)
    explanation = doctor.explain(caught.value, target)
    assert f"the certificate of {host} is not trusted" in explanation
    assert PASSWORD not in explanation


async def test_documented_roles_have_exactly_the_needed_rights(
    machine: Machine, root: Path
) -> None:
    """docs/how-to/neon.md: an owner for migrations, and a role that cannot change the schema."""
    role_sql, owner_sql = re.findall(
        r"```sql\n(.*?)```", (ROOT / "docs" / "how-to" / "neon.md").read_text(), re.DOTALL
    )
    local = f"{machine.postgres.local_url}&sslmode=disable"
    await fetch(local, "CREATE DATABASE roles")
    for statement in _statements(role_sql):
        await fetch(local.replace(f"/{DATABASE}?", "/roles?"), statement)
    owner, service = (
        machine.postgres.url("localhost", sslmode="verify-full", sslrootcert=str(root))
        .replace(f"{USER}:", f"{role}:")
        .replace(f"/{DATABASE}?", "/roles?")
        for role in ("chat_history_owner", "chat_history")
    )
    for statement in _statements(owner_sql):
        await fetch(
            local.replace(f"/{DATABASE}?", "/roles?").replace(USER, "chat_history_owner"), statement
        )
    await migrations.upgrade(parse(owner))
    async with serving(service) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        await asyncio.gather(*(call() for call in calls_by_route(chat, session_id).values()))
        await chat.delete_session(session_id)
        engine = server.database.engine
        async with engine.connect() as connection:
            with pytest.raises(DATABASE_ERRORS, match="must be owner"):
                await connection.execute(
                    text("ALTER TABLE chathistory.chat_messages ADD COLUMN x int")
                )


def _statements(sql: str) -> list[str]:
    lines = [line for line in sql.splitlines() if not line.startswith("--")]
    statements = "\n".join(lines).replace("…", PASSWORD).split(";")
    return [statement.strip() for statement in statements if statement.strip()]


# --- The modes of TLS that libpq defines, as `check` reports them.


RIGHT, WRONG = "the right authority", "another authority"


@pytest.mark.parametrize(
    ("mode", "authority", "host", "words"),
    [
        ("require", None, "localhost", "TLSv1.3, sslmode=require"),
        ("require", None, "127.0.0.1", "TLSv1.3, sslmode=require"),
        ("require", WRONG, "localhost", "is not trusted"),
        ("verify-ca", RIGHT, "127.0.0.1", "TLSv1.3, sslmode=verify-ca, certificate verified"),
        ("verify-ca", WRONG, "localhost", "is not trusted"),
        ("verify-full", RIGHT, "localhost", "TLSv1.3, sslmode=verify-full, certificate verified"),
        ("verify-full", None, "localhost", "is not trusted"),
        ("verify-full", WRONG, "localhost", "is not trusted"),
        ("verify-full", RIGHT, "127.0.0.1", "is for another name"),
        ("disable", None, "localhost", "no encryption"),
    ],
)
async def test_check_reports_whether_the_certificate_is_verified(
    machine: Machine,
    root: Path,
    other_root: Path,
    tmp_path: Path,
    mode: str,
    authority: str | None,
    host: str,
    words: str,
) -> None:
    query = {"sslmode": mode}
    if authority is not None:
        query["sslrootcert"] = str(root if authority == RIGHT else other_root)
    variables = {
        "DATABASE_URL": machine.postgres.url(host, **query),
        "PYTHONPATH": str(ROOT),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "service",
        "check",
        cwd=tmp_path,
        env=os.environ | variables,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output = (await process.communicate())[0].decode()
    assert words in output, output
    assert process.returncode == (0 if words.startswith("TLS") else 1), output
    assert PASSWORD not in output
    assert "Traceback" not in output


async def test_error_for_a_wrong_password_does_not_contain_it(machine: Machine) -> None:
    target = parse(
        machine.postgres.url("localhost", sslmode="require").replace(PASSWORD, "npg_wrong")
    )
    with pytest.raises(DATABASE_ERRORS) as caught:
        await doctor.describe(target, 5.0)
    explanation = doctor.explain(caught.value, target)
    assert "check user and password" in explanation
    assert "npg_wrong" not in explanation


# --- A suspended compute.


@pytest.mark.case(n=10)
@pytest.mark.parametrize("host", [DIRECT, POOLED])
async def test_first_calls_after_a_suspension_wait_until_the_database_wakes(
    neon: Neon, proxy: Proxy, host: str
) -> None:
    """All backends have ended, and new connections are answered only after three seconds."""
    proxy.upstream = f"127.0.0.1:{neon.ports[host]}"
    neon.ports[host] = proxy.port
    async with serving(parse(console_url(host))) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        await asyncio.gather(*(call() for call in calls_by_route(chat, session_id).values()))
        [[terminated]] = await fetch(neon.postgres.local_url, TERMINATE_BACKENDS)
        assert terminated > 0
        proxy.block()
        proxy.reset_connections()
        request = message_pb2.AppendMessagesRequest(
            user_id=chat.user_id, session_id=session_id, messages=new_messages(1)
        )
        calls = [
            asyncio.ensure_future(call()) for call in calls_by_route(chat, session_id).values()
        ]
        calls.append(asyncio.ensure_future(stub.AppendMessages(request, timeout=10)))
        _, waiting = await asyncio.wait(calls, timeout=3.0)
        assert len(waiting) == len(calls), "a call ended before the database was awake"
        proxy.unblock()
        await asyncio.gather(*calls)
        assert (
            await read_valid_history(neon.postgres.local_url, chat.user_id, session_id)
        ).last_seq == 4
