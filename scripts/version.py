"""Copies the version from service/__init__.py to the client and the stubs.

    python scripts/version.py            write the copies
    python scripts/version.py --check    fail when a copy is stale

Each distribution builds from its own folder alone, so client/ and generated/ hold copies. Nothing
else writes them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "service/__init__.py"
# Pairs of a file and the lines in it that hold a copy, `{}` for the number. The service and the
# client may use every message of their own release, so both require its stubs.
COPIES = (
    ("pyproject.toml", r'"chathistory-stubs>={}"'),
    ("client/pyproject.toml", r'"chathistory-stubs>={}"'),
    ("client/pyproject.toml", r'\nversion = "{}"'),
    ("client/chathistory_client/_version.py", r'__version__ = "{}"'),
    ("generated/pyproject.toml", r'\nversion = "{}"'),
)


def read() -> str:
    """Return the version of all three distributions."""
    match = re.search(r'^__version__ = "(.+)"$', SOURCE.read_text(), re.MULTILINE)
    if match is None:
        sys.exit(f"{SOURCE} does not set __version__")
    return match[1]


def main(arguments: list[str]) -> int:
    """Write the copies, or compare them with --check; return the exit status."""
    version = read()
    status = 0
    for name, line in COPIES:
        path = ROOT / name
        text = path.read_text()
        updated, count = re.subn(line.format(r'[^"]+'), line.format(version), text)
        if count != 1:
            sys.exit(f"{name} has {count} lines of the form {line.format('VERSION')}, not 1")
        if updated == text:
            continue
        if "--check" in arguments:
            print(f"{name} differs from {version} in service/__init__.py: run make version")
            status = 1
        else:
            path.write_text(updated)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
