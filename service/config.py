"""The configuration, read once from the environment and a `.env` file, validated and frozen.

A leaf: this module imports no other module of the service.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AliasChoices,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "CHAT_HISTORY_"
ENV_FILE = ".env"
MAX_PORT = 65535
MIB = 1024 * 1024


class Settings(BaseSettings):
    """Every setting of the service. The docstrings become docs/reference/configuration.md.

    Raises:
        pydantic.ValidationError: A value is malformed, or two settings contradict each other.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=ENV_FILE,
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    listen: str = "127.0.0.1:50051"
    """Address to serve on, `host:port`. Port 0 selects a free port."""
    health_listen: str | None = None
    """Plaintext address that serves `grpc.health.v1` only, for probes when `listen` uses TLS."""
    metrics_listen: str | None = None
    """Address of the Prometheus endpoint. Unset: no endpoint, and no cost."""
    data_dir: Path = Path(".data")
    """Folder of the embedded PostgreSQL and the embedded Qdrant."""

    database_url: SecretStr | None = Field(
        default=None, validation_alias=AliasChoices("DATABASE_URL", "NEON_DATABASE_URL")
    )
    """Connection string of PostgreSQL, in libpq's forms or as Neon's console shows it. It may name
    several hosts, of which the service uses the primary. Unset: an embedded PostgreSQL under
    `data_dir`."""
    database_url_file: Path | None = Field(
        default=None, validation_alias=AliasChoices("DATABASE_URL_FILE", "NEON_DATABASE_URL_FILE")
    )
    """File that holds the connection string, in place of `DATABASE_URL`. It is read again for each
    new connection, so a changed secret needs no restart."""
    database_password_file: Path | None = Field(
        default=None, validation_alias=AliasChoices("DATABASE_PASSWORD_FILE")
    )
    """File that holds the password, which replaces that of the connection string. It is read again
    for each new connection."""
    database_read_url: SecretStr | None = Field(
        default=None, validation_alias=AliasChoices("DATABASE_READ_URL")
    )
    """Connection string of a replica of the database: a standby, several of them, or an endpoint
    for reads. It serves calls with the metadata `read_consistency: eventual`. Unset: the primary
    serves all calls."""
    database_read_url_file: Path | None = Field(
        default=None, validation_alias=AliasChoices("DATABASE_READ_URL_FILE")
    )
    """File that holds the connection string of the replica, in place of `DATABASE_READ_URL`. It is
    read again for each new connection."""
    read_max_lag: Annotated[float, Field(ge=2, le=3600)] = 10.0
    """Age in seconds of the oldest data that the replica may return. The primary is read instead
    when the replica lags further."""
    db_schema: str | None = None
    """Schema that holds the tables. `migrate` creates it. Unset: the schema of this database that
    holds them already, or else `chathistory`. Two installations in one database need it."""
    db_pool_size: PositiveInt = 8
    """Connections that the pool keeps open."""
    db_max_overflow: NonNegativeInt = 4
    """Connections that the pool may open beyond its size under load."""
    db_pool_timeout: PositiveFloat = 5.0
    """Seconds that a call waits for a connection of the pool."""
    db_pool_recycle: PositiveInt = 240
    """Age in seconds at which a connection is replaced. The default is below the five idle minutes
    after which Neon suspends a database."""
    db_connect_timeout: PositiveFloat = 12.0
    """Seconds for one connection attempt. A suspended Neon database takes up to a few seconds to
    wake."""
    db_prepared_statements: Literal["auto", "on", "off"] = "auto"
    """Whether statements are prepared. `auto`: yes, except through a transaction pooler, which the
    service recognizes by its behaviour. `on`: also through a pooler, which must support it. `off`:
    no, and every connection is treated as one through a transaction pooler."""
    db_synchronous_commit: Literal["on", "server"] = "on"
    """PostgreSQL's `synchronous_commit` for appends. `on`: at least `on`, also where the server or
    the role has a weaker value. `server`: the value of the server or the role."""
    append_lanes: Annotated[int, Field(ge=1, le=16)] = 2
    """Append statements in flight at the same time."""
    read_connections: Annotated[int, Field(ge=1, le=64)] = 4
    """Connections reserved for the hot reads while there is traffic."""

    search: Literal["on", "off"] = "on"
    """Semantic search. `off` imports none of its packages; lexical search keeps working."""
    index_messages: bool = True
    """Whether messages are indexed for semantic search, in addition to documents."""
    index_max_points: Annotated[int, Field(ge=1, le=10_000_000)] = 250_000
    """Chunks and messages for which the embedded index has room. It holds them in memory: about
    1.7 KB each with the offline embeddings, and 0.7 KB and 4 bytes for each dimension with others.
    Further ones are not indexed. A Qdrant server has no limit."""
    search_timeout: PositiveFloat = 5.0
    """Seconds that one request to Qdrant or to the embeddings may take."""
    qdrant_url: str | None = Field(default=None, validation_alias=AliasChoices("QDRANT_URL"))
    """URL of Qdrant, such as `http://localhost:6333`. Unset: an embedded Qdrant under `data_dir`,
    which serves one process only."""
    qdrant_api_key: SecretStr | None = Field(
        default=None, validation_alias=AliasChoices("QDRANT_API_KEY")
    )
    """API key of Qdrant."""
    qdrant_transport: Literal["grpc", "rest"] = "grpc"
    """Protocol used with Qdrant."""
    qdrant_grpc_port: Annotated[int, Field(ge=1, le=MAX_PORT)] = 6334
    """gRPC port of Qdrant."""
    qdrant_collection: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "chathistory"
    """Prefix of the collection names. Deployments that share a Qdrant need different prefixes."""
    embeddings_url: str | None = Field(
        default=None, validation_alias=AliasChoices("EMBEDDINGS_URL")
    )
    """URL of an OpenAI-compatible embeddings endpoint, such as `https://api.openai.com/v1`. Unset:
    offline embeddings."""
    embeddings_model: str | None = Field(
        default=None, validation_alias=AliasChoices("EMBEDDINGS_MODEL")
    )
    """Model that the endpoint uses. Required with `EMBEDDINGS_URL`."""
    embeddings_api_key: SecretStr | None = Field(
        default=None, validation_alias=AliasChoices("EMBEDDINGS_API_KEY")
    )
    """API key of the endpoint."""
    embeddings_dimensions: PositiveInt | None = Field(
        default=None, validation_alias=AliasChoices("EMBEDDINGS_DIMENSIONS")
    )
    """Vector length that the model must have, checked at start. Unset: any length is accepted."""

    auth: Literal["none", "jwt"] = "none"
    """How callers are identified. `none`: every caller is a service. `jwt`: by bearer token."""
    jwt_key: SecretStr | None = None
    """Key that verifies tokens: a shared secret, a public key (PEM), or the path of a file that
    holds either."""
    jwks_url: str | None = None
    """URL at which the issuer publishes its keys. An alternative to `jwt_key`."""
    jwks_ca: Path | None = None
    """Certificate authorities (PEM) trusted for `jwks_url`. Unset: the system's."""
    jwks_token_file: Path | None = None
    """File with a bearer token to send to `jwks_url`. Read again for every request."""
    jwt_issuer: str | None = None
    """Required value of a token's `iss` claim."""
    jwt_audience: str | None = None
    """Required value of a token's `aud` claim."""
    jwt_subject: Literal["user_id", "external_id"] = "user_id"
    """Meaning of a token's `sub` claim."""
    jwt_service_subjects: str = ""
    """Comma-separated subjects that are services without the scope `chathistory.service`."""
    tls_cert: Path | None = None
    """Certificate chain of the server (PEM). This file and the next two are read again when they
    change."""
    tls_key: Path | None = None
    """Private key of `tls_cert` (PEM)."""
    tls_client_ca: Path | None = None
    """Certificate authorities (PEM) that must have issued every client's certificate (mutual
    TLS)."""
    page_token_key: Annotated[SecretStr, Field(min_length=16)] | None = None
    """Key that authenticates page tokens, at least 16 characters, the same for all replicas. Unset:
    a key derived from the time at which the database was set up. A change makes clients repeat
    their lists from the first page."""
    call_timeout: PositiveFloat = 30.0
    """Deadline in seconds for calls whose client sets none."""
    max_in_flight: PositiveInt = 1024
    """Maximum concurrent calls. One user may use all of them while no other user calls. A quarter
    more is reserved for users with few calls in flight. Further calls are rejected with
    RESOURCE_EXHAUSTED and a retry delay."""
    max_watches: PositiveInt = 1000
    """Maximum concurrent streams (WatchMessages, ExportUserData), shared between users like
    calls."""
    max_calls_per_connection: PositiveInt = 200
    """Maximum concurrent calls on one connection. Streams may use half of them. Further calls wait
    at the client (HTTP/2's SETTINGS_MAX_CONCURRENT_STREAMS)."""
    max_connections: PositiveInt = 1000
    """Maximum connections. One client address may have half of them. The service also leaves a
    quarter of the process's file descriptors (`ulimit -n`) free. Further connections are closed."""
    max_bytes_in_flight: Annotated[int, Field(ge=16 * MIB)] = 96 * MIB
    """Maximum bytes of requests and replies that calls hold, until the client has received the
    reply. The service uses up to three times as much memory for them. A quarter is reserved for
    users who hold little, as with calls. Further calls are rejected with RESOURCE_EXHAUSTED and a
    retry delay; streams wait, and use at most half of each limit."""
    max_bytes_per_user: Annotated[int, Field(ge=8 * MIB)] = 32 * MIB
    """Maximum bytes that the calls of one user hold, with those that services make for the user;
    never more than `max_bytes_in_flight`."""
    max_bytes_per_connection: Annotated[int, Field(ge=8 * MIB)] = 48 * MIB
    """Maximum bytes that the calls of one connection hold; never more than `max_bytes_in_flight`.
    Connections over a Unix socket have no limit of their own."""
    shutdown_grace: PositiveFloat = 20.0
    """Seconds that calls in flight may take to finish at shutdown."""
    shutdown_delay: Annotated[float, Field(ge=0)] = 0.0
    """Seconds between reporting NOT_SERVING and rejecting calls, so that load balancers can
    react."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest severity that is logged."""
    log_format: Literal["auto", "console", "json"] = "auto"
    """Format of log lines. `auto`: console on a terminal, JSON lines elsewhere."""

    @field_validator("listen", "health_listen", "metrics_listen")
    @classmethod
    def _check_address(cls, address: str | None) -> str | None:
        if address is not None:
            split_address(address)
        return address

    @field_validator("db_schema")
    @classmethod
    def _check_db_schema(cls, name: str | None) -> str | None:
        if name is not None and not is_schema_name(name):
            raise ValueError("must be a name of lower-case letters, digits and _, not pg_...")
        return name

    @field_validator("jwks_url")
    @classmethod
    def _check_jwks_url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme != "https" and not (
            parts.scheme == "http" and is_loopback(parts.hostname or "")
        ):
            raise ValueError(
                "must be an https:// URL: an attacker who can alter the keys in transit can "
                "impersonate every caller"
            )
        if not parts.hostname or parts.username is not None:
            raise ValueError("must be a URL with a host and without credentials")
        return url

    @property
    def has_database(self) -> bool:
        """Whether a database is configured; else the embedded one is used."""
        return self.database_url is not None or self.database_url_file is not None

    @model_validator(mode="after")
    def _check_database(self) -> Settings:
        if self.database_url is not None and self.database_url_file is not None:
            raise ValueError(
                "DATABASE_URL and DATABASE_URL_FILE (or NEON_…) exclude each other: remove one"
            )
        if self.database_read_url is not None and self.database_read_url_file is not None:
            raise ValueError("DATABASE_READ_URL and DATABASE_READ_URL_FILE exclude each other")
        if self.database_password_file is not None and not self.has_database:
            raise ValueError("DATABASE_PASSWORD_FILE needs DATABASE_URL or DATABASE_URL_FILE")
        return self

    @model_validator(mode="after")
    def _check_combinations(self) -> Settings:
        if (self.embeddings_url is None) != (self.embeddings_model is None):
            raise ValueError("EMBEDDINGS_URL and EMBEDDINGS_MODEL go together: set both or neither")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError(
                f"{PREFIX}TLS_CERT and {PREFIX}TLS_KEY go together: set both or neither"
            )
        for field in ("max_bytes_per_user", "max_bytes_per_connection"):
            limit = getattr(self, field)
            if field in self.model_fields_set and limit > self.max_bytes_in_flight:
                raise ValueError(
                    f"{_variable(field)}={limit} is above {PREFIX}MAX_BYTES_IN_FLIGHT="
                    f"{self.max_bytes_in_flight}: lower it, or raise the total"
                )
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError(f"{PREFIX}TLS_CLIENT_CA needs {PREFIX}TLS_CERT and {PREFIX}TLS_KEY")
        if self.auth == "jwt":
            self._check_jwt()
        elif self.jwt_key is not None or self.jwks_url is not None:
            raise ValueError(
                f"a key for tokens is set, but {PREFIX}AUTH=none ignores tokens: "
                f"set {PREFIX}AUTH=jwt"
            )
        elif self.tls_client_ca is None and not is_loopback(split_address(self.listen)[0]):
            raise ValueError(
                f"{PREFIX}LISTEN={self.listen} is not a loopback address, and {PREFIX}AUTH=none "
                f"lets every caller act for every user: listen on 127.0.0.1, set {PREFIX}AUTH=jwt, "
                f"or require mutual TLS ({PREFIX}TLS_CLIENT_CA)"
            )
        return self

    def _check_jwt(self) -> None:
        if (self.jwt_key is None) == (self.jwks_url is None):
            raise ValueError(
                f"{PREFIX}AUTH=jwt needs exactly one of {PREFIX}JWT_KEY and {PREFIX}JWKS_URL"
            )
        if self.jwks_url is not None and not (self.jwt_issuer and self.jwt_audience):
            raise ValueError(
                f"{PREFIX}JWKS_URL needs {PREFIX}JWT_ISSUER and {PREFIX}JWT_AUDIENCE: the same "
                "keys also sign tokens for other applications"
            )


