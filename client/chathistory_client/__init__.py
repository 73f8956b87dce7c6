"""Async client of the ChatHistory service (`chathistory.v1`).

>>> async with ChatHistoryClient(address) as client:
...     user = await client.create_user(name="Ada")
...     reply = await client.append_messages(
...         user_id=user.id, messages=[message("user", "Hello!")]
...     )
...     context = await client.get_context(user_id=user.id, session_id=reply.session_id)
...     [item.content for item in context.messages]
['Hello!']
"""

from chathistory.v1.document_pb2 import (
    Document,
    DocumentChunk,
    DocumentHit,
    DocumentScope,
    DocumentStatus,
)
from chathistory.v1.message_pb2 import (
    Citation,
    Feedback,
    File,
    Message,
    MessageHit,
    MessageOrder,
    Part,
    Role,
    SearchMode,
    ToolCall,
    ToolResult,
)
from chathistory.v1.session_pb2 import Session, SessionState
from chathistory.v1.user_pb2 import User

from chathistory_client._version import __version__
from chathistory_client.channels import Tls
from chathistory_client.client import ChatHistoryClient
from chathistory_client.connection import ReadConsistency
from chathistory_client.errors import (
    AlreadyExists,
    ChatHistoryError,
    Conflict,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    Internal,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from chathistory_client.fields import UNSET
from chathistory_client.health import HealthStatus
from chathistory_client.ids import new_id
from chathistory_client.messages import message
from chathistory_client.tracing import trace_context

__all__ = [
    "UNSET",
    "AlreadyExists",
    "ChatHistoryClient",
    "ChatHistoryError",
    "Citation",
    "Conflict",
    "DeadlineExceeded",
    "Document",
    "DocumentChunk",
    "DocumentHit",
    "DocumentScope",
    "DocumentStatus",
    "FailedPrecondition",
    "Feedback",
    "FieldViolation",
    "File",
    "HealthStatus",
    "Internal",
    "InvalidArgument",
    "Message",
    "MessageHit",
    "MessageOrder",
    "NotFound",
    "OutOfRange",
    "Overloaded",
    "Part",
    "PermissionDenied",
    "ReadConsistency",
    "Role",
    "SearchMode",
    "Session",
    "SessionState",
    "Tls",
    "ToolCall",
    "ToolResult",
    "Unauthenticated",
    "Unavailable",
    "User",
    "__version__",
    "message",
    "new_id",
    "trace_context",
]
