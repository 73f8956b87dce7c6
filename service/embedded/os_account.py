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

    Raises:
        EmbeddedError: The system user cannot be created.
    """
    if pgdata.exists() and (info := pgdata.stat()).st_uid != 0:
        return Account(info.st_uid, info.st_gid)
    with suppress(KeyError):
        return _system_account()
    _create_system_user()
    try:
        return _system_account()
    except KeyError:
        raise EmbeddedError(
            f"PostgreSQL refuses to run as root, and the system user {SYSTEM_USER} cannot be "
            "created: run as an ordinary user, or set DATABASE_URL"
        ) from None


def _system_account() -> Account:
    """Return the account of the system user; raise KeyError if it does not exist."""
    import pwd  # noqa: PLC0415 - only needed as root

    entry = pwd.getpwnam(SYSTEM_USER)
    return Account(entry.pw_uid, entry.pw_gid)


def _create_system_user() -> None:
    options = ["--system", "--no-create-home", "--shell", "/usr/sbin/nologin"]
    with suppress(OSError):
        subprocess.run(  # noqa: S603
            ["useradd", *options, SYSTEM_USER],  # noqa: S607 - root's own PATH
            check=False,
            capture_output=True,
        )


def closed_folders(path: Path, account: Account) -> Iterator[Path]:
    """Yield the parents of `path`, outermost first, that the account cannot enter."""
    for folder in reversed(path.parents):
        info = folder.stat()
        if info.st_uid == account.uid:
            permission_bit = stat.S_IXUSR
        elif info.st_gid == account.gid:
            permission_bit = stat.S_IXGRP
        else:
            permission_bit = stat.S_IXOTH
        if not info.st_mode & permission_bit:
            yield folder


def make_readable(tree: Path) -> None:
    """Grant the owner's read and execute permissions to all users."""
    for path in (tree, *tree.rglob("*")):
        mode = path.lstat().st_mode
        if not stat.S_ISLNK(mode):
            path.chmod(stat.S_IMODE(mode) | ((mode & 0o500) >> 6))
