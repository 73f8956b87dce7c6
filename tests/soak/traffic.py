"""Clients of all kinds: they append, send again, read, follow, change and erase, give up and cancel, and write down what they were told."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from chathistory.v1 import message_pb2, session_pb2, user_pb2
from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceStub
from grpc import StatusCode, aio

from chathistory_client import ChatHistoryClient, ChatHistoryError
from tests.soak.stack import Replica, Stack
from tests.soak.tally import OWN, Tally
from tests.support.chat import new_id
from tests.support.clients import client_of
from tests.support.load import RETRYABLE_CODES, fast_reconnect_options
from tests.support.record import (
    Erasure,
    Record,
    SeenMessage,
    Sent,
    new_marked_message,
    seen_message,
)
from tests.support.servers import AsyncStub, channel

USERS = 12
SESSIONS = 24
WORKERS = 20
TALKERS = 4
"""Users of the client library, each with a session of its own and a follower of it."""
CALL_SECONDS = 5.0
CARRY_ON_SECONDS = 30.0
"""How long an append is still sent again when a round is over."""
INSIST_SECONDS = 90.0
CROWD = 20
"""Calls that are made at once and cancelled."""
KEPT = 30
"""Requests of a session that may be sent again."""


@dataclass
class Talk:
    """A session that is written to."""

    record: Record
    requests: list[tuple[Sent, message_pb2.AppendMessagesRequest]] = field(default_factory=list)
    """The newest of those that were acknowledged."""


class Gone(Exception):
    """A call failed, which is counted."""


class Hopeless(Exception):
    """The soak cannot go on, which is noted as a problem."""


class Traffic:
    """One round of it: users and sessions of its own."""

    def __init__(self, stack: Stack, tally: Tally, seed: str) -> None:
        self._stack = stack
        self._tally = tally
        self._chance = random.Random(seed)
        self._stubs: dict[str, AsyncStub] = {}
        self._users: list[str] = []
        self.talks: list[Talk] = []
        self._there: list[Talk] = []
        """Those whose sessions are known to be there."""
        self._stopping = False
        self._stop_at = float("inf")
        self._actions: dict[Callable[[Talk], Awaitable[None]], int] = {
            self._append: 34, self._append_many: 6, self._append_expecting: 6, self._send_again: 8, self._append_mixed: 4,
            self._start: 1, self._context: 12, self._newest: 8, self._walk: 4, self._session: 4, self._sessions: 2,
            self._rename: 2, self._edit: 4, self._erase: 2, self._watch: 2, self._start_twin: 1, self._trespass: 3,
            self._leave: 1, self._read_twice: 3,
        }  # fmt: skip

    @property
    def records(self) -> list[Record]:
        """What was done, a session each."""
        return [talk.record for talk in self.talks]

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Call all the time during a block; at its end let everybody finish."""
        async with AsyncExitStack() as exits:
            for replica in self._stack.replicas:
                opened = await exits.enter_async_context(
                    channel(replica.front.address, **fast_reconnect_options())
                )
                self._stubs[replica.name] = ChatHistoryServiceStub(opened)
            target = "ipv4:" + ",".join(replica.front.address for replica in self._stack.replicas)
            library = await exits.enter_async_context(client_of(target))
            self._users = [await self._new_user() for _ in range(USERS)]
            for _ in range(SESSIONS):
                await self._start(None)
            async with asyncio.TaskGroup() as group:
                for _ in range(WORKERS):
                    group.create_task(self._work())
                for _ in range(TALKERS):
                    group.create_task(self._talk(library))
                yield
                self._stop_at = time.monotonic() + CARRY_ON_SECONDS
                self._stopping = True

    async def erase(self) -> None:
        """Delete the users, and all that is theirs."""
        async with AsyncExitStack() as exits:
            for replica in self._stack.replicas:
                opened = await exits.enter_async_context(
                    channel(replica.front.address, **fast_reconnect_options())
                )
                self._stubs[replica.name] = ChatHistoryServiceStub(opened)
            for user_id in self._users:
                request = user_pb2.DeleteUserRequest(user_id=user_id, allow_missing=True)
                await self._insist("DeleteUser", request, timeout=60.0)

    # --- Calls.

    async def _call(
        self,
        rpc: str,
        request: Any,
        *,
        timeout: float = CALL_SECONDS,
        whole: bool = False,
        refused: str = "",
    ) -> Any:
        """Make one call to some replica; now and then with little time, or cancelled by its caller, unless it is to be whole.

        `refused` is the reason with which it may be refused, beside those for which it is tried again.

        Raises:
            Gone: it failed.
        """
        tally = self._tally
        replica = self._chance.choice(self._stack.replicas)
        tally.calls[rpc] += 1
        whim = 1.0 if whole else self._chance.random()
        if whim < 0.04:
            timeout = self._chance.uniform(0.001, 0.1)
        call = getattr(self._stubs[replica.name], rpc)(request, timeout=timeout)
        if 0.04 <= whim < 0.08:
            asyncio.get_running_loop().call_later(self._chance.uniform(0, 0.05), call.cancel)
        try:
            reply = await call
        except aio.AioRpcError as error:
            reason = tally.failure(rpc, error)
            if error.code() not in RETRYABLE_CODES and reason != refused:
                tally.blame("ERROR", f"{rpc}: {error.code().name} {reason} {error.details()}")
            raise Gone(reason) from None
        except asyncio.CancelledError:
            if (
                not call.cancelled()
                or (task := asyncio.current_task()) is None
                or task.cancelling()
            ):
                raise
            tally.cancelled += 1
            raise Gone("cancelled") from None
        if rpc == "AppendMessages":
            tally.last_acknowledged[replica.name] = time.monotonic()
        return reply

    async def _insist(self, rpc: str, request: Any, timeout: float = CALL_SECONDS) -> Any:
        """Make a call without which nothing goes on.

        Raises:
            Hopeless: it was tried for longer than any fault takes.
        """
        give_up = time.monotonic() + INSIST_SECONDS
        while True:
            with suppress(Gone):
                return await self._call(rpc, request, timeout=timeout, whole=True)
            if time.monotonic() > give_up:
                self._tally.blame("STUCK", f"{rpc} did not succeed in {INSIST_SECONDS:.0f} s")
                raise Hopeless
            await asyncio.sleep(self._chance.uniform(0.05, 0.3))

    async def _work(self) -> None:
        actions, weights = list(self._actions), list(self._actions.values())
        while not self._stopping:
            [action] = self._chance.choices(actions, weights)
            try:
                await action(self._chance.choice(self._there))
            except Gone:
                await asyncio.sleep(self._chance.uniform(0.02, 0.3))

    async def _new_user(self) -> str:
        user_id = new_id()
        await self._insist(
            "CreateUser",
            user_pb2.CreateUserRequest(user=user_pb2.User(id=user_id, name="somebody")),
        )
        return user_id

    # --- Writing.

    async def _deliver(
        self,
        talk: Talk,
        request: message_pb2.AppendMessagesRequest,
        *,
        new: Sequence[message_pb2.Message],
        whole: bool = False,
    ) -> message_pb2.AppendMessagesResponse | None:
        """Send new messages until they are acknowledged, and return the answer; or give up, and nobody will ever know."""
        sent = talk.record.send(new)
        while True:
            try:
                reply: message_pb2.AppendMessagesResponse = await self._call(
                    "AppendMessages", request, whole=whole
                )
            except Gone as failure:
                if failure.args[0] == "LAST_SEQ_MISMATCH":
                    return None  # Whether an earlier try was stored nobody knows.
                if (not whole and self._chance.random() < 0.05) or time.monotonic() > self._stop_at:
                    self._tally.abandoned += 1
                    return None
                await asyncio.sleep(self._chance.uniform(0.01, 0.2))
            else:
                sent.acknowledge(reply)
                self._tally.acknowledged += len(new)
                talk.requests.append((sent, request))
                del talk.requests[:-KEPT]
                return reply

    def _request(
        self, talk: Talk, messages: Sequence[message_pb2.Message], **fields: Any
    ) -> message_pb2.AppendMessagesRequest:
        record = talk.record
        return message_pb2.AppendMessagesRequest(
            user_id=record.user_id, session_id=record.session_id, messages=messages, **fields
        )

    def _messages(self, least: int, most: int) -> list[message_pb2.Message]:
        return [
            new_marked_message(self._chance.randint(40, 600))
            for _ in range(self._chance.randint(least, most))
        ]

    async def _append(self, talk: Talk) -> None:
        messages = self._messages(1, 3)
        await self._deliver(talk, self._request(talk, messages), new=messages)

    async def _append_many(self, talk: Talk) -> None:
        messages = self._messages(10, 100)
        await self._deliver(talk, self._request(talk, messages), new=messages)

    async def _append_expecting(self, talk: Talk) -> None:
        messages = self._messages(1, 2)
        expected = talk.record.last_seq
        await self._deliver(
            talk, self._request(talk, messages, expected_last_seq=expected), new=messages
        )

    async def _append_mixed(self, talk: Talk) -> None:
        """Messages that are stored already and new ones, in one request."""
        found = [(old, request) for old, request in talk.requests if len(old.ids) <= 50]
        if found:
            old, request = self._chance.choice(found)
            known = [message for message in request.messages if message.id in old.ids]
            new = self._messages(1, 3)
            reply = await self._deliver(talk, self._request(talk, [*known, *new]), new=new)
            if reply is not None:
                old.acknowledge(reply)

    async def _send_again(self, talk: Talk) -> None:
        if not talk.requests:
            return
        sent, request = self._chance.choice(talk.requests)
        reply = await self._call("AppendMessages", request)
        self._tally.replays += len(reply.messages)
        sent.acknowledge(reply)
        if not all(entry.replayed for entry in reply.messages):
            self._tally.blame(
                "DOUBLED",
                f"session {talk.record.session_id}: a retry was taken for new: {sent.ids}",
            )

    async def _start(self, _talk: Talk | None) -> None:
        """Start a session: by its first append, with an id or without, or beforehand."""
        user_id = self._chance.choice(self._users)
        messages = self._messages(1, 3)
        way = self._chance.choice(["id of the server's", "id of ours", "beforehand"])
        session_id = (
            new_id()
            if way != "id of the server's"
            else str(uuid.uuid5(uuid.UUID(user_id), messages[0].id))
        )
        talk = Talk(Record(user_id, session_id))
        request = self._request(talk, messages, create_if_missing=way == "id of ours")
        if way == "id of the server's":
            request.session_id = ""
        elif way == "beforehand":
            session = session_pb2.Session(id=session_id)
            await self._insist(
                "CreateSession", session_pb2.CreateSessionRequest(user_id=user_id, session=session)
            )
        self.talks.append(talk)
        if await self._deliver(talk, request, new=messages, whole=True) is not None:
            self._there.append(talk)

    async def _start_twin(self, talk: Talk) -> None:
        """Start a session with the id of another user's, and with the same messages: ids are unique per user only."""
        user_id, found = self._chance.choice(self._users), [request for _, request in talk.requests]
        if found and not self._has(user_id, talk.record.session_id):
            twin = Talk(Record(user_id, talk.record.session_id))
            self.talks.append(twin)
            messages = list(found[0].messages)
            request = self._request(twin, messages, create_if_missing=True)
            if await self._deliver(twin, request, new=messages, whole=True) is not None:
                self._there.append(twin)

    def _has(self, user_id: str, session_id: str) -> bool:
        """Whether the user has such a session, or may soon have."""
        return any(
            talk.record.user_id == user_id and talk.record.session_id == session_id
            for talk in self.talks
        )

    async def _trespass(self, talk: Talk) -> None:
        """Ask for another user's session: it must be as if there were none."""
        user_id, session_id = self._chance.choice(self._users), talk.record.session_id
        if self._has(user_id, session_id):
            return
        name = Record(user_id, session_id).name
        session = session_pb2.Session(id=session_id, title="not mine")
        calls: dict[str, Any] = {
            "GetSession": session_pb2.GetSessionRequest(**name),
            "UpdateSession": session_pb2.UpdateSessionRequest(user_id=user_id, session=session),
            "ListMessages": message_pb2.ListMessagesRequest(**name),
            "GetContext": message_pb2.GetContextRequest(**name),
            "AppendMessages": message_pb2.AppendMessagesRequest(
                messages=self._messages(1, 2), **name
            ),
        }
        rpc, request = self._chance.choice(list(calls.items()))
        try:
            await self._call(rpc, request, refused="SESSION_NOT_FOUND")
        except Gone:
            return
        if not self._has(user_id, session_id):
            self._tally.blame(
                "FOREIGN", f"{rpc} gave user {user_id} session {session_id}, which is another's"
            )

    async def _rename(self, talk: Talk) -> None:
        edit = talk.record.edit("", new_id())
        session = session_pb2.Session(id=talk.record.session_id, title=edit.value)
        request = session_pb2.UpdateSessionRequest(user_id=talk.record.user_id, session=session)
        await self._call("UpdateSession", request)
        edit.acknowledged = time.monotonic()

    def _some_message(self, talk: Talk) -> str:
        sent, _ = self._chance.choice(talk.requests)
        return self._chance.choice(sent.ids)

    async def _edit(self, talk: Talk) -> None:
        if talk.requests:
            id_ = self._some_message(talk)
            edit = talk.record.edit(id_, f"{id_} edited {new_id()}")
            edited = message_pb2.Message(id=id_, content=edit.value)
            request = message_pb2.UpdateMessageRequest(message=edited, **talk.record.name)
            try:
                await self._call("UpdateMessage", request, refused="MESSAGE_NOT_FOUND")
            except Gone as failure:
                if failure.args[0] == "MESSAGE_NOT_FOUND" and not talk.record.erasing(id_):
                    self._tally.blame(
                        "LOST", f"session {talk.record.session_id}: {id_} could not be edited"
                    )
                raise
            edit.acknowledged = time.monotonic()

    async def _erase(self, talk: Talk) -> None:
        if not talk.requests:
            return
        erasure = Erasure(self._some_message(talk))
        if talk.record.erasing(erasure.id):
            return
        talk.record.erasures.append(erasure)
        request = message_pb2.DeleteMessageRequest(
            message_id=erasure.id, allow_missing=True, **talk.record.name
        )
        await self._call("DeleteMessage", request)
        erasure.acknowledged = time.monotonic()

    # --- Reading.

    async def _list(self, talk: Talk, **fields: Any) -> message_pb2.ListMessagesResponse:
        page: message_pb2.ListMessagesResponse = await self._call(
            "ListMessages",
            message_pb2.ListMessagesRequest(
                **{"page_size": self._chance.randint(1, 60)} | talk.record.name | fields
            ),
        )
        return page

    async def _context(self, talk: Talk) -> None:
        begun = time.monotonic()
        request = message_pb2.GetContextRequest(
            max_messages=self._chance.randint(1, 60), **talk.record.name
        )
        talk.record.saw_context(begun, await self._call("GetContext", request))

    async def _newest(self, talk: Talk, **fields: Any) -> None:
        begun = time.monotonic()
        talk.record.saw_newest(
            begun, await self._list(talk, order=message_pb2.MESSAGE_ORDER_DESC, **fields)
        )

    async def _read_twice(self, talk: Talk) -> None:
        """Read, append, and read the same again: what was read a moment ago will not do."""
        await self._newest(talk, page_size=20)
        await self._append(talk)
        await self._newest(talk, page_size=20)

    async def _walk(self, talk: Talk) -> None:
        """Read some pages from the beginning on."""
        after, token = 0, ""
        for _ in range(self._chance.randint(1, 4)):
            begun = time.monotonic()
            page = await self._list(talk, page_token=token)
            talk.record.saw_page(begun, after, page)
            token = page.next_page_token
            if not token:
                return
            after = max((message.seq for message in page.messages), default=after)

    async def _session(self, talk: Talk) -> None:
        begun = time.monotonic()
        talk.record.saw_session(
            begun,
            (
                await self._call("GetSession", session_pb2.GetSessionRequest(**talk.record.name))
            ).session,
        )

    async def _sessions(self, talk: Talk) -> None:
        user_id = talk.record.user_id
        known = {each.record.session_id for each in self._there if each.record.user_id == user_id}
        reply = await self._call(
            "ListSessions", session_pb2.ListSessionsRequest(user_id=user_id, page_size=1000)
        )
        shown = {session.id for session in reply.sessions}
        if strange := {id_ for id_ in shown if not self._has(user_id, id_)}:
            self._tally.blame(
                "FOREIGN",
                f"user {user_id} was shown sessions {sorted(strange)}, which are another's",
            )
        if missing := known - shown:
            self._tally.blame("STALE", f"user {user_id} was not shown sessions {sorted(missing)}")

    async def _leave(self, talk: Talk) -> None:
        """Come as a crowd and go away before the answers: what the calls have taken must come free."""
        replica: Replica = self._chance.choice(self._stack.replicas)
        stub, user_id = self._stubs[replica.name], talk.record.user_id
        ways: list[Callable[[], Any]] = [
            lambda: stub.GetSession(
                session_pb2.GetSessionRequest(**talk.record.name), timeout=CALL_SECONDS
            ),
            lambda: stub.ListSessions(
                session_pb2.ListSessionsRequest(user_id=user_id), timeout=CALL_SECONDS
            ),
            lambda: stub.GetContext(
                message_pb2.GetContextRequest(**talk.record.name), timeout=CALL_SECONDS
            ),
        ]
        calls = [self._chance.choice(ways)() for _ in range(CROWD)]
        self._tally.calls["left at once"] += CROWD
        await asyncio.sleep(self._chance.uniform(0, 0.05))
        self._tally.cancelled += sum(call.cancel() for call in calls)
        await asyncio.gather(*calls, return_exceptions=True)

    async def _watch(self, talk: Talk) -> None:
        """Follow a session for a while, from some place on."""
        begun, after = time.monotonic(), self._chance.randint(0, talk.record.last_seq)
        replica: Replica = self._chance.choice(self._stack.replicas)
        self._tally.calls["WatchMessages"] += 1
        request = message_pb2.WatchMessagesRequest(after_seq=after, **talk.record.name)
        seen: list[SeenMessage] = []
        try:
            async for reply in self._stubs[replica.name].WatchMessages(
                request, timeout=self._chance.uniform(0.2, 8)
            ):
                seen.append(seen_message(reply.message))  # noqa: PERF401 - what has come counts also when it ends in an error
        except aio.AioRpcError as error:
            if error.code() != StatusCode.DEADLINE_EXCEEDED:
                self._tally.failure("WatchMessages", error)
        talk.record.saw_stream(begun, after, seen)

    # --- Users of the client library.

    async def _talk(self, library: ChatHistoryClient) -> None:
        """Append and read as a chatbot does; every error that comes out of the library is counted."""
        talk = Talk(Record(self._chance.choice(self._users), new_id()))
        self.talks.append(talk)
        record = talk.record
        follower: asyncio.Task[None] | None = None
        seen: list[SeenMessage] = []
        begun = time.monotonic()
        while not self._stopping or follower is None:
            messages = self._messages(1, 2)
            sent = record.send(messages)
            with suppress(ChatHistoryError):
                sent.acknowledge(
                    await self._counted(
                        library.append_messages(
                            messages=messages, create_if_missing=True, **record.name
                        )
                    )
                )
                self._tally.acknowledged += len(messages)
                if follower is None:
                    self._there.append(talk)
                    follower = asyncio.create_task(self._follow(library, record, seen))
                asked = time.monotonic()
                record.saw_context(
                    asked, await self._counted(library.get_context(max_messages=20, **record.name))
                )
            await asyncio.sleep(self._chance.uniform(0, 0.2))
        await self._catch_up(record, seen)
        follower.cancel()
        await asyncio.wait([follower])
        if not follower.cancelled():
            self._tally.blame("ERROR", f"a follower ended: {follower.exception()!r}")
        record.saw_stream(begun, 0, seen)

    async def _counted(self, call: Awaitable[Any]) -> Any:
        self._tally.library_calls += 1
        try:
            return await call
        except ChatHistoryError as error:
            self._tally.library_errors[error.code.name, error.reason or OWN] += 1
            self._tally.blame(
                "ERROR", f"the library: {error.code.name} {error.reason} {error.message}"
            )
            raise

    @staticmethod
    async def _follow(library: ChatHistoryClient, record: Record, seen: list[SeenMessage]) -> None:
        async for message in library.watch_messages(**record.name):
            seen.append(seen_message(message))  # noqa: PERF401 - others read it meanwhile

    async def _catch_up(self, record: Record, seen: list[SeenMessage]) -> None:
        """Wait until a follower has seen all that was acknowledged."""
        give_up = time.monotonic() + CARRY_ON_SECONDS
        while not seen or seen[-1][0] < record.last_seq:
            if time.monotonic() > give_up:
                self._tally.blame(
                    "STALE", f"session {record.session_id}: a follower did not catch up"
                )
                return
            await asyncio.sleep(0.05)
