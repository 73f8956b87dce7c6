"""Distributions of this repository, built and installed as their users get them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.support.commands import run

UV = Path(sys.executable).parent / "uv"
ROOT = Path(__file__).resolve().parents[2]
PROJECTS = {
    "chathistory-service": ROOT,
    "chathistory-client": ROOT / "client",
    "chathistory-stubs": ROOT / "generated",
}
"""The distributions by name, with the folder of each."""


def build(project: Path, target: str, out: Path) -> Path:
    """Build a project's `target`, "wheel" or "sdist", into `out` and return its path."""
    known = set(out.glob("*"))
    run(sys.executable, "-m", "hatchling", "build", "-t", target, "-d", out, cwd=project)
    [path] = set(out.glob("*")) - known
    return path


def create_environment(folder: Path) -> Path:
    """Create an empty virtual environment in `folder` and return its Python."""
    folder.mkdir(parents=True, exist_ok=True)
    run(UV, "venv", "-q", "--no-config", "--python", sys.executable, folder, cwd=folder.parent)
    return folder / "bin" / "python"


def install(python: Path, *arguments: str | Path) -> None:
    """Install requirements into the environment of `python`, from wheels only."""
    options = ("-q", "--no-config", "--only-binary", ":all:", "--python", python)
    run(UV, "pip", "install", *options, *arguments, cwd=python.parent)


def installed(python: Path) -> list[dict[str, Any]]:
    """Return the packages in the environment of `python`, each with `name` and `version`."""
    options = ("--no-config", "--format", "json", "--python", python)
    packages: list[dict[str, Any]] = json.loads(run(UV, "pip", "list", *options, cwd=python.parent))
    return packages
