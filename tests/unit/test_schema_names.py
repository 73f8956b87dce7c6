"""Statements name the schema of every table."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import sqlalchemy as sa

import service
from service.store.append import sql
from service.store.db.hot_pool import SchemaStatements, Statement
from service.store.db.schema_names import in_schema
from service.store.tables import SCHEMA, chat_messages, metadata

APPEND = sql.statements(enqueues=True).append
SOURCES = sorted(Path(service.__file__).parent.rglob("*.py"))
UNQUALIFIED = re.compile(
    rf"\b(?:FROM|JOIN|INTO|UPDATE|USING)\s+(?:{'|'.join(metadata.tables)})\b(?! import)"
)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (SCHEMA, "SELECT FROM chathistory.users"),
        ("public", "SELECT FROM public.users"),
        ("My Chat", 'SELECT FROM "My Chat".users'),
        ("user", 'SELECT FROM "user".users'),
    ],
)
def test_statement_is_put_into_a_schema_with_quotes_where_needed(
    schema: str, expected: str
) -> None:
    assert in_schema("SELECT FROM chathistory.users", schema) == expected


def test_compiled_statement_names_the_schema_of_tables_and_columns() -> None:
    statement = Statement(sa.select(chat_messages.c.seq).where(chat_messages.c.id == "1"))
    assert "chathistory.chat_messages.seq" in statement.text
    assert "FROM chathistory.chat_messages" in statement.text
    assert "SCHEMA" not in statement.text


def test_statements_follow_the_schema_in_use() -> None:
    statements = SchemaStatements()
    assert statements[APPEND] is APPEND
    statements.use("public")
    translated = statements[APPEND]
    assert SCHEMA not in translated.text
    assert translated.text.count("public.") == APPEND.text.count("chathistory.")
    assert statements[APPEND] is translated
    statements.use(SCHEMA)
    assert statements[APPEND] is APPEND


def test_no_text_of_a_statement_names_a_table_without_its_schema() -> None:
    unqualified = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                unqualified += [f"{path}: {match}" for match in UNQUALIFIED.findall(node.value)]
    assert unqualified == []
    assert UNQUALIFIED.search("DELETE FROM users")
