"""Neon, as near as one machine comes to it: Debian's PostgreSQL with TLS, a pooler with TLS before it, and the console's own strings.

A name service of the tests' knows Neon's two hosts; an authority of the tests' stands for the public one that vouches for them.
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
from service.store.db.database import DATABASE_ERRORS
from service.store.db.dsn import parse
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
END_ALL = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database() AND pid != pg_backend_pid()"


class Machine(NamedTuple):
    """A PostgreSQL that speaks TLS, and who has signed its certificate."""

    postgres: TlsPostgres
    authority: CertificateAuthority


@pytest.fixture(scope="module")
def machine(cluster: object) -> Generator[Machine]:
    """Give a PostgreSQL whose certificate is for localhost and Neon's hosts, and not for 127.0.0.1."""
    if tls_postgres.find_programs() is None:
        skip_or_fail("Debian's postgresql is not installed")
    authority = CertificateAuthority("the tests' public authority")
    with TlsPostgres(authority.issue(hosts=["localhost", f"*.{REGION}"])) as postgres:
        asyncio.run(migrations.upgrade(parse(f"{postgres.local_url}&sslmode=disable")))
        yield Machine(postgres, authority)


@pytest.fixture
def root(machine: Machine, tmp_path: Path) -> Path:
    """Give the file of the right authority."""
    file = tmp_path / "root.crt"
    file.write_bytes(machine.authority.pem)
    return file


@pytest.fixture
def other_root(tmp_path: Path) -> Path:
    """Give the file of an authority that has signed nothing of ours."""
    file = tmp_path / "other.crt"
    file.write_bytes(CertificateAuthority("somebody else").pem)
    return file


class Neon(NamedTuple):
    """Both hosts of one compute, and where names lead."""

    postgres: TlsPostgres
    places: dict[str, int]
    """The port of each host on this machine."""


@pytest.fixture
def neon(machine: Machine, root: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Neon]:
    """Give a compute with a pooler, its names, and trust in who has signed its certificates."""
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
        places = {DIRECT: machine.postgres.port, POOLED: pooler.port}
        real = socket.getaddrinfo

        def look_up(host: Any, port: Any, *args: Any, **options: Any) -> Any:
            if host in places:
                assert port == 5432, "the console's strings name no port"
                host, port = "127.0.0.1", places[host]
            return real(host, port, *args, **options)

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        # What the system's store of authorities is for OpenSSL.
        monkeypatch.setenv("SSL_CERT_FILE", str(root))
        yield Neon(machine.postgres, places)


def console_url(host: str, query: str = "?sslmode=require&channel_binding=require") -> str:
    return f"postgresql://{USER}:{PASSWORD}@{host}/{DATABASE}{query}"


@pytest.fixture
async def proxy(neon: Neon) -> AsyncGenerator[Proxy]:
    """Put a proxy before both hosts."""
    async with Proxy(f"127.0.0.1:{neon.places[POOLED]}") as opened:
        yield opened


# --- The console's strings.


@pytest.mark.parametrize(
    ("string", "prepared"),
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
    neon: Neon, string: str, prepared: bool
) -> None:
    target = parse(string)
    assert (target.prepared_statements, target.is_pooled) == (prepared, not prepared)
    async with serving(target) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        for _ in range(3):
            await asyncio.gather(*(call() for call in calls_by_route(chat, session_id).values()))
        assert (
            await read_valid_history(neon.postgres.local_url, chat.user_id, session_id)
        ).last_seq == 4
    found = await doctor.describe(target, 10.0)
    assert found.tls == "TLSv1.3"
    verdicts = {
        line.subject: line for line in doctor.diagnose(found, target, doctor.Pool(8, 4, 240, 12))
    }
    assert "certificate verified" in verdicts["TLS"].message
    assert ("through a transaction pooler" in verdicts["connection"].message) is not prepared
    assert PASSWORD not in str(verdicts)


