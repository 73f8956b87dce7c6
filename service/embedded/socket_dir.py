"""The folder of PostgreSQL's socket, whose path must be short and plain."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from service.embedded.data_dir import EmbeddedError
from service.embedded.database_folder import SOCKET, TEMPORARY_FOLDER, new_folder
from service.embedded.os_account import Account, closed_folders

_MAX_SOCKET_PATH_BYTES = 103  # The limit of macOS; that of Linux is 107.
# Characters that need no quoting in connection strings and in PostgreSQL's lists of paths.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._-]+")


def choose_socket_dir(pgdata: Path, account: Account | None) -> Path:
    """Return `pgdata` if its path can be that of a socket, or else a new private folder.

    Raises:
        EmbeddedError: No folder for temporary files can hold the socket.
    """
    if _PLAIN_PATH.fullmatch(str(pgdata)) and _fits_socket(pgdata):
        return pgdata
    for parent in (Path(tempfile.gettempdir()), Path("/tmp")):  # noqa: S108 - mkdtemp makes a private folder there
        if not _PLAIN_PATH.fullmatch(str(parent)) or not _fits_socket(
            parent / f"{TEMPORARY_FOLDER}12345678"
        ):
            continue
        if account is not None and any(closed_folders(parent / "x", account)):
            continue
        return new_folder(TEMPORARY_FOLDER, parent, account)
    raise EmbeddedError(
        f"no folder for the socket: the path {pgdata} is too long, and /tmp cannot be used"
    )


def _fits_socket(folder: Path) -> bool:
    return len(os.fsencode(folder / SOCKET)) <= _MAX_SOCKET_PATH_BYTES
