"""The servicer of `chathistory.v1.ChatHistoryService`: the RPCs of all handlers in one object."""

from __future__ import annotations

from chathistory.v1 import chat_history_service_pb2

from service.rpc.documents import Documents
from service.rpc.export import Exports
from service.rpc.messages import Messages
from service.rpc.search import Searches
from service.rpc.sessions import Sessions
from service.rpc.users import Users

DESCRIPTOR = chat_history_service_pb2.DESCRIPTOR.services_by_name["ChatHistoryService"]
"""The service as the protos define it."""


class ChatHistoryServicer(Users, Sessions, Messages, Exports, Documents, Searches):
    """All RPCs. Each takes a request that the pipeline has checked, and its `Call`."""
