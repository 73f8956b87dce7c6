"""Reads settings of the server that apply to a role, and where each of them was set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.doctor.findings import Finding, Verdict
from service.store.db.engine import PING_AFTER_IDLE_S

READ_ONLY = "default_transaction_read_only"
SHORT_TIMEOUT_MS = 5_000
"""Milliseconds below which a timeout of the server ends statements that the service allows."""
_STATEMENT_TIMEOUTS = (
    "statement_timeout",
    "transaction_timeout",
    "idle_in_transaction_session_timeout",
)
_IDLE_TIMEOUT = "idle_session_timeout"
_NAMES = (READ_ONLY, *_STATEMENT_TIMEOUTS, _IDLE_TIMEOUT)

# `reset_val` is the value with which the session began: `describe` sets some of them for itself.
# The most specific setting wins: of the role in the database, of the role, of the database.
_READ = text("""
    SELECT s.name, s.reset_val, (
        SELECT CASE
            WHEN d.setrole <> 0 AND d.setdatabase <> 0
                THEN format('ALTER ROLE %I IN DATABASE %I', session_user, current_database())
            WHEN d.setrole <> 0 THEN format('ALTER ROLE %I', session_user)
            WHEN d.setdatabase <> 0 THEN format('ALTER DATABASE %I', current_database())
            ELSE 'ALTER ROLE ALL' END
        FROM pg_db_role_setting AS d, unnest(d.setconfig) AS c (entry)
        WHERE split_part(c.entry, '=', 1) = s.name
          AND d.setrole IN (0, (SELECT r.oid FROM pg_roles AS r WHERE r.rolname = session_user))
          AND d.setdatabase IN
              (0, (SELECT b.oid FROM pg_database AS b WHERE b.datname = current_database()))
        ORDER BY d.setrole <> 0 DESC, d.setdatabase <> 0 DESC LIMIT 1
    ) AS origin
    FROM pg_settings AS s WHERE s.name = ANY (CAST(:names AS text[]))
    ORDER BY s.name
""")


class Setting(NamedTuple):
    """The value of a setting when a session begins."""

    value: str
    """Timeouts are in milliseconds."""
    origin: str | None = None
    """The statement without its end that has set it; None if it is the server's own."""

    def remedy(self, name: str, value: str) -> str:
        """Return the statement after which the setting has no effect any more.

        Args:
            name: The name of the setting.
            value: The value without an effect, for the configuration of the server.
        """
        if self.origin is None:
            return f"run ALTER SYSTEM SET {name} = {value}, and SELECT pg_reload_conf()"
        return f"run {self.origin} RESET {name}"


async def read_settings(connection: AsyncConnection) -> dict[str, Setting]:
    """Return the settings that this server has, by name."""
    rows = await connection.execute(_READ, {"names": list(_NAMES)})
    return {name: Setting(value, origin) for name, value, origin in rows}


def check_timeouts(settings: Mapping[str, Setting]) -> list[Finding]:
    """Return the findings on timeouts that end statements or connections of the service."""
    findings = []
    for name in _STATEMENT_TIMEOUTS:
        setting = settings.get(name)
        if setting is not None and 0 < int(setting.value) < SHORT_TIMEOUT_MS:
            message = (
                f"{setting.value} ms: the server ends statements that take longer, and their "
                f"callers receive UNAVAILABLE; {setting.remedy(name, '0')}"
            )
            findings.append(Finding(name, message, Verdict.TODO))
    setting = settings.get(_IDLE_TIMEOUT)
    if setting is not None and 0 < int(setting.value) < PING_AFTER_IDLE_S * 1000:
        message = (
            f"{setting.value} ms: the server closes connections of the pool before the service "
            f"checks them, which it does after {PING_AFTER_IDLE_S:g} s idle, so calls are repeated "
            f"on others; {setting.remedy(_IDLE_TIMEOUT, '0')}"
        )
        findings.append(Finding(_IDLE_TIMEOUT, message, Verdict.NOTE))
    return findings
