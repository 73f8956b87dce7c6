"""Generates docs/reference/configuration.md from the settings class in service/config.py."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import AliasChoices, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from scripts.docs.page import formatted, table
from service import config

NAME = "configuration.md"
HEAD = """# Configuration

<!-- Generated from service/config.py by `make format`: do not edit. -->

The service reads its configuration once, at start, from the environment and from a `.env` file
in the working directory. The environment takes precedence, and an empty value counts as unset. A
malformed value, or two values that contradict each other, stop the start: the service prints one
line for each problem and exits with code 2.

[`chat-history check`](cli.md#chat-history-check) shows which settings are in force, where each
was set, and which variables look like a setting but are none.
"""

TOPICS = {
    "Addresses and data": ("listen", "health_listen", "metrics_listen", "data_dir"),
    "PostgreSQL": (
        "database_url",
        "database_url_file",
        "database_password_file",
        "database_read_url",
        "database_read_url_file",
        "read_max_lag",
        "db_pool_size",
        "db_max_overflow",
        "db_pool_timeout",
        "db_pool_recycle",
        "db_connect_timeout",
        "db_schema",
        "db_prepared_statements",
        "db_synchronous_commit",
        "append_lanes",
        "read_connections",
    ),
    "Search": (
        "search",
        "index_messages",
        "index_max_points",
        "search_timeout",
        "qdrant_url",
        "qdrant_api_key",
        "qdrant_transport",
        "qdrant_grpc_port",
        "qdrant_collection",
        "embeddings_url",
        "embeddings_model",
        "embeddings_api_key",
        "embeddings_dimensions",
    ),
    "Identity of callers": (
        "auth",
        "jwt_key",
        "jwks_url",
        "jwks_ca",
        "jwks_token_file",
        "jwt_issuer",
        "jwt_audience",
        "jwt_subject",
        "jwt_service_subjects",
        "page_token_key",
    ),
    "TLS": ("tls_cert", "tls_key", "tls_client_ca"),
    "Limits and shutdown": (
        "call_timeout",
        "max_in_flight",
        "max_watches",
        "max_calls_per_connection",
        "max_connections",
        "max_bytes_in_flight",
        "max_bytes_per_user",
        "max_bytes_per_connection",
        "shutdown_grace",
        "shutdown_delay",
    ),
    "Logs": ("log_level", "log_format"),
}
"""Every setting, by the section of the page that shows it."""


def variables(field: str, info: FieldInfo) -> list[str]:
    """Return the environment variables that set a field."""
    alias = info.validation_alias
    if isinstance(alias, AliasChoices):
        return [str(choice) for choice in alias.choices]
    return [config.PREFIX + field.upper()]


def meanings() -> dict[str, str]:
    """Return each setting's docstring, by its field's name."""
    [body] = (
        node.body
        for node in ast.parse(inspect.getsource(config.Settings)).body
        if isinstance(node, ast.ClassDef)
    )
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def type_of(info: FieldInfo) -> str:
    """Return a setting's type and bounds in words."""
    annotation: Any = info.annotation
    if get_origin(annotation) in (Union, UnionType):
        [annotation] = [kind for kind in get_args(annotation) if kind is not type(None)]
    constraints = [*info.metadata]
    while hasattr(annotation, "__metadata__"):
        constraints += annotation.__metadata__
        annotation = annotation.__origin__
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    words = {int: "integer", float: "number", bool: "boolean", Path: "path", SecretStr: "secret"}
    bounds = [
        f"{sign} {value:.12g}"
        for constraint in constraints
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
        if (value := getattr(constraint, name, None)) is not None
    ]
    bounds += [
        f"matches `{pattern}`"
        for constraint in constraints
        if (pattern := getattr(constraint, "pattern", None)) is not None
    ]
    return ", ".join([words.get(annotation, "string"), *bounds])


def default_of(info: FieldInfo) -> str:
    """Return a setting's default, as one would write it into the environment."""
    if info.default in (None, "", PydanticUndefined):
        return ""
    return f"`{str(info.default).lower() if info.default in (True, False) else info.default}`"


def _with_variables(text: str) -> str:
    """Return a docstring with the names of fields replaced by those of their variables."""

    def variable(match: re.Match[str]) -> str:
        info = config.Settings.model_fields.get(match[1])
        return f"`{variables(match[1], info)[0]}`" if info else match[0]

    return re.sub(r"`(\w+)`", variable, text)


def render() -> str:
    """Return the page.

    Raises:
        ValueError: TOPICS lacks a setting or names one that does not exist.
    """
    fields, texts = config.Settings.model_fields, meanings()
    if unsorted := set(fields) ^ {field for names in TOPICS.values() for field in names}:
        raise ValueError(f"TOPICS in {__file__} and the settings differ in {sorted(unsorted)}")
    sections = [
        f"\n## {topic}\n\n"
        + table(
            ("Variable", "Type", "Default", "Meaning"),
            (
                (
                    " or ".join(f"`{name}`" for name in variables(field, fields[field])),
                    type_of(fields[field]),
                    default_of(fields[field]),
                    _with_variables(texts[field]),
                )
                for field in names
            ),
        )
        for topic, names in TOPICS.items()
    ]
    return formatted(HEAD + "".join(sections))
