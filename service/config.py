"""The configuration: read once from the environment and a `.env` file, checked whole, frozen. A leaf: imports nothing of ours."""

from __future__ import annotations

import difflib
import ipaddress
import os
from pathlib import Path
from typing import Annotated, Literal
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


class Settings(BaseSettings):
    """Every setting of the service; names and defaults are in docs/reference/configuration.md.

    Raises:
        pydantic.ValidationError: when a value is malformed, or two of them contradict each other.
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

    search: Literal["on", "off"] = "on"
    """Search by meaning. `off` imports none of it; search by words works all the same."""
    index_messages: bool = True
    """Whether messages are indexed, beside documents."""
    search_timeout: PositiveFloat = 5.0
    """Seconds that Qdrant, or the embeddings, have for an answer."""
    qdrant_url: str | None = Field(default=None, validation_alias=AliasChoices("QDRANT_URL"))
    """Qdrant, such as `http://localhost:6333`. Unset: the embedded one under `data_dir`, for one process."""
    qdrant_api_key: SecretStr | None = Field(
        default=None, validation_alias=AliasChoices("QDRANT_API_KEY")
    )
    """Key of that Qdrant."""
    qdrant_transport: Literal["grpc", "rest"] = "grpc"
    """How Qdrant is spoken to."""
    qdrant_grpc_port: Annotated[int, Field(ge=1, le=MAX_PORT)] = 6334
    """Qdrant's gRPC port."""
    qdrant_collection: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "chathistory"
    """What the names of our collections begin with: each deployment in one Qdrant needs its own."""
    embeddings_url: str | None = Field(
        default=None, validation_alias=AliasChoices("EMBEDDINGS_URL")
    )
    """An OpenAI-compatible endpoint, such as `https://api.openai.com/v1`. Unset: offline embeddings."""
    embeddings_model: str | None = Field(
        default=None, validation_alias=AliasChoices("EMBEDDINGS_MODEL")
    )
    """Its model."""
    embeddings_api_key: SecretStr | None = Field(
        default=None, validation_alias=AliasChoices("EMBEDDINGS_API_KEY")
    )
    """Its key."""
    embeddings_dimensions: PositiveInt | None = Field(
        default=None, validation_alias=AliasChoices("EMBEDDINGS_DIMENSIONS")
    )
    """How long its vectors must be. Unset: as long as they are."""

    auth: Literal["none", "jwt"] = "none"
    """How callers prove who they are. With `none` every caller is a service."""
    jwt_key: SecretStr | None = None
    """Key that verifies tokens: a shared secret, a public key (PEM), or the name of a file that holds either."""
    jwks_url: str | None = None
    """Where the issuer publishes its keys, instead of `jwt_key`."""
    jwks_ca: Path | None = None
    """Authorities that the certificate of `jwks_url` may come from; unset: the system's."""
    jwks_token_file: Path | None = None
    """A bearer token to show to `jwks_url`, read anew each time."""
    jwt_issuer: str | None = None
    """Who must have issued a token (`iss`)."""
    jwt_audience: str | None = None
    """Whom a token must be meant for (`aud`)."""
    jwt_subject: Literal["user_id", "external_id"] = "user_id"
    """What a token's `sub` is."""
    jwt_service_subjects: str = ""
    """Subjects that are services without the scope `chathistory.service`, with commas between them."""
    tls_cert: Path | None = None
    """The server's certificate chain (PEM); read again when it changes, as are the next two."""
    tls_key: Path | None = None
    """The key of `tls_cert`."""
    tls_client_ca: Path | None = None
    """Authorities that every client's certificate must come from (mutual TLS)."""
    call_timeout: PositiveFloat = 30.0
    """Seconds a call may take whose client set no deadline."""
    max_in_flight: PositiveInt = 1024
    """Calls under way at once, all of them one user's if nobody else calls. A quarter more is kept for users who have few under way;
    further ones are refused with RESOURCE_EXHAUSTED, and told when to come again."""
    max_watches: PositiveInt = 1000
    """Open streams (WatchMessages, ExportUserData) at once, shared out as calls are."""
    max_calls_per_connection: PositiveInt = 512
    """Calls at once on one connection, streams among them, which may be half of it; further calls wait at the client (HTTP/2's
    SETTINGS_MAX_CONCURRENT_STREAMS)."""
    shutdown_grace: PositiveFloat = 20.0
    """Seconds that calls under way get at shutdown."""
    shutdown_delay: Annotated[float, Field(ge=0)] = 0.0
    """Seconds between turning NOT_SERVING and refusing calls, for load balancers to notice."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log lines written."""
    log_format: Literal["auto", "console", "json"] = "auto"
    """`auto`: console on a terminal, else JSON lines."""

    @field_validator("listen", "health_listen", "metrics_listen")
    @classmethod
    def _check_address(cls, address: str | None) -> str | None:
        if address is not None:
            split_address(address)
        return address

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
                "must be an https:// URL: whoever can change the keys on their way can be anybody"
            )
        if not parts.hostname or parts.username is not None:
            raise ValueError("must be a URL with a host and without a user")
        return url

    @model_validator(mode="after")
    def _check(self) -> Settings:
        if (self.embeddings_url is None) != (self.embeddings_model is None):
            raise ValueError("EMBEDDINGS_URL and EMBEDDINGS_MODEL go together: set both or none")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError(f"{PREFIX}TLS_CERT and {PREFIX}TLS_KEY go together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError(f"{PREFIX}TLS_CLIENT_CA needs {PREFIX}TLS_CERT and {PREFIX}TLS_KEY")
        if self.auth == "jwt":
            self._check_jwt()
        elif self.jwt_key is not None or self.jwks_url is not None:
            raise ValueError(
                f"a key for tokens is set, and {PREFIX}AUTH=none would ignore them: set {PREFIX}AUTH=jwt"
            )
        elif self.tls_client_ca is None and not is_loopback(split_address(self.listen)[0]):
            raise ValueError(
                f"{PREFIX}LISTEN={self.listen} is not a loopback address, and {PREFIX}AUTH=none lets every caller act for "
                f"every user: listen on 127.0.0.1, set {PREFIX}AUTH=jwt, or turn mutual TLS on ({PREFIX}TLS_CLIENT_CA)"
            )
        return self

    def _check_jwt(self) -> None:
        if (self.jwt_key is None) == (self.jwks_url is None):
            raise ValueError(f"{PREFIX}AUTH=jwt needs one of {PREFIX}JWT_KEY and {PREFIX}JWKS_URL")
        if self.jwks_url is not None and not (self.jwt_issuer and self.jwt_audience):
            raise ValueError(
                f"{PREFIX}JWKS_URL needs {PREFIX}JWT_ISSUER and {PREFIX}JWT_AUDIENCE: the same keys sign tokens for others"
            )


class BadConfiguration(Exception):
    """The configuration is malformed: one line a problem, each with the name of its setting and without its value if that is secret."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def load() -> Settings:
    """Read the configuration.

    Raises:
        BadConfiguration: as its name says.
    """
    try:
        return Settings()
    except ValidationError as error:
        problems = [
            f"{_variable(str(each['loc'][0]))}: {_lower_first(each['msg'])}"
            if each["loc"]
            else each["msg"].removeprefix("Value error, ")
            for each in error.errors()
        ]
    except (OSError, UnicodeDecodeError) as error:
        problems = [f"{ENV_FILE} cannot be read: {error}"]
    raise BadConfiguration(problems) from None


def _lower_first(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _variable(field: str) -> str:
    """Return the environment variable of a field; an alias is one already."""
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


def _given() -> dict[str, str]:
    """Return every variable that is set, by name, and where: in the environment, or in the `.env` file."""
    from dotenv import dotenv_values  # noqa: PLC0415 - to explain the configuration, not to read it

    in_file = {name.upper(): ENV_FILE for name, value in dotenv_values(ENV_FILE).items() if value}
    return in_file | {
        name.upper(): "the environment" for name, value in os.environ.items() if value
    }


def sources() -> dict[str, str]:
    """Return the settings that are not left at their defaults, and where each is set."""
    given = _given()
    return {name: given[name] for name in _variables() if name in given}


def unknown() -> list[str]:
    """Return a line on each variable that looks like a setting and is none: a typing error would go unnoticed otherwise."""
    known = _variables()
    lines = []
    for name, source in _given().items():
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(
                name.removeprefix(PREFIX), [each.removeprefix(PREFIX) for each in known], 1
            )
            meant = next(
                (each for each in known if near and each.removeprefix(PREFIX) == near[0]), None
            )
            lines.append(
                f"{name} in {source} is no setting" + (f"; did you mean {meant}?" if meant else "")
            )
    return sorted(lines)


def split_address(address: str) -> tuple[str, int]:
    """Split `host:port` (an IPv6 host in brackets).

    Raises:
        ValueError: when it is not of that form.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > MAX_PORT:
        raise ValueError(f"{address!r} is not an address of the form host:port")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
