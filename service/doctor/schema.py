"""Checks the schema: its place and its version."""

from __future__ import annotations

from service.doctor.findings import Finding, Verdict
from service.store.schema.version import SchemaVersion
from service.store.tables import BUILD, REQUIRED_REVISION, SCHEMA


def check_schema(schema: SchemaVersion, name: str) -> Finding:
    if schema.problem is not None:
        return Finding("schema", schema.problem, Verdict.TODO)
    message = (
        f"revision {schema.revision:04d} in {name}; this build requires {REQUIRED_REVISION:04d}"
    )
    if schema.revision < BUILD:
        return Finding(
            "schema",
            f"{message} and provides {BUILD:04d}: run `chat-history migrate` when convenient",
            Verdict.NOTE,
        )
    if schema.revision > BUILD:
        message += " or newer"
    if name == "public":
        message += f"; `chat-history move-schema {SCHEMA}` moves it into a schema of its own"
        return Finding("schema", message, Verdict.NOTE)
    return Finding("schema", message)
