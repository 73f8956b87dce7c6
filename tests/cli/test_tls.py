"""TLS between the service and PostgreSQL, and the advice of `check` on it.

The PostgreSQL of the tests listens on a Unix socket only, so a proxy in this process accepts TCP
connections and terminates TLS.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import re
import ssl
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from service.doctor import (
    Description,
    Finding,
    Pool,
    SchemaState,
    Verdict,
    describe,
    diagnose,
    explain,
)
from service.store.db.dsn import parse
from service.store.schema.version import SchemaVersion
from service.store.tables import BUILD
from tests.cli.conftest import Start
from tests.support.cluster import Cluster

_SSL_REQUEST = b"\x00\x00\x00\x08\x04\xd2\x16\x2f"


class Server(NamedTuple):
    """A PostgreSQL server on TCP, with or without TLS."""

    port: int
    certificate: Path
    database: str

    def url(self, query: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{self.database}?{query}"


def make_certificate(folder: Path) -> Path:
    """Write a self-signed certificate for 127.0.0.1 and its key into one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    file = folder / "server.pem"
    private_key = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private_key + certificate.public_bytes(serialization.Encoding.PEM))
    return file


@pytest.fixture(params=[True, False], ids=["tls", "plain"])
async def server(
    request: pytest.FixtureRequest, cluster: Cluster, database_url: str, tmp_path: Path
) -> AsyncGenerator[Server]:
    """Provide PostgreSQL on TCP: a proxy that forwards to the Unix socket of the cluster."""
    certificate = make_certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    tasks: set[asyncio.Task[None]] = set()

    async def forward(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            sink.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        first_bytes = await reader.read(8)
        if first_bytes == _SSL_REQUEST:
            writer.write(b"S" if request.param else b"N")
            await writer.drain()
            try:
                if request.param:
                    await writer.start_tls(context)
                first_bytes = await reader.read(8)
            except OSError:
                first_bytes = b""  # The client rejected the certificate.
        if first_bytes:
            postgres_reader, postgres_writer = await asyncio.open_unix_connection(
                str(cluster.postgres.pgdata / ".s.PGSQL.5432")
            )
            postgres_writer.write(first_bytes)
            await asyncio.gather(forward(reader, postgres_writer), forward(postgres_reader, writer))
        writer.close()

    proxy = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = proxy.sockets[0].getsockname()[1]
    name = database_url.split("/")[3].split("?", maxsplit=1)[0]
    yield Server(port, certificate, name)
    proxy.close()
    await asyncio.gather(*tasks, return_exceptions=True)


only_tls = pytest.mark.parametrize("server", [True], indirect=True, ids=["tls"])
only_plain = pytest.mark.parametrize("server", [False], indirect=True, ids=["plain"])


@only_tls
@pytest.mark.parametrize("mode", ["prefer", "require", "verify-ca", "verify-full"])
async def test_ssl_mode_connects_with_tls_when_the_server_offers_it(
    server: Server, mode: str
) -> None:
    root = f"&sslrootcert={server.certificate}" if "verify" in mode else ""
    target = parse(server.url(f"sslmode={mode}{root}"))
    assert (await describe(target, 5.0)).tls == "TLSv1.3"


@only_plain
@pytest.mark.parametrize("mode", ["prefer", "disable", "allow"])
async def test_optional_ssl_modes_connect_without_tls_when_the_server_has_none(
    server: Server, mode: str
) -> None:
    assert (await describe(parse(server.url(f"sslmode={mode}")), 5.0)).tls is None


@only_tls
@pytest.mark.usefixtures("durable_server")
async def test_check_reports_a_verified_certificate(server: Server, start: Start) -> None:
    command = start(
        "check", DATABASE_URL=server.url(f"sslmode=verify-full&sslrootcert={server.certificate}")
    )
    assert await asyncio.to_thread(command.wait) == 0
    assert re.search(r"ok +TLS +TLSv1.3, sslmode=verify-full, certificate verified", command.stdout)


@only_tls
async def test_check_explains_an_untrusted_certificate(server: Server, start: Start) -> None:
    command = start("check", DATABASE_URL=server.url("sslmode=verify-full"))
    assert await asyncio.to_thread(command.wait) == 1
    assert "the certificate of 127.0.0.1 is not trusted (self-signed certificate)" in command.stdout


@only_plain
async def test_required_tls_on_a_server_without_it_is_explained(server: Server) -> None:
    target = parse(server.url("sslmode=require"))
    with pytest.raises(OSError, match="rejected SSL") as info:
        await describe(target, 5.0)
    explanation = explain(info.value, target)
    assert f"127.0.0.1:{server.port}/{server.database} offers no TLS" in explanation


POOL = Pool(8, 4, 240, 12)
SCHEMA = SchemaState(SchemaVersion(BUILD, 1))


def findings_by_subject(
    description: Description, url: str, pool: Pool = POOL
) -> dict[str, Finding]:
    return {finding.subject: finding for finding in diagnose(description, parse(url), pool)}


@pytest.mark.parametrize(
    ("query", "tls", "verdict", "advice"),
    [
        ("sslmode=require", "TLSv1.3", Verdict.NOTE, "the certificate is not verified"),
        ("sslmode=verify-full", "TLSv1.3", Verdict.OK, "certificate verified"),
        ("sslmode=disable", None, Verdict.NOTE, "traffic can be read in transit"),
    ],
)
def test_finding_on_remote_tls_depends_on_certificate_verification(
    query: str, tls: str | None, verdict: Verdict, advice: str
) -> None:
    description = Description("18.1", 18, "u", 100, False, "UTF8", tls, 0.001, SCHEMA)
    url = f"postgresql://u@db.example.com/d?{query}"
    finding = findings_by_subject(description, url)["TLS"]
    assert finding.verdict is verdict
    assert advice in finding.message


def test_diagnosis_of_an_unsuitable_database_advises_what_to_do() -> None:
    description = Description(
        "14.9",
        14,
        "u",
        100,
        True,
        "SQL_ASCII",
        None,
        0.1,
        SchemaState(SchemaVersion(BUILD, BUILD + 1)),
    )
    url = "postgresql://u@ep-a-pooler.eu.aws.neon.tech/d"
    findings = findings_by_subject(description, url)
    todo = {subject for subject, finding in findings.items() if finding.verdict is Verdict.TODO}
    assert todo == {"PostgreSQL", "connection", "schema", "encoding"}
    assert "upgrade to 15 to 18" in findings["PostgreSQL"].message
    assert "deploy a newer one" in findings["schema"].message
    assert "in the database's region" in findings["round trip"].message
    newer = Description(
        "19.0",
        19,
        "u",
        100,
        False,
        "UTF8",
        None,
        0.001,
        SchemaState(SchemaVersion(BUILD + 1, 1)),
    )
    findings = findings_by_subject(newer, url)
    assert {finding.verdict for finding in findings.values()} <= {Verdict.OK, Verdict.NOTE}
    assert "migrations connect to ep-a.eu.aws.neon.tech/d" in findings["connection"].message


@pytest.mark.parametrize("host", ["ep-a.eu.aws.neon.tech", "ep-a-pooler.eu.aws.neon.tech"])
@pytest.mark.parametrize(
    ("query", "pool", "verdict", "advice"),
    [
        ("", POOL, Verdict.OK, "connect timeout 12 s: suitable for Neon's suspend and wake times"),
        (
            "",
            POOL._replace(recycle_s=300),
            Verdict.NOTE,
            "set CHAT_HISTORY_DB_POOL_RECYCLE below that",
        ),
        ("", POOL._replace(connect_timeout_s=3), Verdict.NOTE, "may take longer to wake"),
        ("?connect_timeout=3", POOL, Verdict.NOTE, "connect timeout 3 s: a suspended"),
        (
            "?connect_timeout=15",
            POOL._replace(connect_timeout_s=3),
            Verdict.OK,
            "connect timeout 15 s: suitable",
        ),
    ],
)
def test_finding_on_neon_connections_depends_on_recycle_age_and_connect_timeout(
    host: str, query: str, pool: Pool, verdict: Verdict, advice: str
) -> None:
    description = Description("18.1", 18, "u", 100, False, "UTF8", "TLSv1.3", 0.001, SCHEMA)
    url = f"postgresql://u@{host}/d{query}"
    finding = findings_by_subject(description, url, pool)["connections"]
    assert finding.verdict is verdict
    assert advice in finding.message
    other_url = "postgresql://u@db.example.com/d"
    other_finding = findings_by_subject(description, other_url, pool)["connections"]
    assert other_finding.verdict is Verdict.OK
