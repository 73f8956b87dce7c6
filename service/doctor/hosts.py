"""Reports the role of each server when the connection string names several."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import text

from service.doctor.findings import Finding, Verdict
from service.doctor.refusals import explain
from service.store.db.addresses import Address
from service.store.db.connector import MAX_HOST_TIMEOUT_S, Role
from service.store.db.db_errors import DATABASE_ERRORS, WrongRole, driver_error
from service.store.db.dsn import Target
from service.store.db.engine import single_use_engine

_READ = text(
    "SELECT pg_is_in_recovery() AS is_standby, "
    "current_setting('transaction_read_only') = 'on' AS is_read_only, "
    "pg_postmaster_start_time() AS started_at"
)
_MESSAGES = {
    Role.WRITABLE: "writable: the primary, which the service uses",
    Role.READ_ONLY: "a primary whose sessions are read-only: the service reads from it while no "
    "server is writable",
    Role.STANDBY: "a standby, which the service does not use until it is promoted",
}
_VERDICTS = {Role.READ_ONLY: Verdict.NOTE}
_ROLES = {role.value: role for role in Role}
"""The roles by the message of `WrongRole`."""


class Host(NamedTuple):
    """One server of a connection string."""

    address: Address
    role: Role | None
    """None if it cannot be used."""
    problem: str = ""
    """Why it cannot be used, and what to do."""
    started_at: datetime | None = None
    """The start of the server: the same at each address of one server."""


async def describe_hosts(target: Target, timeout_s: float) -> list[Host]:
    """Connect to each server of a target that names several; return their roles in its order.

    Args:
        target: The target. If it names one server, the list is empty.
        timeout_s: Seconds for each connection, at most those that the service allows.
    """
    target = target.current()
    if len(target.addresses) < 2:  # noqa: PLR2004 - several
        return []
    timeout_s = min(timeout_s, MAX_HOST_TIMEOUT_S)
    return await asyncio.gather(
        *(_describe_host(_at(target, address), timeout_s) for address in target.addresses)
    )


def _at(target: Target, address: Address) -> Target:
    """Return the target with one of its servers only."""
    if address.host.startswith("/"):
        query = {"host": address.host, "port": str(address.port)}
        url = target.url.set(host=None, port=None, query=query)
    else:
        url = target.url.set(host=address.host, port=address.port, query={})
    return replace(target, url=url, addresses=(address,), read_again=None)


async def _describe_host(target: Target, timeout_s: float) -> Host:
    [address] = target.addresses
    engine = single_use_engine(target, connect_timeout_s=timeout_s)
    try:
        async with asyncio.timeout(2 * timeout_s), engine.connect() as connection:
            row = (await connection.execute(_READ)).one()
    except DATABASE_ERRORS as error:
        # Connecting to a standby fails, or to a read-only primary if the URL excludes it.
        cause = driver_error(error)
        role = _ROLES.get(str(cause)) if isinstance(cause, WrongRole) else None
        return Host(address, role, "" if role else explain(error, target))
    finally:
        await engine.dispose()
    if row.is_standby:
        return Host(address, Role.STANDBY)
    role = Role.READ_ONLY if row.is_read_only else Role.WRITABLE
    return Host(address, role, started_at=row.started_at)


def check_hosts(hosts: Sequence[Host]) -> list[Finding]:
    """Return one finding on each server, and one if several primaries accept writes."""
    findings = [_check_host(host) for host in hosts]
    writable = [host for host in hosts if host.role is Role.WRITABLE]
    if len({host.started_at for host in writable}) > 1:
        addresses = ", ".join(str(host.address) for host in writable)
        message = (
            f"{addresses} are several primaries that accept writes, so messages are divided among "
            "them: stop all but the current primary, and make the others its standbys"
        )
        findings.append(Finding("servers", message, Verdict.TODO))
    return findings


def _check_host(host: Host) -> Finding:
    if host.role is None:
        return Finding("server", f"{host.address}: {host.problem}", Verdict.NOTE)
    message = f"{host.address}: {_MESSAGES[host.role]}"
    return Finding("server", message, _VERDICTS.get(host.role, Verdict.OK))
