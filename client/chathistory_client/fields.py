"""Conversion of Python values to the fields of API messages."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, Final

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message as ProtoMessage
from google.protobuf.struct_pb2 import Struct

Metadata = Mapping[str, Any]
"""A JSON object. Whole numbers are returned as floats."""


class Unset(Enum):
    """Type of `UNSET`."""

    UNSET = "UNSET"

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset.UNSET
"""Default of update arguments: the field keeps its value. None and "" clear a field."""


def struct(values: Metadata | None) -> Struct | None:
    """Return metadata as a protobuf Struct, None for None."""
    if values is None:
        return None
    result = Struct()
    result.update(values)
    return result


def set_fields(message: ProtoMessage, **values: Any) -> FieldMask:
    """Set the fields of a message that are not `UNSET`, and return the update mask that names them.

    Args:
        message: The message to modify.
        values: Values by field name. None clears a field.

    Raises:
        ValueError: All values are `UNSET`.
    """
    mask = FieldMask()
    for name, value in values.items():
        if value is UNSET:
            continue
        mask.paths.append(name)
        if value is None:
            continue
        if isinstance(value, Mapping):
            getattr(message, name).update(value)
        elif isinstance(value, ProtoMessage):
            getattr(message, name).CopyFrom(value)
        elif isinstance(value, list | tuple):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    if not mask.paths:
        raise ValueError(f"no field to update: pass at least one of {', '.join(values)}")
    return mask
