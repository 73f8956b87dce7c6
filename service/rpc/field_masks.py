"""Update masks: the fields that an update writes."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from service.errors import InvalidArgument

MAX_PATHS = 100
"""Paths of a mask. Resources have fewer fields."""
MAX_SHOWN_PATHS = 5
MAX_SHOWN_CHARS = 64
"""Bounds of the unknown paths that an error repeats."""


def update_paths(mask: FieldMask, resource: Message, writable: Sequence[str]) -> list[str]:
    """Return the fields to update: the mask's, or every writable field that is set if it is empty.

    Raises:
        InvalidArgument: the mask names a field that does not exist or is output-only.
    """
    if len(mask.paths) > MAX_PATHS:
        raise InvalidArgument.field("update_mask", f"must have at most {MAX_PATHS} paths")
    unknown = [path for path in mask.paths if path not in writable]
    if unknown:
        shown = ", ".join(repr(path[:MAX_SHOWN_CHARS]) for path in unknown[:MAX_SHOWN_PATHS])
        more_count = len(unknown) - MAX_SHOWN_PATHS
        suffix = f" and {more_count} more" if more_count > 0 else ""
        raise InvalidArgument.field(
            "update_mask", f"may name {', '.join(writable)}, but not {shown}{suffix}"
        )
    if mask.paths:
        return list(dict.fromkeys(mask.paths))
    present = {descriptor.name for descriptor, _ in resource.ListFields()}
    return [path for path in writable if path in present]
