"""Message classes typed as Any, which accept a dict for a nested message or a Struct.

Protobuf accepts it, but its type stubs do not.
"""

from __future__ import annotations

from typing import Any

from chathistory.v1 import document_pb2, message_pb2, session_pb2, user_pb2

User: Any = user_pb2.User
Session: Any = session_pb2.Session
Message: Any = message_pb2.Message
Part: Any = message_pb2.Part
Document: Any = document_pb2.Document
