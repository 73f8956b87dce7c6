"""The configuration: read once from the environment and a `.env` file, checked whole, frozen. A leaf: imports nothing of ours."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, NonNegativeInt, PositiveFloat, PositiveInt, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "CHAT_HISTORY_"
MAX_PORT = 65535


class Settings(BaseSettings):
    """Every setting of the service; names and defaults are in docs/configuration.md.

    Raises:
        pydantic.ValidationError: when a value is malformed, or two of them contradict each other.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    listen: str = "127.0.0.1:50051"
    """Address to serve on, `host:port`; port 0 takes a free one."""
    health_listen: str | None = None
    """A plaintext address for the health service alone."""
    metrics_listen: str | None = None
    """Address of the Prometheus endpoint; off unless set."""
    data_dir: Path = Path(".data")
    """Folder of the embedded PostgreSQL."""

    database_url: SecretStr | None = Field(
        default=None, validation_alias=AliasChoices("DATABASE_URL", "NEON_DATABASE_URL")
    )
    """PostgreSQL, as libpq or Neon's console writes it. Unset: an embedded PostgreSQL under `data_dir`."""
    db_pool_size: PositiveInt = 8
    """Connections kept."""
    db_max_overflow: NonNegativeInt = 4
    """Connections beyond those, while there is need."""
    db_pool_timeout: PositiveFloat = 5.0
    """Seconds to wait for a connection."""
    db_pool_recycle: PositiveInt = 240
    """Seconds after which a connection is replaced: below the five minutes after which Neon suspends."""
    db_connect_timeout: PositiveFloat = 12.0
    """Seconds for one connection attempt: a suspended Neon database needs a moment to wake."""
    db_prepared_statements: Literal["auto", "on", "off"] = "auto"
    """Whether statements are prepared; `auto` does not on a pooler's host."""
    append_lanes: Annotated[int, Field(ge=1, le=16)] = 2
    """Append statements under way at once."""
    read_connections: Annotated[int, Field(ge=1, le=64)] = 4
    """Connections kept for the hot reads while traffic flows."""

    auth: Literal["none"] = "none"
    """How callers prove who they are. With `none` every caller is a service."""
    call_timeout: PositiveFloat = 30.0
    """Seconds a call may take whose client set no deadline."""
    max_in_flight: PositiveInt = 1024
    """Calls under way at once; further ones are refused with RESOURCE_EXHAUSTED."""
    max_watches: PositiveInt = 1000
    """Open WatchMessages streams at once."""
    shutdown_grace: PositiveFloat = 20.0
    """Seconds that calls under way get at shutdown."""
    shutdown_delay: Annotated[float, Field(ge=0)] = 0.0
    """Seconds between turning NOT_SERVING and refusing calls, for load balancers to notice."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log lines written."""
    log_format: Literal["auto", "console", "json"] = "auto"
    """`auto`: console on a terminal, else JSON lines."""

    @model_validator(mode="after")
    def _check(self) -> Settings:
        host, _ = split_address(self.listen)
        for other in (self.health_listen, self.metrics_listen):
            if other is not None:
                split_address(other)
        if not _is_loopback(host):
            raise ValueError(
                f"{PREFIX}LISTEN={self.listen} is not a loopback address, and {PREFIX}AUTH=none lets every caller act for "
                "every user; listen on 127.0.0.1"
            )
        return self


def split_address(address: str) -> tuple[str, int]:
    """Split `host:port` (an IPv6 host in brackets).

    Raises:
        ValueError: when it is not of that form.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > MAX_PORT:
        raise ValueError(f"{address!r} is not an address of the form host:port")
    return host.strip("[]"), int(port)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
