"""The folder of a database: its version, its creation, and the remains of killed processes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from service.embedded.data_dir import EmbeddedError, Postmaster, is_postgres, stop_server
from service.embedded.failures import remedy
from service.embedded.os_account import Account, identity
from service.embedded.programs import PACKAGE, environment, format_versions

SOCKET = ".s.PGSQL.5432"
TEMPORARY_FOLDER = "chat-history-"
"""Prefix of temporary folders, which hold the socket if the path of the data is too long."""

_INITDB = (
    "--username=postgres",
    "--auth=trust",
    "--encoding=UTF8",
    "--locale=C",
    "--no-instructions",
)
# Makes comparison and case mapping of text independent of the machine's locale and C library.
_BUILTIN_LOCALE = ("--locale-provider=builtin", "--builtin-locale=C.UTF-8")
_FIRST_WITH_BUILTIN_LOCALE = 17
_VERSION = re.compile(r"(\d{1,3})(?:\.\d+)?")


def major_version(pgdata: Path) -> int | None:
    """Return the major version of PostgreSQL that the data is of, or None if there is no data.

    Raises:
        EmbeddedError: The folder holds files, but no readable version.
    """
    file = pgdata / "PG_VERSION"
    # Every database within the folder has a file with the same content.
    advice = (
        "Restore the data folder from a backup. If nothing else is damaged, run "
        f"`cp -p {pgdata}/base/1/PG_VERSION {file}`"
    )
    try:
        text = file.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        if not pgdata.exists() or not any(pgdata.iterdir()):
            return None
        raise EmbeddedError(
            f"{file} is missing, so {pgdata} is not a complete database. {advice}"
        ) from None
    match = _VERSION.fullmatch(text.strip())
    if match is None:
        raise EmbeddedError(
            f"{file} does not hold a version number, so the database is damaged. {advice}"
        )
    return int(match[1])


def supported_version(pgdata: Path, programs: dict[int, Path]) -> int | None:
    """Return the major version that the data is of, or None if there is no data.

    Raises:
        EmbeddedError: The data is damaged, or the programs of its version are not installed.
    """
    version = major_version(pgdata)
    if version is not None and version not in programs:
        raise unsupported_version(pgdata, version, programs)
    return version


def unsupported_version(pgdata: Path, version: int, programs: dict[int, Path]) -> EmbeddedError:
    """Return the error for data of a version whose programs are not installed."""
    advice = (
        f"install a version of the package that contains {version}"
        if version > max(programs)
        else (
            f"`chat-history embedded upgrade --old-programs FOLDER` upgrades it, with the folder "
            f"of the programs of PostgreSQL {version}"
        )
    )
    return EmbeddedError(
        f"the data in {pgdata} is of PostgreSQL {version}, but the installed {PACKAGE} contains "
        f"{format_versions(programs)}: {advice}; or set CHAT_HISTORY_DATA_DIR to another folder"
    )


def stop_orphaned_server(pgdata: Path, socket_dir: Path | None = None) -> None:
    """Stop a server that outlived its owner, so that the next one is a child with our settings.

    Args:
        pgdata: The folder of the database.
        socket_dir: The temporary folder for the socket that this process uses, to be kept.
    """
    orphan = Postmaster.read(pgdata)
    if orphan is None:
        return
    if orphan.is_alive():
        stop_server(orphan.pid)
    if not is_postgres(orphan.pid):
        # PostgreSQL refuses to start while any process has the process id in these files, such as
        # a zombie, or another program that reused the id in a restarted container. Deleting them is
        # safe: PostgreSQL also recognizes a server on its data by the shared memory.
        for name in ("postmaster.pid", SOCKET, f"{SOCKET}.lock"):
            (pgdata / name).unlink(missing_ok=True)
    if orphan.socket_dir not in (pgdata, socket_dir) and orphan.socket_dir.name.startswith(
        TEMPORARY_FOLDER
    ):
        shutil.rmtree(orphan.socket_dir, ignore_errors=True)


def initialize(pgdata: Path, bin_dir: Path, version: int, account: Account | None) -> None:
    """Create a database in a temporary folder and rename it, so that it is never incomplete."""
    for leftover in pgdata.parent.glob(f"{pgdata.name}.new*"):
        shutil.rmtree(leftover, ignore_errors=True)
    # A unique name: processes of an interrupted initdb may still write to the old folder.
    unfinished = new_folder(f"{pgdata.name}.new-", pgdata.parent, account)
    run_initdb(unfinished, bin_dir, version, account)
    unfinished.rename(pgdata)


def new_folder(prefix: str, parent: Path, account: Account | None) -> Path:
    """Create a folder that only the account can enter, with a unique name."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    if account is not None:
        os.chown(folder, *account)
    return folder


def run_initdb(folder: Path, bin_dir: Path, version: int, account: Account | None) -> None:
    """Create a database in an empty folder.

    Raises:
        EmbeddedError: initdb failed.
    """
    locale = _BUILTIN_LOCALE if version >= _FIRST_WITH_BUILTIN_LOCALE else ()
    result = subprocess.run(  # noqa: S603
        [bin_dir / "initdb", *_INITDB, *locale, "-D", folder],
        check=False,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        cwd="/",
        env=environment(),
        **identity(account),
    )
    if result.returncode != 0:
        output = " ".join((result.stderr.strip() or result.stdout.strip()).splitlines()[-3:])
        advice = remedy(result.stderr, folder, shutil.disk_usage(folder.parent).free)
        raise EmbeddedError(f"initdb failed in {folder}: {output}{f': {advice}' if advice else ''}")
