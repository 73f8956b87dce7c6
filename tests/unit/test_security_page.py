"""SECURITY.md names a test for each of its measures, and these tests exist."""

from __future__ import annotations

import ast
import re

import pytest

from tests.support.servers import ROOT

PAGE = (ROOT / "SECURITY.md").read_text()
REFERENCE = re.compile(r"`(tests/[\w/]+(?:\.py)?)(?:::(\w+))?`")
TARGET = re.compile(r"`make (\w+)`")
TABLES = ("Threats and measures", "One caller cannot harm the others")


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the table below a heading, without the table's own heading."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


@pytest.mark.parametrize("heading", TABLES)
def test_every_measure_names_what_checks_it(heading: str) -> None:
    assert len(rows(heading)) > 10
    for row in rows(heading):
        assert len(row) == 3, row
        threat, measure, checks = row
        assert threat
        assert measure
        assert REFERENCE.search(checks) or TARGET.search(checks), row
        code = set(re.findall(r"`[^`]+`", checks))
        known = {match[0] for match in REFERENCE.finditer(checks)}
        known |= {match[0] for match in TARGET.finditer(checks)}
        assert code == known, f"not a test or target: {code - known}"


def test_every_named_test_exists() -> None:
    references = set(REFERENCE.findall(PAGE))
    assert len(references) > 30
    for path, name in sorted(references):
        file = ROOT / path
        assert file.exists(), path
        if name:
            definitions = {
                node.name
                for node in ast.walk(ast.parse(file.read_text()))
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            }
            assert name in definitions, f"{path}::{name}"


def test_every_named_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in TARGET.findall(PAGE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
