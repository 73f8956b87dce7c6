"""All methods of the service, found by their names in the modules beside this one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chathistory.v1 import chat_history_service_pb2

from service.rpc.documents import Documents
from service.rpc.export import Exports
from service.rpc.messages import Messages
from service.rpc.search import Searches
from service.rpc.sessions import Sessions
from service.rpc.users import Users
from service.store.append.appender import Appender
from service.store.db.database import Database
from service.store.db.read_batching import ReadBatcher
from service.store.watch import WatchHub

if TYPE_CHECKING:
    from service.search.service import Search


DESCRIPTOR = chat_history_service_pb2.DESCRIPTOR.services_by_name["ChatHistoryService"]
"""What the protos say of the service."""


class ChatHistoryServicer(Users, Sessions, Messages, Exports, Documents, Searches):
    """The methods of `chathistory.v1.ChatHistoryService`; each takes a request and its Call."""

    def __init__(
        self,
        database: Database,
        appender: Appender,
        watchers: WatchHub,
        call_timeout: float,
        search: Search | None = None,
    ) -> None:
        self.database = database
        self.reads = ReadBatcher(database)
        self.appender = appender
        self.watchers = watchers
        self.call_timeout = call_timeout
        self.search = search
