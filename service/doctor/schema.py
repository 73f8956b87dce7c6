"""Checks the schema: its place, its version, the rights on it, and what is in its way."""

from __future__ import annotations

from service.doctor.description import SchemaState
from service.doctor.findings import Finding, Verdict
from service.store.db.schema_names import quote
from service.store.db.table_locks import TableLock
from service.store.schema.version import SchemaVersion
from service.store.tables import BUILD, REQUIRED_REVISION, SCHEMA

LONG_LOCK_S = 5.0
"""Age in seconds from which a lock on a table is no short one, as of a migration."""


def check_schema(schema: SchemaState, role: str) -> list[Finding]:
    """Return the findings on the tables.

    Args:
        schema: The tables.
        role: The role of the connection.
    """
    findings = [_check_version(schema)]
    if schema.other_schemas:
        message = (
            f"tables of ChatHistory are also in {', '.join(schema.other_schemas)}, which this "
            "service does not use: each installation needs CHAT_HISTORY_DB_SCHEMA"
        )
        findings.append(Finding("other schemas", message, Verdict.NOTE))
    findings += [Finding("left behind", str(tables), Verdict.NOTE) for tables in schema.left_behind]
    if schema.missing_privileges:
        findings.append(_check_privileges(schema, role))
    if schema.table_lock is not None:
        findings.append(_check_lock(schema.table_lock))
    return findings


def _check_version(schema: SchemaState) -> Finding:
    if schema.problem:
        return Finding("schema", schema.problem, Verdict.TODO)
    if schema.version is None:
        message = (
            f"the version of the schema {schema.name} cannot be read: its tables are locked, or "
            "the role lacks privileges on them"
        )
        return Finding("schema", message, Verdict.TODO)
    if schema.version.problem is not None:
        return Finding("schema", schema.version.problem, Verdict.TODO)
    return _check_revision(schema.version, schema.name)


def _check_revision(version: SchemaVersion, name: str) -> Finding:
    message = (
        f"revision {version.revision:04d} in {name}; this build requires {REQUIRED_REVISION:04d}"
    )
    if version.revision < BUILD:
        message += f" and provides {BUILD:04d}: run `chat-history migrate` when convenient"
        return Finding("schema", message, Verdict.NOTE)
    if version.revision > BUILD:
        message += " or newer"
    if name == "public":
        message += f"; `chat-history move-schema {SCHEMA}` moves it into a schema of its own"
        return Finding("schema", message, Verdict.NOTE)
    return Finding("schema", message)


def _check_privileges(schema: SchemaState, role: str) -> Finding:
    first, *others = schema.missing_privileges
    further = f" and {len(others)} further privileges" if others else ""
    message = (
        f"{first}{further}: run GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA "
        f"{quote(schema.name)} TO {quote(role)}, as the owner of the tables"
    )
    return Finding("privileges", message, Verdict.TODO)


def _check_lock(lock: TableLock) -> Finding:
    message = str(lock)
    if lock.age_s is not None:
        message += f", for {lock.age_s:.0f} s"
    message += ": calls wait for it; end its transaction"
    if lock.pid is not None:
        message += f", as with SELECT pg_terminate_backend({lock.pid})"
    is_long = lock.age_s is not None and lock.age_s >= LONG_LOCK_S
    return Finding("locks", message, Verdict.TODO if is_long else Verdict.NOTE)