def is_schema_name(name: str) -> bool:
    """Return whether a name can be that of a schema of the service, and needs no quotes."""
    return (
        re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", name) is not None
        and not name.startswith("pg_")
        and name != "information_schema"
    )


class BadConfiguration(Exception):
    """The configuration is invalid.

    `problems` has one line for each problem. A line names its setting and never contains a
    secret's value.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def load() -> Settings:
    """Read the configuration.

    Raises:
        BadConfiguration: A setting is malformed, or `.env` cannot be read.
    """
    try:
        return Settings()
    except ValidationError as error:
        problems = [
            f"{_variable(str(problem['loc'][0]))}: {_describe(problem)}"
            if problem["loc"]
            else problem["msg"].removeprefix("Value error, ")
            for problem in error.errors()
        ]
    except (OSError, UnicodeDecodeError) as error:
        problems = [f"{ENV_FILE} cannot be read: {error}"]
    raise BadConfiguration(problems) from None


def _describe(problem: Mapping[str, Any]) -> str:
    """Return pydantic's description of a problem, in the words of the reference."""
    if problem["type"] == "too_short":
        return f"must have at least {problem['ctx']['min_length']} characters"
    message: str = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "int_parsing":
        message = "must be a whole number, without a unit"
    return message[:1].lower() + message[1:]


