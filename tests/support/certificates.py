"""Certificate authorities and certificates, generated during a test run."""

from __future__ import annotations

import datetime as dt
import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

_LOOPBACK = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]


class CertificatePair(NamedTuple):
    """A certificate and its key, in PEM form."""

    cert: bytes
    key: bytes


class CertificateAuthority:
    """Signs certificates for 127.0.0.1 and localhost, or for the hosts that are named."""

    def __init__(self, name: str = "tests") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._cert = self._sign(self._name, self._key.public_key(), _LOOPBACK, authority=True)
        self.pem = self._cert.public_bytes(Encoding.PEM)

    def issue(self, name: str = "localhost", hosts: Sequence[str] = ()) -> CertificatePair:
        """Issue a certificate, for `hosts` only if there are any."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names = [x509.DNSName(host) for host in hosts] or _LOOPBACK
        cert = self._sign(subject, key.public_key(), names, authority=False)
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return CertificatePair(cert.public_bytes(Encoding.PEM), private)

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        names: Sequence[x509.GeneralName],
        *,
        authority: bool,
    ) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, hashes.SHA256())
        )


def write_tls_files(
    folder: Path, pair: CertificatePair, ca: bytes | None = None
) -> dict[str, Path]:
    """Write the TLS files of a server into a folder and return the settings that name them."""
    files = {"tls_cert": (folder / "tls.crt", pair.cert), "tls_key": (folder / "tls.key", pair.key)}
    if ca is not None:
        files["tls_client_ca"] = (folder / "ca.crt", ca)
    for path, content in files.values():
        path.write_bytes(content)
    return {name: path for name, (path, _) in files.items()}
