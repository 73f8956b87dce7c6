"""Whom programs run as that refuse to run as root: PostgreSQL's, and PgBouncer."""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from service.embedded.account import SYSTEM_USER


def unprivileged_user() -> dict[str, Any]:
    """Return what `subprocess` needs to start such a program: as root, the user that the embedded PostgreSQL has made for itself."""
    if os.geteuid() != 0:
        return {}
    entry = pwd.getpwnam(SYSTEM_USER)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def give_ownership(path: Path) -> None:
    """Let such a program have a file or folder."""
    if who := unprivileged_user():
        os.chown(path, who["user"], who["group"])


@contextmanager
def unprivileged_folder(what: str) -> Iterator[Path]:
    """Give a folder to such a program alone; pytest's own let nobody else pass."""
    folder = Path(tempfile.mkdtemp(prefix=f"chat-history-{what}-"))
    try:
        give_ownership(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
