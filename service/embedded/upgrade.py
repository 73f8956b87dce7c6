"""Upgrades the data of the embedded PostgreSQL to the newest installed major version.

The data is copied by dump and restore to a new database, the copy is compared with the original,
and then the folders are renamed (`upgraded_folder`). Until the last step the original is only read.
It is kept afterwards.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from service.embedded.data_dir import EmbeddedError, Lock, Owner
from service.embedded.database_copy import DatabaseCopy
from service.embedded.database_folder import (
    major_version,
    new_folder,
    run_initdb,
    stop_orphaned_server,
    unsupported_version,
)
from service.embedded.failures import explain_os_error
from service.embedded.os_account import choose_account, grant_access
from service.embedded.programs import find_programs, read_major
from service.embedded.server import Server
from service.embedded.upgraded_folder import (
    keep_previous,
    kept_folder,
    mark_complete,
    put_in_place,
    recover,
    unfinished_prefix,
)

_MIB = 1024 * 1024
_SPACE_FACTOR = 1.5
"""Space that the copy needs, as a multiple of the data: its tables, and files while it sorts."""
_SPACE_RESERVE_BYTES = 512 * _MIB
"""Space for a new database and its write-ahead log."""
_SOURCE_SETTINGS = {"default_transaction_read_only": "on", "autovacuum": "off"}
_TARGET_SETTINGS = {"autovacuum": "off", "max_wal_size": "256MB"}

Report = Callable[[str], None]


class Programs(NamedTuple):
    """The programs of one major version of PostgreSQL."""

    version: int
    bin_dir: Path


def upgrade(data_dir: Path, report: Report, old_programs: Path | None = None) -> str:
    """Upgrade the database in a data folder, unless it is of the newest version.

    Args:
        data_dir: The data folder.
        report: Called with a line about each step, and about what the operator must know.
        old_programs: The folder of the programs of the data's version, if the installed package
            lacks them.

    Returns:
        The result, as a sentence.

    Raises:
        AlreadyRunning: Another process owns the folder.
        EmbeddedError: The upgrade is not possible, and no data was lost.
    """
    programs = find_programs()
    new = Programs(max(programs), programs[max(programs)])
    data_dir = data_dir.expanduser().resolve()
    pgdata = data_dir / "postgres"
    if not data_dir.exists():
        return f"nothing to do: there is no {data_dir}"
    lock = Lock(data_dir / "lock")
    try:
        lock.acquire(Owner(os.getpid(), "nothing, as it upgrades the database"))
        recover(pgdata)
        stop_orphaned_server(pgdata)
        version = major_version(pgdata)
        if version is None:
            return f"nothing to do: there is no database in {pgdata}"
        if version == new.version:
            return f"nothing to do: the data in {pgdata} is of PostgreSQL {version}"
        old = _find_old_programs(pgdata, version, programs, old_programs)
        return _upgrade(pgdata, old, new, report)
    except OSError as error:
        raise EmbeddedError(
            f"the upgrade failed, and no data was lost: {explain_os_error(error, data_dir)}"
        ) from None
    finally:
        lock.release()


def _find_old_programs(
    pgdata: Path, version: int, programs: dict[int, Path], folder: Path | None
) -> Programs:
    """Return the programs of the data's version."""
    if version > max(programs) or (folder is None and version not in programs):
        raise unsupported_version(pgdata, version, programs)
    if folder is None:
        return Programs(version, programs[version])
    server = folder.expanduser().resolve() / "postgres"
    try:
        major = read_major(server)
    except (OSError, subprocess.CalledProcessError) as error:
        raise EmbeddedError(f"{server} cannot be executed: {error}") from None
    if major != version:
        raise EmbeddedError(
            f"{server} is of PostgreSQL {major}, and the data in {pgdata} of {version}"
        )
    return Programs(version, server.parent)


def _upgrade(pgdata: Path, old: Programs, new: Programs, report: Report) -> str:
    """Copy the data, compare the copy, and replace the folder."""
    kept = kept_folder(pgdata, old.version)
    if kept.exists():
        raise EmbeddedError(
            f"{kept} is the place for the current data, and exists: delete or rename it"
        )
    _check_space(pgdata)
    _report_settings(pgdata, report)
    account = choose_account(pgdata) if os.geteuid() == 0 else None
    if account is not None:
        for programs in (old, new):
            for note in grant_access(account, pgdata, programs.bin_dir.parent):
                report(note)
    folder = new_folder(unfinished_prefix(pgdata), pgdata.parent, account)
    try:
        run_initdb(folder, new.bin_dir, new.version, account)
        log = pgdata.with_name("upgrade.log")
        with (
            closing(Server(old.bin_dir, pgdata, log, account, _SOURCE_SETTINGS)) as source,
            closing(Server(new.bin_dir, folder, log, account, _TARGET_SETTINGS)) as target,
        ):
            source.start()
            target.start()
            copy = DatabaseCopy(source, target, account, report)
            copy.run()
            copy.verify()
            copy.analyze()
            version_name = copy.target_version
        mark_complete(folder, pgdata)
    except EmbeddedError as error:
        raise EmbeddedError(f"the data was not upgraded and is unchanged: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    keep_previous(pgdata, old.version)
    put_in_place(pgdata)
    return (
        f"upgraded to PostgreSQL {version_name}: {copy.row_count} rows in {copy.table_count} "
        f"tables. The data of PostgreSQL {old.version} is kept in {kept}: delete it when it is no "
        "longer needed"
    )


def _check_space(pgdata: Path) -> None:
    wal = pgdata / "pg_wal"
    data_bytes = sum(
        path.lstat().st_size
        for path in pgdata.rglob("*")
        if not path.is_relative_to(wal) and path.is_file()
    )
    needed_bytes = round(data_bytes * _SPACE_FACTOR) + _SPACE_RESERVE_BYTES
    if needed_bytes > (free_bytes := _free_bytes(pgdata.parent)):
        raise EmbeddedError(
            f"the upgrade needs about {needed_bytes // _MIB} MiB on the disk of {pgdata.parent}, "
            f"which has {free_bytes // _MIB} MiB: make room there"
        )


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _report_settings(pgdata: Path, report: Report) -> None:
    """Report settings of the server that are not copied, because a new version may reject them."""
    file = pgdata / "postgresql.auto.conf"
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    if names := [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]:
        report(
            f"these settings of ALTER SYSTEM are not copied, so set them again: {', '.join(names)}"
        )
