"""Update masks: the fields that an update writes."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from service.errors import FieldViolation, InvalidArgument


def update_paths(mask: FieldMask, resource: Message, writable: Sequence[str]) -> list[str]:
    """Return the fields to update: the mask's, or every writable field that is set if it is empty.

    Raises:
        InvalidArgument: the mask names a field that does not exist or is output-only.
    """
    unknown = [path for path in mask.paths if path not in writable]
    if unknown:
        allowed = ", ".join(writable)
        raise InvalidArgument.fields(
            tuple(
                FieldViolation("update_mask", f"{path[:64]!r} is not one of {allowed}")
                for path in unknown
            )
        )
    if mask.paths:
        return list(dict.fromkeys(mask.paths))
    present = {descriptor.name for descriptor, _ in resource.ListFields()}
    return [path for path in writable if path in present]
