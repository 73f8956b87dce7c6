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


POLICIES: Mapping[str, MethodPolicy] = {
    "CreateUser": MethodPolicy(Access.SERVICE_ONLY, AuditRule.ACT),
    "GetUser": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "ListUsers": MethodPolicy(Access.SERVICE_ONLY, AuditRule.ACT),
    "UpdateUser": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "DeleteUser": MethodPolicy(Access.SERVICE_ONLY, AuditRule.ERASE),
    "ExportUserData": MethodPolicy(Access.ANY_CALLER, AuditRule.EXPORT),
    "CreateSession": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "GetSession": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "ListSessions": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "UpdateSession": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "DeleteSession": MethodPolicy(Access.ANY_CALLER, AuditRule.ERASE),
    "ForkSession": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "AppendMessages": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "GetMessage": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "ListMessages": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "UpdateMessage": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "DeleteMessage": MethodPolicy(Access.ANY_CALLER, AuditRule.ERASE),
    "GetContext": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "WatchMessages": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "SearchMessages": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "CreateDocument": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "AppendDocumentChunks": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "ListDocumentChunks": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "GetDocument": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "ListDocuments": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "UpdateDocument": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "DeleteDocument": MethodPolicy(Access.ANY_CALLER, AuditRule.ERASE),
    "SearchDocuments": MethodPolicy(Access.ANY_CALLER, AuditRule.ACT),
    "RebuildSearchIndex": MethodPolicy(Access.SERVICE_ONLY, AuditRule.ACT),
}
"""By RPC name. Building the pipeline fails when an RPC has no entry."""
