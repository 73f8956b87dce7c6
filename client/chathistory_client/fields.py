"""From Python's values to the messages of the contract."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, Final

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message as ProtoMessage
from google.protobuf.struct_pb2 import Struct

Metadata = Mapping[str, Any]
"""What JSON can hold; whole numbers come back as floats."""


class Unset(Enum):
    """The type of `UNSET`."""

    UNSET = "UNSET"

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset.UNSET
"""Leaves a field as it is. (None and "" clear it.)"""


def struct(values: Metadata | None) -> Struct | None:
    """Return metadata as the contract has it."""
    if values is None:
        return None
    made = Struct()
    made.update(values)
    return made


def set_fields(message: ProtoMessage, **values: Any) -> FieldMask:
    """Put values into a message, those that are not UNSET, and return the mask that names them."""
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
        raise ValueError(f"nothing to change: give at least one of {', '.join(values)}")
    return mask
