"""Certificates of the server: read from files, checked, and read again when the files change, without a restart."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple, NoReturn

import grpc
import structlog

_log = structlog.get_logger(__name__)


class Files(NamedTuple):
    """Where the certificates are, in PEM form."""

    cert: Path
    """The server's certificate, with those between it and its authority."""
    key: Path
    client_ca: Path | None = None
    """The authorities that every client's certificate must come from; None asks clients for none."""


class Certificates:
    """What the server shows and whom it trusts, as the files have it now; a pair that does not fit keeps the last good one."""

    def __init__(self, files: Files) -> None:
        """Read the files.

        Raises:
            ValueError: they cannot be used; the text names the file.
        """
        self._files = files
        self._seen = self._look()
        self._configuration = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials that ask for the files' state at every new connection."""
        # None, which gRPC documents for "as before", is missing in its types.
        return grpc.dynamic_ssl_server_credentials(
            self._configuration,
            self._latest,  # type: ignore[arg-type]
            require_client_authentication=self._files.client_ca is not None,
        )

    def _latest(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what has changed since the last connection, None when nothing has; called by a thread of gRPC."""
        seen = self._look()
        if seen == self._seen:
            return None
        try:
            configuration = self._read()
        except ValueError as error:
            if seen is not None:
                _log.warning(
                    "new certificates cannot be used; the last good ones stay", problem=str(error)
                )
            self._seen = seen
            return None
        if self._look() != seen:
            return None  # Being written just now: the next connection reads them whole.
        self._seen, self._configuration = seen, configuration
        _log.info("certificates read anew")
        return configuration

    def _look(self) -> tuple[tuple[int, int, int], ...] | None:
        """Return what tells the files' states apart, without reading them."""
        try:
            states = [path.stat() for path in self._files if path is not None]
        except OSError:
            return None
        return tuple((state.st_mtime_ns, state.st_size, state.st_ino) for state in states)

    def _read(self) -> grpc.ServerCertificateConfiguration:
        cert, key, client_ca = self._files
        authorities = None if client_ca is None else _bytes("CLIENT_CA", client_ca)
        pair = _bytes("KEY", key), _bytes("CERT", cert)
        _check(self._files)
        return grpc.ssl_server_certificate_configuration([pair], authorities)


def _bytes(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"CHAT_HISTORY_TLS_{name}={path} cannot be read: {error.strerror}"
        ) from None


def _check(files: Files) -> None:
    """Load the files as any TLS server would: gRPC itself says nothing of what is wrong with them.

    Raises:
        ValueError: they do not fit together, or are none.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files.cert, files.key, password=_no_passphrase)
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, ssl.SSLError) else str(error)
        raise ValueError(
            f"CHAT_HISTORY_TLS_CERT={files.cert} and CHAT_HISTORY_TLS_KEY={files.key} are no pair of PEM files: {reason}"
        ) from None
    if files.client_ca is None:
        return
    try:
        context.load_verify_locations(files.client_ca)
    except (OSError, ValueError):
        raise ValueError(
            f"CHAT_HISTORY_TLS_CLIENT_CA={files.client_ca} holds no certificate in PEM form"
        ) from None


def _no_passphrase() -> NoReturn:
    raise ValueError("the key has a passphrase")
