"""The account of programs that refuse to run as root: those of PostgreSQL, and PgBouncer."""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from service.embedded.os_account import SYSTEM_USER


def unprivileged_user() -> dict[str, Any]:
    """Return the options with which `subprocess` starts a program as an unprivileged user.

    Under root that is the user that the embedded PostgreSQL has created. Otherwise there are no
    options: the program runs as the current user.
    """
    if os.geteuid() != 0:
        return {}
    entry = pwd.getpwnam(SYSTEM_USER)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def give_ownership(path: Path) -> None:
    """Make the unprivileged user the owner of a file or folder."""
    if options := unprivileged_user():
        os.chown(path, options["user"], options["group"])


@contextmanager
def unprivileged_folder(program: str) -> Iterator[Path]:
    """Provide a folder that the unprivileged user owns; it has no access to folders of pytest."""
    folder = Path(tempfile.mkdtemp(prefix=f"chat-history-{program}-"))
    try:
        give_ownership(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
