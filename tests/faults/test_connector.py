"""Connections: TLS as libpq chooses it, and no file of the home folder."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from service import doctor
from service.store.db.db_errors import DATABASE_ERRORS, sqlstate
from service.store.db.dsn import parse
from tests.support import tls_postgres
from tests.support.certificates import CertificateAuthority
from tests.support.chat import Chat
from tests.support.cluster import fetch
from tests.support.proxy import postgres_proxy
from tests.support.servers import ServerProcess, connected
from tests.support.tls_postgres import TlsPostgres
from tests.support.tools import skip_or_fail


@pytest.fixture(scope="module")
def postgres(cluster: object) -> Generator[TlsPostgres]:
    """Provide a PostgreSQL that requires TLS."""
    if tls_postgres.find_programs() is None:
        skip_or_fail("Debian's postgresql is not installed")
    with TlsPostgres(CertificateAuthority().issue()) as postgres:
        yield postgres


async def tls_version(url: str) -> str | None:
    """Connect as the service does, and return the TLS version of the connection."""
    return (await doctor.describe(parse(url), 10.0)).tls


@pytest.mark.parametrize("mode", ["prefer", "allow", "require"])
async def test_server_that_requires_tls_is_reached_with_tls(
    postgres: TlsPostgres, mode: str
) -> None:
    assert await tls_version(postgres.url(sslmode=mode)) == "TLSv1.3"


@pytest.mark.parametrize("mode", ["prefer", "allow"])
async def test_server_without_tls_is_reached_in_plaintext(database_url: str, mode: str) -> None:
    async with postgres_proxy(database_url) as (_, url):
        assert await tls_version(url.replace("sslmode=disable", f"sslmode={mode}")) is None


@pytest.mark.parametrize("mode", ["prefer", "allow"])
async def test_rejection_of_the_role_is_reported_and_not_the_other_transport(
    postgres: TlsPostgres, mode: str
) -> None:
    """The password is wrong, which the server finds out over TLS only."""
    url = postgres.url(sslmode=mode).replace(tls_postgres.PASSWORD, "npg_wrong")
    with pytest.raises(DATABASE_ERRORS) as caught:
        await tls_version(url)
    assert sqlstate(caught.value) == "28P01"


async def test_rejection_is_reported_when_the_server_has_no_other_transport(
    database_url: str,
) -> None:
    """`allow` tries TLS after a rejection in plaintext, and this server has none."""
    await fetch(database_url, "CREATE ROLE locked_out NOLOGIN")
    try:
        async with postgres_proxy(database_url) as (_, url):
            of_role = url.replace("postgres@", "locked_out@", 1)
            with pytest.raises(DATABASE_ERRORS) as caught:
                await tls_version(of_role.replace("=disable", "=allow"))
            assert sqlstate(caught.value) == "28000"
    finally:
        await fetch(database_url, "DROP ROLE locked_out")


@pytest.mark.case(n=511)
@pytest.mark.parametrize("option", ["", "&sslmode=prefer", "&sslmode=allow"])
async def test_service_reads_no_certificate_in_the_home_folder(
    database_url: str, tmp_path: Path, option: str
) -> None:
    """HOME may belong to another user. These files are malformed, since root can read them all."""
    home = tmp_path / "home"
    (home / ".postgresql").mkdir(parents=True)
    for name in ("postgresql.key", "postgresql.crt", "root.crt"):
        (home / ".postgresql" / name).write_text("malformed")
    async with postgres_proxy(database_url) as (_, url):
        with_option = url.replace("sslmode=disable", f"application_name=chat-history{option}")
        async with (
            ServerProcess(with_option, tmp_path / "server", HOME=str(home)) as process,
            connected(process.address) as stub,
        ):
            await (await Chat.of_new_user(stub)).start()
