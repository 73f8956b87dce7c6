"""The operating system account of the embedded PostgreSQL when this process runs as root."""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from service.embedded.data_dir import EmbeddedError

SYSTEM_USER = "pgserver"


class Account(NamedTuple):
    """The account that PostgreSQL runs as when this process is root."""

    uid: int
    gid: int


def choose_account(pgdata: Path) -> Account:
    """Return the account for PostgreSQL under root: the owner of the data, or the system user.

    The system user is created when it does not exist.
    """
    import pwd  # noqa: PLC0415 - only needed as root

    if pgdata.exists() and (owned := pgdata.stat()).st_uid != 0:
        return Account(owned.st_uid, owned.st_gid)
    for attempt in (1, 2):
        with suppress(KeyError):
            entry = pwd.getpwnam(SYSTEM_USER)
            return Account(entry.pw_uid, entry.pw_gid)
        if attempt == 1:
            useradd = [
                "useradd",
                "--system",
                "--no-create-home",
                "--shell",
                "/usr/sbin/nologin",
                SYSTEM_USER,
            ]
            with suppress(OSError):
                subprocess.run(useradd, check=False, capture_output=True)  # noqa: S603
    raise EmbeddedError(
        f"PostgreSQL refuses to run as root, and the system user {SYSTEM_USER} cannot be created: "
        "run as an ordinary user, or set DATABASE_URL"
    )


def closed_folders(path: Path, account: Account) -> Iterator[Path]:
    """Yield the parents of `path`, outermost first, that the account cannot enter."""
    for folder in reversed(path.parents):
        info = folder.stat()
        permission_bits = {
            info.st_gid == account.gid: stat.S_IXGRP,
            info.st_uid == account.uid: stat.S_IXUSR,
        }
        if not info.st_mode & permission_bits.get(True, stat.S_IXOTH):
            yield folder


def make_readable(tree: Path) -> None:
    """Grant the owner's read and execute permissions to all users."""
    for path in (tree, *tree.rglob("*")):
        mode = path.lstat().st_mode
        if not stat.S_ISLNK(mode):
            path.chmod(stat.S_IMODE(mode) | ((mode & 0o500) >> 6))