def _variable(field: str) -> str:
    """Return the environment variable of a field. Pydantic reports an alias as it is."""
    return PREFIX + field.upper() if field in Settings.model_fields else field


def _variables() -> list[str]:
    names: list[str] = []
    for field, info in Settings.model_fields.items():
        alias = info.validation_alias
        names += (
            [str(name) for name in alias.choices]
            if isinstance(alias, AliasChoices)
            else [_variable(field)]
        )
    return names


def _variables_set() -> dict[str, str]:
    """Return every variable that is set, with its source: the environment or the `.env` file."""
    from dotenv import dotenv_values  # noqa: PLC0415 - only `check` needs the sources

    in_file = {name.upper(): ENV_FILE for name, value in dotenv_values(ENV_FILE).items() if value}
    return in_file | {
        name.upper(): "the environment" for name, value in os.environ.items() if value
    }


def sources() -> dict[str, str]:
    """Return the settings that are set, each with its source."""
    variables_set = _variables_set()
    return {name: variables_set[name] for name in _variables() if name in variables_set}


def unknown_settings() -> list[str]:
    """Return one line for each variable with the prefix that is not a setting.

    Such a variable is probably misspelled, and is ignored silently otherwise.
    """
    known = {name.removeprefix(PREFIX): name for name in _variables()}
    lines = []
    for name, source in _variables_set().items():
        if name.startswith(PREFIX) and name not in known.values():
            similar = difflib.get_close_matches(name.removeprefix(PREFIX), known, 1)
            hint = f"; did you mean {known[similar[0]]}?" if similar else ""
            lines.append(f"{name} in {source} is not a setting{hint}")
    return sorted(lines)


def split_address(address: str) -> tuple[str, int]:
    """Split `host:port`, with an IPv6 host in brackets.

    Raises:
        ValueError: The address does not have this form.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > MAX_PORT:
        raise ValueError(f"{address!r} is not an address of the form host:port")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Return whether the host is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
