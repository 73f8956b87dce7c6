"""Distributions of this repository, built and installed as their users get them."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.commands import run

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
    uv = Path(sys.executable).parent / "uv"
    folder.mkdir(parents=True, exist_ok=True)
    run(uv, "venv", "-q", "--no-config", "--python", sys.executable, folder, cwd=folder.parent)
    return folder / "bin" / "python"


def install(python: Path, *arguments: str | Path) -> None:
    """Install requirements into the environment of `python`, from wheels only."""
    uv = Path(sys.executable).parent / "uv"
    options = ("-q", "--no-config", "--only-binary", ":all:", "--python", python)
    run(uv, "pip", "install", *options, *arguments, cwd=python.parent)
