"""The policy of every RPC: its callers, and what the audit trail records of it.

The pipeline looks a policy up once, when it wraps the method. Streaming RPCs are admitted as
streams, all others as calls; the service's descriptor decides which they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from typing import NamedTuple


class Access(Enum):
    """The callers that an RPC admits."""

    ANY_CALLER = auto()
    """Services for any user, and users for themselves."""
    SERVICE_ONLY = auto()
    """Services; a user is rejected whatever the request contains."""


class AuditRule(Enum):
    """Which calls of an RPC the audit trail records; the value is the line's `act`."""

    ACT = "act"
    """Calls of a service on behalf of a user, once an hour for each service, user and RPC."""
    ERASE = "erase"
    """Every call, with its outcome."""
    EXPORT = "export"
    """Every call, with its outcome."""


class MethodPolicy(NamedTuple):
    """The policy of one RPC."""

    access: Access
    audit: AuditRule
    is_write: bool = False
    """Whether it changes data. Its reply is sent even beyond the limits in bytes: the change is
    committed, and the caller of a rejected call would repeat it."""


POLICIES: Mapping[str, MethodPolicy] = {
    "CreateUser": MethodPolicy(Access.SERVICE_ONLY, AuditRule.ACT, is_write=True),
    "GetUser": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "ListUsers": MethodPolicy(Access.SERVICE_ONLY, AuditRule.ACT),
    "UpdateUser": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT, is_write=True),
    "DeleteUser": MethodPolicy(Access.SERVICE_ONLY, AuditRule.ERASE, is_write=True),
    "ExportUserData": MethodPolicy(Access.ANY_CALLER, AuditRule.EXPORT),
    "CreateSession": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT, is_write=True),
    "GetSession": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "ListSessions": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "UpdateSession": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT, is_write=True),
    "DeleteSession": MethodPolicy(Access.ANY_CALLER, AuditRule.ERASE, is_write=True),
    "ForkSession": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT, is_write=True),
    "AppendMessages": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT, is_write=True),
    "GetMessage": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "ListMessages": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "UpdateMessage": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT, is_write=True),
    "DeleteMessage": MethodPolicy(Access.ANY_CALLER, AuditRule.ERASE, is_write=True),
    "GetContext": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "WatchMessages": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "SearchMessages": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "CreateDocument": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT, is_write=True),
    "AppendDocumentChunks": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT, is_write=True),
    "ListDocumentChunks": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "GetDocument": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "ListDocuments": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "UpdateDocument": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT, is_write=True),
    "DeleteDocument": MethodPolicy(Access.ANY_CALLER, AuditRule.ERASE, is_write=True),
    "SearchDocuments": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "RebuildSearchIndex": MethodPolicy(Access.SERVICE_ONLY, AuditRule.ACT, is_write=True),
}
"""By RPC name. Building the pipeline fails when an RPC has no entry."""
