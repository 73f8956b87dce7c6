"""Program that runs a server on `DATABASE_URL` and prints its address once it is ready."""

from __future__ import annotations

import sys

import uvloop

from service import process
from service.config import Settings
from service.store.db.dsn import parse
from service.telemetry.logs import configure_logging


def main() -> None:
    settings = Settings()
    configure_logging(settings.log_level, "json")
    assert settings.database_url is not None, "DATABASE_URL is not set"
    target = parse(
        settings.database_url.get_secret_value(),
        prepared_statements=settings.db_prepared_statements,
        schema=settings.db_schema,
    )
    uvloop.run(process.run(settings, target, on_ready=lambda address: print(address, flush=True)))
    sys.exit(0)


if __name__ == "__main__":
    main()
