"""TLS, mutual TLS, and certificates that change under a running server."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from chathistory.v1 import user_pb2
from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceStub as Stub
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.auth import credentials
from service.config import BadConfiguration
from tests.support import issuer
from tests.support.certificates import CertificateAuthority, CertificatePair, write_tls_files
from tests.support.failures import assert_fails
from tests.support.ports import free_port
from tests.support.servers import _CHANNEL_OPTIONS, AsyncStub, channel, connected, serving, settings


@asynccontextmanager
async def secured(
    address: str, ca: bytes, client: CertificatePair | None = None
) -> AsyncGenerator[AsyncStub]:
    own = {} if client is None else {"private_key": client.key, "certificate_chain": client.cert}
    credentials = grpc.ssl_channel_credentials(ca, **own)
    async with aio.secure_channel(address, credentials, options=_CHANNEL_OPTIONS) as opened:
        yield Stub(opened)


def ask(stub: Any, **more: Any) -> Any:
    return stub.ListUsers(user_pb2.ListUsersRequest(), timeout=5, **more)


async def refused(stub: Any) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await ask(stub)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def port_of(address: str) -> str:
    return address.rpartition(":")[2]


async def test_tls_server_is_verified_by_its_certificate(database_url: str, tmp_path: Path) -> None:
    authority = CertificateAuthority()
    async with serving(database_url, **write_tls_files(tmp_path, authority.issue())) as server:
        async with secured(server.address, authority.pem) as stub:
            await ask(stub)
        async with secured(server.address, CertificateAuthority("other").pem) as stub:
            await refused(stub)
        async with connected(server.address) as stub:
            await refused(stub)


async def test_mutual_tls_without_tokens_is_allowed_on_any_address(
    database_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    authority, clients = CertificateAuthority(), CertificateAuthority("clients")
    files = write_tls_files(tmp_path, authority.issue(), clients.pem)
    async with serving(
        database_url, listen="0.0.0.0:0", health_listen="127.0.0.1:0", **files
    ) as server:
        address = f"127.0.0.1:{port_of(server.address)}"
        async with secured(address, authority.pem, clients.issue("backend")) as stub:
            await ask(stub)
        lines = [line for line in capsys.readouterr().out.splitlines() if " audit " in line]
        assert len(lines) == 1
        assert "method=ListUsers" in lines[0]
        assert "subject=backend" in lines[0]
        async with secured(address, authority.pem) as stub:
            await refused(stub)
        async with secured(address, authority.pem, authority.issue("of another authority")) as stub:
            await refused(stub)


async def test_health_is_served_in_plaintext_on_its_own_port_with_tls(
    database_url: str, tmp_path: Path
) -> None:
    health = f"127.0.0.1:{free_port()}"
    authority = CertificateAuthority()
    files = write_tls_files(tmp_path, authority.issue(), authority.pem)
    async with serving(database_url, health_listen=health, **files), channel(health) as opened:
        probe: Any = health_pb2_grpc.HealthStub(opened)
        reply = await probe.Check(health_pb2.HealthCheckRequest())
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(aio.AioRpcError) as caught:
            await ask(Stub(opened))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_changed_certificates_are_reloaded(database_url: str, tmp_path: Path) -> None:
    old, new = CertificateAuthority("old"), CertificateAuthority("new")
    async with (
        serving(database_url, **write_tls_files(tmp_path, old.issue(), old.pem)) as server,
        secured(server.address, old.pem, old.issue("client")) as before,
    ):
        await ask(before)
        write_tls_files(tmp_path, new.issue(), new.pem)
        async with secured(server.address, new.pem, new.issue("client")) as stub:
            await ask(stub)
        async with secured(server.address, new.pem, old.issue("client")) as stub:
            await refused(stub)
        await ask(before)  # An open connection is kept.


async def test_mismatched_pair_keeps_the_last_good_certificates(
    database_url: str, tmp_path: Path
) -> None:
    authority = CertificateAuthority()
    files = write_tls_files(tmp_path, authority.issue())
    async with serving(database_url, **files) as server:
        other = CertificateAuthority("other")
        for break_ in (
            lambda: files["tls_key"].write_bytes(other.issue().key),
            lambda: files["tls_cert"].write_bytes(b"no certificate"),
            files["tls_cert"].unlink,
        ):
            break_()
            async with secured(server.address, authority.pem) as stub:
                await ask(stub)
        write_tls_files(tmp_path, other.issue())
        async with secured(server.address, other.pem) as stub:
            await ask(stub)


async def test_tokens_are_required_in_addition_to_mutual_tls(
    database_url: str, tmp_path: Path
) -> None:
    authority = CertificateAuthority()
    files = write_tls_files(tmp_path, authority.issue(), authority.pem)
    async with (
        serving(
            database_url, auth="jwt", jwt_key=issuer.SECRET, jwt_audience=issuer.AUDIENCE, **files
        ) as server,
        secured(server.address, authority.pem, authority.issue("client")) as stub,
    ):
        await assert_fails(ask(stub), "TOKEN_INVALID")
        await ask(stub, metadata=issuer.bearer_metadata(issuer.service_token()))


async def test_old_tls_versions_are_rejected(database_url: str, tmp_path: Path) -> None:
    authority = CertificateAuthority()
    async with serving(database_url, **write_tls_files(tmp_path, authority.issue())) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        host, _, port = server.address.rpartition(":")
        with socket.create_connection((host, int(port)), 5) as raw:
            raw.settimeout(5)
            with pytest.raises((ssl.SSLError, OSError)):
                await asyncio.to_thread(context.wrap_socket, raw)


def test_unusable_certificate_files_are_reported(tmp_path: Path) -> None:
    authority = CertificateAuthority()
    files = write_tls_files(tmp_path, authority.issue(), authority.pem)

    def complaint(**changes: Path) -> str:
        with pytest.raises(BadConfiguration) as caught:
            credentials.check(settings(**files | changes))
        return str(caught.value)

    missing = tmp_path / "missing"
    assert f"CHAT_HISTORY_TLS_CERT={missing} cannot be read: No such file" in complaint(
        tls_cert=missing
    )
    assert f"CHAT_HISTORY_TLS_CLIENT_CA={missing} cannot be read" in complaint(
        tls_client_ca=missing
    )
    assert "are not a pair" in complaint(tls_key=files["tls_cert"])
    assert "has no certificate" in complaint(tls_client_ca=files["tls_key"])
    locked = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"hunter2")
    )
    files["tls_key"].write_bytes(locked)
    assert "passphrase" in complaint()
