"""Generates docs/reference/api.md from the comments in protos/.

The comments are read from generated/chathistory.binpb. A comment becomes prose; a protovalidate
rule becomes words. A rule that has no words here yet fails the generation, so that no limit is
left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf import message_factory
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    OneofDescriptorProto,
    ServiceDescriptorProto,
)
from google.protobuf.descriptor_pool import DescriptorPool

from scripts.docs.page import REFERENCE, ROOT, formatted, table

NAME = "api.md"
DESCRIPTORS = ROOT / "generated" / "chathistory.binpb"
PACKAGE = "chathistory.v1"
HEAD = """# API

<!-- Generated from protos/ by `make format`: do not edit. -->

The protobuf package is `chathistory.v1` and its service is `ChatHistoryService`. The server also
answers `grpc.health.v1` and reflection. Generated Python stubs are in the distribution
`chathistory-stubs`, and the Python client is in `chathistory-client`.

## Conventions

- Times are set by the server. Ids are UUIDs in text form. An id that the client does not choose is
  a version 7 UUID.
- `user_id` names the owner. A user caller may leave it empty, which means the caller itself. A
  service caller sets it, unless the field's description says otherwise.
- A page of a list may be shorter than `page_size`, because a reply stops at 3 MiB. Only an empty
  `next_page_token` ends a list. A token is valid for the request that it came from.
- An update mask names writable fields. An empty mask means every field that is set. A path that is
  unknown or output only is a `FIELD_VIOLATION`.
- A request may have 4 MiB, one message or one list of chunks 1 MiB, and `metadata` 16 KiB, all
  serialised. The Structs of one message (`metadata` and `data` parts) may have 10,000 values
  together, those of one request 50,000, and each of them 32 levels.
