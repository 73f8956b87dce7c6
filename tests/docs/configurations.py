"""Checks what the documentation shows of configuration files: their syntax, and what they name."""

from __future__ import annotations

import configparser
import io
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from typing import Any

import yaml  # type: ignore[import-untyped]
from dotenv import dotenv_values
from pydantic import AliasChoices

from service.config import PREFIX, Settings

_OURS = re.compile(r"\b(?:CHAT_HISTORY|QDRANT|EMBEDDINGS)_[A-Z0-9_]*[A-Z0-9]\b")
# Variables of the command line and of the examples that are no settings of the service.
_OTHERS = {"CHAT_HISTORY_TOKEN"}
_KINDS = {
    "ConfigMap", "CronJob", "Deployment", "Job", "NetworkPolicy", "Pod", "PodDisruptionBudget",
    "Secret", "Service", "ServiceAccount", "ServiceMonitor",
}  # fmt: skip
_PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
_PROBE_ACTIONS = {"exec", "grpc", "httpGet", "tcpSocket"}


def settings() -> set[str]:
    """Return the environment variables that are settings of the service."""
    names: set[str] = set()
    for field, info in Settings.model_fields.items():
        alias = info.validation_alias
        if isinstance(alias, AliasChoices):
            names |= {str(choice) for choice in alias.choices}
        else:
            names.add(PREFIX + field.upper())
    return names


def unknown_settings(text: str) -> set[str]:
    """Return what looks like a setting in a text and is none."""
    return set(_OURS.findall(text)) - settings() - _OTHERS


def _check_yaml(code: str, location: str) -> None:
    for document in yaml.safe_load_all(code):
        if isinstance(document, dict) and "kind" in document:
            _check_manifest(document, location)
        for variable in _mappings(document, "env"):
            assert "name" in variable, f"{location}: an environment variable without a name"
            assert ("value" in variable) != ("valueFrom" in variable), (
                f"{location}: {variable['name']} needs one of value and valueFrom"
            )
            assert isinstance(variable.get("value", ""), str), (
                f"{location}: the value of {variable['name']} must be a string: quote it"
            )


def _check_manifest(manifest: dict[str, Any], location: str) -> None:
    """Check what Kubernetes would reject first."""
    kind = manifest["kind"]
    assert kind in _KINDS, f"{location}: the harness does not know the kind {kind}"
    assert isinstance(manifest.get("apiVersion"), str), f"{location}: no apiVersion"
    assert manifest.get("metadata", {}).get("name"), f"{location}: no metadata.name"
    if kind == "Deployment":
        selector = manifest["spec"]["selector"]["matchLabels"]
        labels = manifest["spec"]["template"]["metadata"]["labels"]
        assert selector.items() <= labels.items(), f"{location}: the selector matches no pod"
    for container in _mappings(manifest, "containers"):
        assert {"name", "image"} <= container.keys(), f"{location}: a container lacks its image"
        for probe in (container[name] for name in _PROBES if name in container):
            assert len(probe.keys() & _PROBE_ACTIONS) == 1, f"{location}: one action a probe"
            if "grpc" in probe:
                assert isinstance(probe["grpc"]["port"], int), f"{location}: a number as port"


def _mappings(value: Any, key: str) -> Iterator[dict[str, Any]]:
    """Yield the mappings in every list that is stored under a key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == key and isinstance(inner, list):
                yield from inner
            yield from _mappings(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _mappings(inner, key)


def _check_json(code: str, _location: str) -> None:
    json.loads(code)


def _check_json_lines(code: str, _location: str) -> None:
    for line in code.splitlines():
        json.loads(line)


def _check_toml(code: str, _location: str) -> None:
    tomllib.loads(code)


def _check_ini(code: str, _location: str) -> None:
    configparser.ConfigParser(strict=True).read_string(code)


def _check_env(code: str, location: str) -> None:
    for name, value in dotenv_values(stream=io.StringIO(code)).items():
        assert value is not None, f"{location}: {name} has no value"


CHECKS: dict[str, Callable[[str, str], None]] = {
    "env": _check_env,
    "ini": _check_ini,
    "json": _check_json,
    "jsonl": _check_json_lines,
    "toml": _check_toml,
    "yaml": _check_yaml,
}
"""The check of each language; it raises what the parser raises, or AssertionError."""
