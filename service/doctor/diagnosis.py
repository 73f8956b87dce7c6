"""Returns all findings on a database, in the order of the report."""

from __future__ import annotations

from service.doctor import connections, server
from service.doctor.connections import Pool
from service.doctor.description import Description
from service.doctor.findings import Finding
from service.doctor.schema import check_schema
from service.doctor.search import check_search
from service.doctor.server_settings import check_timeouts
from service.doctor.text_locale import check_text_locale
from service.store.db.dsn import Target


def diagnose(
    description: Description, target: Target, pool: Pool, *, raises_synchronous_commit: bool = True
) -> list[Finding]:
    """Return the findings on a database and on its use by a service with this pool."""
    return [
        Finding("database", f"{target.location} as {description.account}"),
        server.check_version(description),
        connections.check_route(description, target),
        connections.check_tls(description, target),
        Finding("statements", connections.describe_statements(target)),
        connections.check_round_trip(description),
        *check_schema(description.schema, description.account),
        connections.check_pool_size(description, target, pool.size + pool.overflow),
        connections.check_connections(target, pool),
        *server.check_writes(description),
        *server.check_clock(description),
        *check_timeouts(description.settings),
        *server.check_settings(
            description, target, raises_synchronous_commit=raises_synchronous_commit
        ),
        *check_text_locale(description.text_locale),
        *check_search(description.index_state),
    ]
