"""Replaces the folder of a database by an upgraded copy, in steps that may be interrupted.

The folders in the data folder, by name:

- `postgres`: the database that is served.
- `postgres.upgrading-*`: a copy that is not complete. The next start deletes it.
- `postgres.upgraded`: a complete copy. It becomes `postgres` once that name is free.
- `postgres.before-upgrade-16`: the database before the upgrade, kept for the operator.

Each step renames one folder, so that after a crash at least one complete database is left, and the
names show which one to use.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from service.embedded.data_dir import EmbeddedError
from service.embedded.database_folder import stop_orphaned_server


def unfinished_prefix(pgdata: Path) -> str:
    """Return the prefix of the names of copies that are not complete."""
    return f"{pgdata.name}.upgrading-"


def kept_folder(pgdata: Path, version: int) -> Path:
    """Return the path under which the database of this major version is kept."""
    return pgdata.with_name(f"{pgdata.name}.before-upgrade-{version}")


def mark_complete(copy: Path, pgdata: Path) -> None:
    """Declare a copy complete. From now on it may replace the database."""
    _rename(copy, _upgraded(pgdata))


def keep_previous(pgdata: Path, version: int) -> None:
    """Rename the database to the name under which it is kept."""
    _rename(pgdata, kept_folder(pgdata, version))


def put_in_place(pgdata: Path) -> None:
    """Rename the complete copy to the name of the database."""
    _rename(_upgraded(pgdata), pgdata)


def recover(pgdata: Path) -> None:
    """Finish or undo an upgrade that was interrupted. The caller owns the data folder.

    Raises:
        EmbeddedError: There is no database, but one from before an upgrade.
    """
    upgraded = _upgraded(pgdata)
    if pgdata.exists():
        if upgraded.exists():
            # The database may have changed since it was copied. The copy is renamed before it is
            # deleted, so that an incomplete folder never has the name of a complete one.
            unfinished = tempfile.mkdtemp(prefix=unfinished_prefix(pgdata), dir=pgdata.parent)
            _rename(upgraded, Path(unfinished))
    elif upgraded.exists():
        put_in_place(pgdata)
    elif kept := sorted(pgdata.parent.glob(f"{pgdata.name}.before-upgrade-*")):
        raise EmbeddedError(
            f"{pgdata} is missing, but there is a database from before an upgrade: rename "
            f"{kept[-1]} to {pgdata} to use it, or move it to another folder to start with an "
            "empty database"
        )
    for copy in pgdata.parent.glob(f"{unfinished_prefix(pgdata)}*"):
        stop_orphaned_server(copy)
        shutil.rmtree(copy, ignore_errors=True)


def _upgraded(pgdata: Path) -> Path:
    return pgdata.with_name(f"{pgdata.name}.upgraded")


def _rename(source: Path, target: Path) -> None:
    """Rename a folder so that the new name survives a crash of the machine."""
    source.rename(target)
    parent = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
