"""Writes docs/reference/configuration.md from the settings themselves: `python scripts/settings.py [--check]`."""

from __future__ import annotations

import ast
import inspect
import itertools
import sys
from pathlib import Path

from pydantic import AliasChoices, SecretStr
from pydantic_core import PydanticUndefined

from service import config

TARGET = Path(__file__).parent.parent / "docs" / "reference" / "configuration.md"
HEAD = """# Configuration

Read once at start from the environment and a `.env` file in the working folder; the environment wins. A malformed value ends the start
with one line and exit code 2. `chat-history check` shows what is in force. This page is made from `service/config.py` by
`make format`.

| variable | default | meaning |
|---|---|---|
"""


def meanings() -> dict[str, str]:
    """Return each setting's docstring, by its field's name."""
    [body] = (
        node.body
        for node in ast.parse(inspect.getsource(config.Settings)).body
        if isinstance(node, ast.ClassDef)
    )
    found: dict[str, str] = {}
    for field, text in itertools.pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def render() -> str:
    """Return the page."""
    rows = []
    for name, meaning in meanings().items():
        info = config.Settings.model_fields[name]
        alias = info.validation_alias
        names = (
            [str(choice) for choice in alias.choices]
            if isinstance(alias, AliasChoices)
            else [config.PREFIX + name.upper()]
        )
        default = info.default
        shown = (
            ""
            if default in (None, "", PydanticUndefined) or isinstance(default, SecretStr)
            else f"`{default}`"
        )
        rows.append(
            f"| {', '.join(f'`{each}`' for each in names)} | {shown} | {meaning.replace('|', chr(92) + '|')} |\n"
        )
    return HEAD + "".join(rows)


if __name__ == "__main__":
    page = render()
    if "--check" in sys.argv:
        if not TARGET.exists() or TARGET.read_text() != page:
            sys.exit(f"{TARGET.name} is stale: run make format")
    else:
        TARGET.write_text(page)
