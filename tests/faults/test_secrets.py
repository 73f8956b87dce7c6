"""Secrets that are changed in their files are used without a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from service.cli.common import load_target
from service.server import Server
from service.store.db.dsn import Target
from service.store.schema import migrations
from tests.support import tls_postgres
from tests.support.certificates import CertificateAuthority, CertificatePair
from tests.support.chat import Chat
from tests.support.cluster import fetch
from tests.support.servers import connected, serving, settings
from tests.support.tls_postgres import PASSWORD, USER, TlsPostgres
from tests.support.tools import skip_or_fail

NEW_PASSWORD = "an0ther: /@#?%"
ENOUGH = 20.0
"""Seconds to wait for what takes a few: a shared machine may pause for some."""
TERMINATE = (
    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
    "WHERE application_name = 'chat-history'"
)
_CERTIFICATE_HBA = "local all all trust\nhostssl all all 127.0.0.1/32 cert\n"


@pytest.fixture
def postgres(cluster: object) -> Generator[TlsPostgres]:
    """Provide a PostgreSQL that requires TLS and a password."""
    if tls_postgres.find_programs() is None:
        skip_or_fail("Debian's postgresql is not installed")
    with TlsPostgres(CertificateAuthority().issue()) as postgres:
        yield postgres


def configured_target(**values: object) -> Target:
    target = load_target(settings(**values))
    assert target is not None
    return target


async def query(postgres: TlsPostgres, sql: str) -> None:
    await fetch(f"{postgres.local_url}&sslmode=disable", sql)


async def change_password(postgres: TlsPostgres) -> None:
    """Change the password, and end the connections, which would stay open."""
    await query(postgres, f"ALTER ROLE {USER} PASSWORD '{NEW_PASSWORD}'")
    await query(postgres, TERMINATE)


async def wait_until_unready(server: Server) -> str:
    async with asyncio.timeout(ENOUGH):
        while server.readiness.is_ready:
            await asyncio.sleep(0.05)
    return str(server.readiness.problems)


def rewrite(_folder: Path, path: Path, content: str) -> None:
    path.write_text(content)


def swap(folder: Path, path: Path, content: str) -> None:
    """Replace the folder by a symbolic link, as Kubernetes does with a mounted secret."""
    version = folder / "version 2"
    version.mkdir()
    (version / path.name).write_text(content)
    (folder / "new").symlink_to(version)
    (folder / "new").replace(path.parent)


@pytest.mark.case(n=506)
@pytest.mark.parametrize("replace", [rewrite, swap])
async def test_changed_connection_string_is_used_without_a_restart(
    postgres: TlsPostgres, tmp_path: Path, replace: Callable[[Path, Path, str], None]
) -> None:
    """The file changes before the old connections end, so that no call fails."""
    url = postgres.url(sslmode="require")
    (tmp_path / "version 1").mkdir()
    (tmp_path / "secret").symlink_to(tmp_path / "version 1")
    path = tmp_path / "secret" / "url"
    path.write_text(f"{url}\n")
    target = configured_target(database_url_file=path)
    await migrations.upgrade(target)
    async with serving(target) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        encoded = "an0ther%3A%20%2F%40%23%3F%25"
        replace(tmp_path, path, url.replace(PASSWORD, encoded))
        await change_password(postgres)
        async with asyncio.timeout(ENOUGH):
            await chat.append(session_id, "with the new password")
            await chat.get_session(session_id)


@pytest.mark.case(n=506)
async def test_service_recovers_when_the_file_of_the_password_changes(
    postgres: TlsPostgres, tmp_path: Path
) -> None:
    """The password changes first: an outage with its cause, until the file has it, too."""
    path = tmp_path / "password"
    path.write_text(f"{PASSWORD}\n")
    url = postgres.url(sslmode="require").replace(PASSWORD, "not-used")
    target = configured_target(database_url=url, database_password_file=path)
    await migrations.upgrade(target)
    async with serving(target) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        await change_password(postgres)
        append = asyncio.ensure_future(chat.append(session_id, "waits"))
        problem = await wait_until_unready(server)
        assert "28P01" in problem
        assert PASSWORD not in problem
        path.write_text(f"{NEW_PASSWORD}\n")
        async with asyncio.timeout(ENOUGH):
            await append
            while not server.readiness.is_ready:
                await asyncio.sleep(0.05)


@pytest.mark.case(n=506)
async def test_replaced_client_certificate_is_used_without_a_restart(
    cluster: object, tmp_path: Path
) -> None:
    """The server trusts another authority from some time on."""
    if tls_postgres.find_programs() is None:
        skip_or_fail("Debian's postgresql is not installed")
    old, new = CertificateAuthority("old"), CertificateAuthority("new")
    paths = tmp_path / "tls.crt", tmp_path / "tls.key"

    def write(pair: CertificatePair) -> None:
        for path, content in zip(paths, pair, strict=True):
            path.write_bytes(content)

    write(old.issue(USER))
    with TlsPostgres(old.issue(), client_ca=old.pem, hba=_CERTIFICATE_HBA) as postgres:
        target = configured_target(
            database_url=postgres.url(
                sslmode="require", sslcert=str(paths[0]), sslkey=str(paths[1])
            )
        )
        await migrations.upgrade(target)
        async with serving(target) as server, connected(server.address) as stub:
            chat = await Chat.of_new_user(stub)
            session_id = await chat.start()
            postgres.trust(new.pem)
            await query(postgres, "SELECT pg_reload_conf()")
            await query(postgres, TERMINATE)
            append = asyncio.ensure_future(chat.append(session_id, "waits"))
            await wait_until_unready(server)
            write(new.issue(USER))
            async with asyncio.timeout(ENOUGH):
                await append