async def test_migrations_connect_to_the_direct_host(neon: Neon) -> None:
    """Where the service is given the pooled host; that one is away."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        neon.places[POOLED] = nobody.getsockname()[1]
        done = await migrations.upgrade(parse(console_url(POOLED)))
        assert done.after == tables.BUILD
        with pytest.raises(OSError, match="Connect call failed"):
            await doctor.describe(parse(console_url(POOLED)), 5.0)


@pytest.mark.parametrize("host", [DIRECT, POOLED])
async def test_sslmode_require_verifies_the_certificate_of_neon(
    neon: Neon, host: str, other_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neon's certificates are public: one of another authority is somebody else's, whatever the mode says."""
    monkeypatch.setenv("SSL_CERT_FILE", str(other_root))
    target = parse(console_url(host))
    with pytest.raises(DATABASE_ERRORS) as refused:
        await doctor.describe(target, 5.0)
    words = doctor.explain(refused.value, target)
    assert f"the certificate of {host} is not trusted" in words
    assert PASSWORD not in words


async def test_documented_roles_have_exactly_the_needed_rights(
    machine: Machine, root: Path
) -> None:
    """docs/how-to/neon.md: an owner who migrates, and a role for the service, who can change no table."""
    once, before_first = re.findall(
        r"```sql\n(.*?)```", (ROOT / "docs" / "how-to" / "neon.md").read_text(), re.DOTALL
    )
    local = f"{machine.postgres.local_url}&sslmode=disable"
    await fetch(local, "CREATE DATABASE roles")
    for statement in _statements(once):
        await fetch(local.replace(f"/{DATABASE}?", "/roles?"), statement)
    owner, service = (
        machine.postgres.url("localhost", sslmode="verify-full", sslrootcert=str(root))
        .replace(f"{USER}:", f"{role}:")
        .replace(f"/{DATABASE}?", "/roles?")
        for role in ("chat_history_owner", "chat_history")
    )
    for statement in _statements(before_first):
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
                await connection.execute(text("ALTER TABLE chat_messages ADD COLUMN x int"))


def _statements(sql: str) -> list[str]:
    lines = [line for line in sql.splitlines() if not line.startswith("--")]
    return [
        each.strip().replace("…", PASSWORD) for each in "\n".join(lines).split(";") if each.strip()
    ]


# --- TLS as libpq means it, asked as an operator asks.


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
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "service", "check",
        cwd=tmp_path, env=os.environ | {"DATABASE_URL": machine.postgres.url(host, **query), "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said = (await process.communicate())[0].decode()
    assert words in said, said
    assert process.returncode == (0 if words.startswith("TLS") else 1), said
    assert PASSWORD not in said
    assert "Traceback" not in said


async def test_error_for_a_wrong_password_does_not_contain_it(machine: Machine) -> None:
    target = parse(
        machine.postgres.url("localhost", sslmode="require").replace(PASSWORD, "npg_wrong")
    )
    with pytest.raises(DATABASE_ERRORS) as refused:
        await doctor.describe(target, 5.0)
    words = doctor.explain(refused.value, target)
    assert "check user and password" in words
    assert "npg_wrong" not in words


# --- Suspended.


@pytest.mark.case(n=10)
@pytest.mark.parametrize("host", [DIRECT, POOLED])
async def test_first_calls_after_a_suspension_wait_until_the_database_wakes(
    neon: Neon, proxy: Proxy, host: str
) -> None:
    """All backends have ended, and new connections are answered three seconds later only."""
    proxy.upstream = f"127.0.0.1:{neon.places[host]}"
    neon.places[host] = proxy.port
    async with serving(parse(console_url(host))) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        await asyncio.gather(*(call() for call in calls_by_route(chat, session_id).values()))
        [[ended]] = await fetch(neon.postgres.local_url, END_ALL)
        assert ended > 0
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
        assert len(waiting) == len(calls), "nothing is answered, and nothing is refused"
        proxy.unblock()
        await asyncio.gather(*calls)
        assert (
            await read_valid_history(neon.postgres.local_url, chat.user_id, session_id)
        ).last_seq == 4
