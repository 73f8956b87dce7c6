"""The replica that the configuration names for reads that may lag."""

from __future__ import annotations

from service.config import BadConfiguration, Settings
from service.store.db.dsn import Target, parse


def read_target(settings: Settings) -> Target | None:
    """Return where the replica is; None if the configuration names none.

    Raises:
        BadConfiguration: its connection string is malformed, or has an option that cannot be
            honoured.
    """
    if settings.database_read_url is None:
        return None
    try:
        return parse(
            settings.database_read_url.get_secret_value(),
            prepared_statements=settings.db_prepared_statements,
            schema=settings.db_schema,
            is_replica=True,
        )
    except ValueError as error:
        raise BadConfiguration([f"DATABASE_READ_URL: {error}"]) from None
