"""`Certificates`: the server's TLS certificates, which are replaced without a restart."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple, NoReturn

import grpc
import structlog

_log = structlog.get_logger(__name__)


class CertificateFiles(NamedTuple):
    """The TLS files, in PEM form."""

    cert: Path
    """The server's certificate, followed by the intermediate ones."""
    key: Path
    client_ca: Path | None = None
    """The authorities that sign the clients' certificates; None if clients present none."""


class Certificates:
    """The certificates in the files, loaded again when the files change.

    If new files do not fit together, the last good certificates stay in use.
    """

    def __init__(self, files: CertificateFiles) -> None:
        """Load the files.

        Raises:
            ValueError: they cannot be used; the text names the file.
        """
        self._files = files
        self._loaded_state = self._file_state()
        self._configuration = self._load()

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials that look for changed files at every new connection."""
        # gRPC documents None as "unchanged"; its types lack it.
        return grpc.dynamic_ssl_server_credentials(
            self._configuration,
            self._changed_configuration,  # type: ignore[arg-type]
            require_client_authentication=self._files.client_ca is not None,
        )

    def _changed_configuration(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the files' new content, None if unchanged; called in a thread of gRPC."""
        state = self._file_state()
        if state == self._loaded_state:
            return None
        try:
            configuration = self._load()
        except ValueError as error:
            if state is not None:
                _log.warning(
                    "new certificates cannot be used; the last good ones stay", problem=str(error)
                )
            self._loaded_state = state
            return None
        if self._file_state() != state:
            return None  # The files are being written; the next connection loads them.
        self._loaded_state, self._configuration = state, configuration
        _log.info("certificates reloaded")
        return configuration

    def _file_state(self) -> tuple[tuple[int, int, int], ...] | None:
        """Return a value that changes when a file changes, without reading the files."""
        try:
            states = [path.stat() for path in self._files if path is not None]
        except OSError:
            return None
        return tuple((state.st_mtime_ns, state.st_size, state.st_ino) for state in states)

    def _load(self) -> grpc.ServerCertificateConfiguration:
        cert, key, client_ca = self._files
        authorities = None if client_ca is None else _read("CLIENT_CA", client_ca)
        pair = _read("KEY", key), _read("CERT", cert)
        _check(self._files)
        return grpc.ssl_server_certificate_configuration([pair], authorities)


def _read(setting: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"CHAT_HISTORY_TLS_{setting}={path} cannot be read: {error.strerror}"
        ) from None


def _check(files: CertificateFiles) -> None:
    """Load the files as Python's TLS server would, since gRPC does not report what is wrong.

    Raises:
        ValueError: they are not certificates, or do not fit together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files.cert, files.key, password=_reject_passphrase)
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, ssl.SSLError) else str(error)
        raise ValueError(
            f"CHAT_HISTORY_TLS_CERT={files.cert} and CHAT_HISTORY_TLS_KEY={files.key} are not a "
            f"pair of PEM files: {reason}"
        ) from None
    if files.client_ca is None:
        return
    try:
        context.load_verify_locations(files.client_ca)
    except (OSError, ValueError):
        raise ValueError(
            f"CHAT_HISTORY_TLS_CLIENT_CA={files.client_ca} has no certificate in PEM form"
        ) from None


def _reject_passphrase() -> NoReturn:
    raise ValueError("the key has a passphrase; store it without one")
