"""The operating system account of the embedded PostgreSQL when this process runs as root."""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from service.embedded.data_dir import EmbeddedError
from service.embedded.programs import PACKAGE

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


def identity(account: Account | None) -> dict[str, Any]:
    """Return the arguments of `subprocess` that start a program as the account, if there is one."""
    if account is None:
        return {}
    return {"user": account.uid, "group": account.gid, "extra_groups": []}


def grant_access(account: Account, pgdata: Path, programs: Path) -> list[str]:
    """Let the account reach its data and programs: search permission, not read, on parents.

    Returns:
        What was changed outside of the data folder, to be shown to the operator.
    """
    opened_folders: list[Path] = []
    for target in (pgdata, programs):
        for folder in closed_folders(target, account):
            folder.chmod(stat.S_IMODE(folder.stat().st_mode) | stat.S_IXOTH)
            opened_folders.append(folder)
    # The package may have been installed under a strict umask. Its libraries are in a folder next
    # to the package's.
    for tree in (programs, *programs.parent.parent.glob(f"{PACKAGE}.libs")):
        sample = next((path for path in tree.rglob("*") if path.is_file()), tree)
        if not all(path.stat().st_mode & stat.S_IROTH for path in (tree, sample)):
            make_readable(tree)
    if all(folder == pgdata.parent for folder in opened_folders):
        return []
    note = (
        "PostgreSQL refuses to run as root and runs as another user; that user was granted "
        f"search permission (chmod o+x) on: {', '.join(map(str, opened_folders))}"
    )
    return [note]


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