- The metadata `read_consistency` of a read is `strong`, the default, or `eventual`. The reply may
  then lack the changes of the last seconds, because a replica of the database returns it.
  `ListSessions`, `ListDocuments`, `SearchMessages`, `SearchDocuments`, `ExportUserData`,
  `GetContext`, and `ListMessages` with a page token honour it; see
  [Use a read replica](../how-to/operations.md#use-a-read-replica). Another value is a
  `FIELD_VIOLATION` of `read_consistency`. A server without a replica does not look at the metadata
  of `GetContext` and `ListMessages`. All other calls ignore it.
- The limits in the tables are the protovalidate rules of the protos. A request that breaks one is
  rejected with `INVALID_ARGUMENT`, reason `FIELD_VIOLATION`, and one entry for each field.
- [Errors](errors.md) lists every reason.
"""

FILES = {
    "user": "Users",
    "session": "Sessions",
    "message": "Messages",
    "document": "Documents",
    "export": "Export",
    "search": "Search index",
}
"""Sections of the page, in order, by the proto file that defines the messages."""


_REASONS = frozenset(
    re.findall(r"^### ([A-Z_]+)$", (REFERENCE / "errors.md").read_text("utf-8"), re.MULTILINE)
)


class Section(NamedTuple):
    """One proto file and the comments in it, by path."""

    file: FileDescriptorProto
    comments: dict[tuple[int, ...], str]


def comments_of(file: FileDescriptorProto) -> dict[tuple[int, ...], str]:
    """Return the leading comments of a file, by the path of what they describe."""
    return {
        tuple(location.path): _escape(location.leading_comments)
        for location in file.source_code_info.location
        if location.leading_comments
    }


def _escape(comment: str) -> str:
    """Return a comment as Markdown, with links to the error reasons that it names.

    `<` and `>` outside of code are text, not HTML.
    """
    parts = comment.split("`")
    parts[::2] = [part.replace("<", "&lt;").replace(">", "&gt;") for part in parts[::2]]
    parts[1::2] = [
        f"[`{part}`](errors.md#{part.lower()})" if part in _REASONS else f"`{part}`"
        for part in parts[1::2]
    ]
    return "".join(parts)


def _summary(comment: str) -> str:
    """Return the first sentence of a comment."""
    return re.split(r"(?<=[.])\s", comment.strip(), maxsplit=1)[0]


def _paragraphs(comment: str) -> str:
    """Return a comment's lines without the space that follows `//`."""
    return "\n".join(line.removeprefix(" ").rstrip() for line in comment.splitlines()).strip()


class Rules:
    """Reads the protovalidate rules of fields."""

    def __init__(self, files: FileDescriptorSet) -> None:
        """Register buf/validate in a pool of its own, where the options are not unknown fields."""
        pool = DescriptorPool()
        for file in files.file:
            pool.Add(file)
        options = pool.FindMessageTypeByName("google.protobuf.FieldOptions")
        self._options = message_factory.GetMessageClass(options)
        self._field = pool.FindExtensionByName("buf.validate.field")
        options = pool.FindMessageTypeByName("google.protobuf.OneofOptions")
        self._oneof_options = message_factory.GetMessageClass(options)
        self._oneof = pool.FindExtensionByName("buf.validate.oneof")

    def is_required(self, oneof: OneofDescriptorProto) -> bool:
        """Whether one of the fields must be set."""
        options: Any = self._oneof_options.FromString(oneof.options.SerializeToString())
        return bool(options.Extensions[self._oneof].required)

    def of(self, field: FieldDescriptorProto) -> str:
        """Return a field's rules in words.

        Raises:
            KeyError: a rule has no words here.
        """
        options: Any = self._options.FromString(field.options.SerializeToString())
        if not options.HasExtension(self._field):
            return ""
        return ", ".join(_words(options.Extensions[self._field]))


def _words(rules: Any) -> Iterator[str]:
    may_be_empty = False
    for rule, value in rules.ListFields():
        if rule.name == "required":
            yield "required"
        elif rule.name == "ignore":
            may_be_empty = True
        elif rule.name == "repeated":
            for part, limit in value.ListFields():
                if part.name == "items":
                    yield f"each {', '.join(_words(limit))}"
                else:
                    yield _PHRASES[part.name](limit)
        else:
            for part, limit in value.ListFields():
                yield _PHRASES[part.name](limit)
    if may_be_empty:
        yield "or empty"


def _size(limit: int) -> str:
    return f"{limit // 1024} KiB" if limit % 1024 == 0 else f"{limit} bytes"


_PHRASES: dict[str, Callable[[Any], str]] = {
    "uuid": lambda _: "a UUID",
    "email": lambda _: "an e-mail address",
    "min_len": lambda limit: f"at least {limit} character{'s' * (limit > 1)}",
    "max_len": lambda limit: f"at most {limit} characters",
    "min_items": lambda limit: f"at least {limit} item{'s' * (limit > 1)}",
    "max_items": lambda limit: f"at most {limit} items",
    "max_bytes": lambda limit: f"at most {_size(limit)}",
    "not_contains": lambda text: "no NUL" if text == "\0" else f"no `{text}`",
    "pattern": lambda pattern: f"matches `{pattern}`",
    "gte": lambda limit: f"≥ {limit:g}",
    "lte": lambda limit: f"≤ {limit:g}",
    "finite": lambda _: "finite",
    "defined_only": lambda _: "a defined value",
}


class Page:
    """The whole page."""

    def __init__(self, files: FileDescriptorSet) -> None:
        self._rules = Rules(files)
        ours = [file for file in files.file if file.package == PACKAGE]
        by_name = {Path(file.name).stem: file for file in ours}
        if unsorted := set(by_name) ^ {*FILES, "chat_history_service"}:
            raise ValueError(f"FILES in {__file__} and protos/ differ in {sorted(unsorted)}")
        service_file = by_name["chat_history_service"]
        self._service: ServiceDescriptorProto = service_file.service[0]
        self._service_comments = comments_of(service_file)
        self._sections = {
            title: Section(by_name[name], comments_of(by_name[name]))
            for name, title in FILES.items()
        }

    def render(self) -> str:
        """Return the page."""
        return formatted("".join([HEAD, self._overview(), *map(self._section, self._sections)]))

    def _overview(self) -> str:
        rows = [
            (f"[`{method.name}`](#{method.name.lower()})", _summary(self._method_comment(index)))
            for index, method in enumerate(self._service.method)
        ]
        return "\n## Overview\n\n" + table(("RPC", "Purpose"), rows)

    def _method_comment(self, index: int) -> str:
        # 6: service in FileDescriptorProto; 2: method in ServiceDescriptorProto.
        return self._service_comments[6, 0, 2, index]

    def _section(self, title: str) -> str:
        file, comments = self._sections[title]
        requests = {message.name for message in file.message_type}
        methods = [
            (index, method)
            for index, method in enumerate(self._service.method)
            if method.input_type.rpartition(".")[2] in requests
        ]
        exchanged = {
            name.rpartition(".")[2]
            for _, method in methods
            for name in (method.input_type, method.output_type)
        }
        messages = {message.name: index for index, message in enumerate(file.message_type)}
        parts = [f"\n## {title}\n"]
        for index, method in methods:
            parts.append(f"\n### {method.name}\n\n")
            reply = "Response stream" if method.server_streaming else "Response"
            parts.append(f"- Request: {_link(method.input_type)}\n")
            parts.append(f"- {reply}: {_link(method.output_type)}\n\n")
            parts.append(_paragraphs(self._method_comment(index)) + "\n")
            for kind in (method.input_type, method.output_type):
                number = messages[kind.rpartition(".")[2]]
                message = file.message_type[number]
                parts.append(self._message("####", message, comments, (4, number)))
        for name, index in messages.items():
            if name not in exchanged:
                parts.append(self._message("###", file.message_type[index], comments, (4, index)))
        parts += [_enum(enum, comments, (5, index)) for index, enum in enumerate(file.enum_type)]
        return "".join(parts)

    def _message(
        self,
        level: str,
        message: DescriptorProto,
        comments: dict[tuple[int, ...], str],
        path: tuple[int, ...],
    ) -> str:
        text = f"\n{level} {message.name}\n\n{_paragraphs(comments[path])}\n"
        rows = []
        for index, field in enumerate(message.field):
            limits = self._rules.of(field)
            meaning = comments[*path, 2, index]
            if field.HasField("oneof_index") and not field.proto3_optional:
                oneof = message.oneof_decl[field.oneof_index].name
                meaning = f"One of `{oneof}`. {meaning}"
            rows.append((f"`{field.name}`", str(field.number), _type(field), limits, meaning))
        if rows:
            text += "\n" + table(("Field", "Number", "Type", "Limits", "Meaning"), rows)
        for index, choice in enumerate(message.oneof_decl):
            if (comment := comments.get((*path, 8, index))) is not None:
                count = "Exactly" if self._rules.is_required(choice) else "At most"
                words = f"`{choice.name}`: {comment} {count} one of these fields is set."
                text += f"\n{words}\n"
        return text


def _type(field: FieldDescriptorProto) -> str:
    name = (
        _link(field.type_name)
        if field.type_name
        else f"`{FieldDescriptorProto.Type.Name(field.type).removeprefix('TYPE_').lower()}`"
    )
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def _link(type_name: str) -> str:
    name = type_name.removeprefix(".")
    if not name.startswith(f"{PACKAGE}."):
        return f"`{name}`"
    short = name.removeprefix(f"{PACKAGE}.")
    return f"[`{short}`](#{short.lower()})"


def _enum(
    enum: EnumDescriptorProto, comments: dict[tuple[int, ...], str], path: tuple[int, ...]
) -> str:
    rows = [
        (f"`{value.name}`", str(value.number), comments[*path, 2, index])
        for index, value in enumerate(enum.value)
    ]
    return f"\n### {enum.name}\n\n{_paragraphs(comments[path])}\n\n" + table(
        ("Value", "Number", "Meaning"), rows
    )


def render() -> str:
    """Return the page."""
    return Page(FileDescriptorSet.FromString(DESCRIPTORS.read_bytes())).render()
