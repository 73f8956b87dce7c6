"""All methods of the service, found by their names in `users`, `sessions` and `messages`."""

from __future__ import annotations

from service.rpc.messages import Messages
from service.rpc.sessions import Sessions
from service.rpc.users import Users
from service.store.append import Appender
from service.store.database import Database
from service.store.watch import WatchHub


class ChatHistoryServicer(Users, Sessions, Messages):
    """The methods of `chathistory.v1.ChatHistoryService`; each takes a request and its Call."""

    def __init__(self, database: Database, appender: Appender, watchers: WatchHub, call_timeout: float) -> None:
        self.database = database
        self.appender = appender
        self.watchers = watchers
        self.call_timeout = call_timeout
