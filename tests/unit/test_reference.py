"""docs/reference/ describes everything that an operator or a client program can meet."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from chathistory.v1 import (
    chat_history_service_pb2,
    document_pb2,
    export_pb2,
    message_pb2,
    search_pb2,
    session_pb2,
    user_pb2,
)
from prometheus_client.parser import text_string_to_metric_families

from scripts.docs import api, cli, configuration
from scripts.docs.page import REFERENCE
from service import errors
from service.config import Settings
from service.rpc import status
from tests.support.chat import Chat
from tests.support.servers import connected, serving

SERVICE = Path(errors.__file__).parent

PROTO_MODULES = (document_pb2, export_pb2, message_pb2, search_pb2, session_pb2, user_pb2)


@pytest.mark.parametrize("generator", [api, cli, configuration])
def test_generated_page_is_current(generator: object) -> None:
    page = (REFERENCE / generator.NAME).read_text()  # type: ignore[attr-defined]
    assert page == generator.render(), "run make format"  # type: ignore[attr-defined]


def test_every_setting_is_in_the_reference() -> None:
    page = (REFERENCE / "configuration.md").read_text()
    missing = [
        name
        for field, info in Settings.model_fields.items()
        for name in configuration.variables(field, info)
        if f"`{name}`" not in page
    ]
    assert not missing


def test_every_rpc_message_field_and_enum_value_is_in_the_reference() -> None:
    page = (REFERENCE / "api.md").read_text()
    service = chat_history_service_pb2.DESCRIPTOR.services_by_name["ChatHistoryService"]
    missing = [method.name for method in service.methods if f"\n### {method.name}\n" not in page]
    for module in PROTO_MODULES:
        for name, message in module.DESCRIPTOR.message_types_by_name.items():
            _, heading, section = page.partition(f"# {name}\n")
            section = section.partition("\n#")[0]
            missing += [name] * (not heading)
            missing += [
                f"{name}.{field.name}"
                for field in message.fields
                if f"| `{field.name}` | {field.number} |" not in section
            ]
        for enum in module.DESCRIPTOR.enum_types_by_name.values():
            missing += [
                value.name
                for value in enum.values
                if f"| `{value.name}` | {value.number} |" not in page
            ]
    assert not missing, "run make format"


class Usage(NamedTuple):
    """A place in service/ that makes an error for a caller."""

    reason: str
    code: str
    metadata: frozenset[str]
    has_retry_delay: bool


class Documented(NamedTuple):
    """A section of errors.md."""

    code: str
    metadata: frozenset[str]
    retry_info: str


CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.ServiceError)
}
PLAIN_ARGUMENTS = {"reason", "retry_after", "violations"}
REASON = re.compile(r"[A-Z]+(_[A-Z]+)+")


def usages_in(path: Path) -> Iterator[Usage]:
    """Read a module's calls of the error classes; within errors.py also `cls(...)`."""
    tree = ast.parse(path.read_text())
    constants = {
        node.value
        for statement in tree.body
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        for node in ast.walk(statement)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    owner_of = {
        id(call): owner.name
        for owner in ast.walk(tree)
        if isinstance(owner, ast.ClassDef)
        for call in ast.walk(owner)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).removeprefix("errors.")
        name = owner_of.get(id(node), "") if name == "cls" else name
        if name not in CLASSES:
            continue
        arguments = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        reason = arguments.get("reason")
        code = status.CODES[CLASSES[name]].name
        metadata = frozenset(arguments.keys() - PLAIN_ARGUMENTS)
        if reason is None:
            reasons = {CLASSES[name].default_reason}
        elif isinstance(reason, ast.Constant):
            reasons = {str(reason.value)}
        elif name == owner_of.get(id(node)):
            continue  # Passes a parameter on.
        else:
            # From a table at the head of the module.
            reasons = set(filter(REASON.fullmatch, constants))
        for value in sorted(reasons):
            yield Usage(value, code, metadata, "retry_after" in arguments)


def documented_reasons() -> dict[str, Documented]:
    page = (REFERENCE / "errors.md").read_text()
    sections = re.findall(
        r"^### ([A-Z_]+)\n\n\|.*\n\|.*\n\| `(\w+)` \| (.*?) \| (.*?) \|$", page, re.MULTILINE
    )
    return {
        reason: Documented(code, frozenset(re.findall(r"`(\w+)`", metadata)), retry_info)
        for reason, code, metadata, retry_info in sections
    }


def test_every_error_reason_is_in_the_reference_with_its_code_and_metadata() -> None:
    used: dict[str, list[Usage]] = {}
    for path in sorted(SERVICE.rglob("*.py")):
        for usage in usages_in(path):
            used.setdefault(usage.reason, []).append(usage)
    documented = documented_reasons()
    assert sorted(documented) == sorted(used)
    for reason, usages in used.items():
        entry = documented[reason]
        assert {usage.code for usage in usages} == {entry.code}, reason
        assert frozenset().union(*(usage.metadata for usage in usages)) == entry.metadata, reason
        delays = {usage.has_retry_delay for usage in usages}
        expected = {True: "yes", False: "no"}[True in delays]
        assert entry.retry_info.partition(",")[0] == expected, reason
        assert (len(delays) == 2) == ("," in entry.retry_info), reason


class Event(NamedTuple):
    """A log line that service/ writes."""

    level: str
    fields: frozenset[str]


LEVELS = {"debug", "info", "warning", "error"}
# structlog reads it; the line has no such field.
NO_FIELD = "exc_info"


def logged_events() -> dict[str, Event]:
    """Read every call of a module's logger with a constant event."""
    events: dict[str, Event] = {}
    for path in sorted(SERVICE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in LEVELS
                and ast.unparse(node.func.value).rpartition(".")[2] in ("_log", "log")
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                fields = frozenset(keyword.arg or "**" for keyword in node.keywords)
                events[str(node.args[0].value)] = Event(node.func.attr, fields - {NO_FIELD})
    return events


def test_every_log_event_is_in_the_reference_with_its_level_and_fields() -> None:
    page = (REFERENCE / "logs.md").read_text().partition("## Events")[2].partition("\n## ")[0]
    documented = {
        event: Event(level, frozenset(re.findall(r"`(\w+)`", fields)))
        for event, level, fields in re.findall(
            r"^\| `([^`|]+)` \| (\w+) \| ([^|]*) \|", page, re.MULTILINE
        )
    }
    assert documented == logged_events()


def test_every_field_of_the_audit_trail_is_in_the_reference() -> None:
    page = (REFERENCE / "logs.md").read_text().partition("## Audit events")[2]
    fields = {
        keyword.arg
        for path in SERVICE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "audit"
        for keyword in node.keywords
        if keyword.arg
    }
    assert {"act", "method", "outcome", "caller"} <= fields
    assert not [field for field in fields if f"`{field}`" not in page]


async def test_every_metric_is_in_the_reference_with_its_type_and_labels(
    database_url: str,
) -> None:
    async with (
        serving(database_url, metrics_listen="127.0.0.1:0") as server,
        connected(server.address) as stub,
    ):
        await Chat.of_new_user(stub)
        assert server.metrics is not None
        address = f"http://127.0.0.1:{server.metrics.port}/metrics"
        async with httpx.AsyncClient(trust_env=False) as client:
            text = (await client.get(address)).text
    exposed: dict[str, tuple[str, frozenset[str]]] = {}
    for family in text_string_to_metric_families(text):
        if family.name.endswith("_created"):
            continue  # The time at which a counter was created, which the text format cannot carry.
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        exposed[name] = (family.type, frozenset(labels))
    page = (REFERENCE / "metrics.md").read_text()
    documented = {
        name: (kind, frozenset(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in re.findall(
            r"^\| `(\w+)` \| (counter|gauge|histogram) \| ([^|]*) \|", page, re.MULTILINE
        )
    }
    assert documented == exposed
