"""The replica that the configuration names for reads that may lag."""

from __future__ import annotations

from service.config import BadConfiguration, Settings
from service.store.db.dsn import Target, parse
from service.store.db.target_files import TargetFiles, TextFile


def read_target(settings: Settings) -> Target | None:
    """Return where the replica is; None if the configuration names none.

    Raises:
        BadConfiguration: its connection string is malformed, or has an option that cannot be
            honoured.
    """

    def parse_text(text: str) -> Target:
        return parse(
            text,
            prepared_statements=settings.db_prepared_statements,
            schema=settings.db_schema,
            is_replica=True,
        )

    string: str | TextFile
    if settings.database_read_url_file is not None:
        string = TextFile("DATABASE_READ_URL_FILE", settings.database_read_url_file)
    elif settings.database_read_url is not None:
        string = settings.database_read_url.get_secret_value()
    else:
        return None
    try:
        return TargetFiles(parse_text, string).load()
    except ValueError as error:
        raise BadConfiguration([f"DATABASE_READ_URL: {error}"]) from None
