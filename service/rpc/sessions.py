"""The RPCs of sessions."""

from __future__ import annotations

from functools import partial

from chathistory.v1 import session_pb2

from service.errors import InvalidArgument, NotFound
from service.ids import new_id
from service.rpc import convert, field_masks, paging
from service.rpc.call import Call
from service.rpc.handler import Handler, require_same_id
from service.rpc.page_reads import read_page
from service.rpc.page_tokens import parse_id, parse_time_us
from service.store import sessions
from service.store.bounded_reads import Connection, Page
from service.store.db.work_class import WorkClass
from service.store.rows import SessionRow
from service.store.sessions import SessionCursor
from service.store.slices import message_slices
from service.store.tables import SessionState

_WRITABLE = ("title", "summary", "summarized_through_seq", "metadata", "state")


class Sessions(Handler):
    """Creates, reads, updates, forks and deletes sessions."""

    async def CreateSession(
        self, request: session_pb2.CreateSessionRequest, call: Call
    ) -> session_pb2.CreateSessionResponse:
        """Create an empty session; a retry with the same id and content returns it."""
        user_id = call.caller.resolve_user_id(request.user_id)
        require_same_id("session.user_id", request.session.user_id, user_id)
        session_id = request.session.id.lower() or new_id()
        values = convert.session_values(request.session, session_id) | {"user_id": user_id}
        row = await self.database.write(
            lambda connection: sessions.create(connection, values),
            owner_id=user_id,
            deadline=call.deadline,
        )
        return session_pb2.CreateSessionResponse(session=convert.session(row))

    async def GetSession(
        self, request: session_pb2.GetSessionRequest, call: Call
    ) -> session_pb2.GetSessionResponse:
        """Read one session."""
        user_id = call.caller.resolve_user_id(request.user_id)
        row = await self.database.read(
            lambda connection: sessions.get(connection, user_id, request.session_id.lower()),
            owner_id=user_id,
            deadline=call.deadline,
        )
        return session_pb2.GetSessionResponse(session=convert.session(row))

    async def ListSessions(
        self, request: session_pb2.ListSessionsRequest, call: Call
    ) -> session_pb2.ListSessionsResponse:
        """List a user's sessions, newest activity first."""
        user_id = call.caller.resolve_user_id(request.user_id)
        tokens = await self.page_tokens.of_list(
            user_id, call.deadline, "ListSessions", user_id, request.state
        )
        page_size = paging.effective_page_size(request.page_size)
        cursor = tokens.read(request.page_token, _parse_cursor)
        state = SessionState(request.state) if request.state else None

        async def list_rows(
            connection: Connection, last_row: SessionRow | None, limit: int, max_bytes: int
        ) -> Page[SessionRow]:
            after = SessionCursor(last_row.updated_us, last_row.id) if last_row else cursor
            return await sessions.list_page(connection, user_id, state, after, limit, max_bytes)

        rows, has_more = await read_page(
            self.reader(call), "ListSessions", list_rows, page_size, user_id, call
        )
        page, next_page_token = await paging.build_page(
            rows,
            convert.session,
            lambda row: tokens.make(f"{row.updated_us} {row.id}"),
            partial(self.conversions.pause, user_id, call.deadline),
            has_more=has_more,
        )
        return session_pb2.ListSessionsResponse(sessions=page, next_page_token=next_page_token)

    async def UpdateSession(
        self, request: session_pb2.UpdateSessionRequest, call: Call
    ) -> session_pb2.UpdateSessionResponse:
        """Update fields of a session."""
        user_id = call.caller.resolve_user_id(request.user_id)
        require_same_id("session.user_id", request.session.user_id, user_id)
        session_id = request.session.id.lower()
        if not session_id:
            raise InvalidArgument.field("session.id", "is required")
        paths = field_masks.update_paths(request.update_mask, request.session, _WRITABLE)
        values = convert.session_changes(request.session, paths)
        row = await self.database.write(
            lambda connection: sessions.update(
                connection, user_id, session_id, values, request.session.etag
            ),
            owner_id=user_id,
            deadline=call.deadline,
        )
        return session_pb2.UpdateSessionResponse(session=convert.session(row))

    async def DeleteSession(
        self, request: session_pb2.DeleteSessionRequest, call: Call
    ) -> session_pb2.DeleteSessionResponse:
        """Delete a session with its messages; many messages are deleted in slices."""
        user_id = call.caller.resolve_user_id(request.user_id)
        session_id = request.session_id.lower()
        self.appender.contention.add_session((user_id, session_id))
        await self.delete_in_slices(message_slices(user_id, session_id), user_id, call)
        was_deleted = await self.database.write(
            lambda connection: sessions.delete(
                connection, user_id, session_id, search_enabled=self.search.is_enabled
            ),
            owner_id=user_id,
            deadline=call.deadline,
        )
        if not was_deleted:
            if not request.allow_missing:
                raise NotFound.session(session_id)
            await self.confirm_absence(user_id, call)
        self.appender.tombstones.wake()
        self.watchers.session_deleted(user_id, session_id)
        self.search.wake()
        return session_pb2.DeleteSessionResponse()

    async def ForkSession(
        self, request: session_pb2.ForkSessionRequest, call: Call
    ) -> session_pb2.ForkSessionResponse:
        """Copy the start of a session into a new one; a retry with the same new id returns it."""
        user_id = call.caller.resolve_user_id(request.user_id)
        source_id = request.session_id.lower()
        fork_id = request.new_session_id.lower() or new_id()
        fingerprint = convert.fork_fingerprint(source_id, request.through_seq)
        is_large = await self.database.read(
            lambda connection: sessions.is_large_copy(
                connection, user_id, source_id, request.through_seq
            ),
            owner_id=user_id,
            deadline=call.deadline,
        )
        row = await self.database.write(
            lambda connection: sessions.fork(
                connection,
                user_id,
                source_id,
                request.through_seq,
                fork_id,
                fingerprint,
                search_enabled=self.search.indexes_messages,
            ),
            owner_id=user_id,
            deadline=call.deadline,
            work_class=WorkClass.EXPENSIVE if is_large else WorkClass.ORDINARY,
        )
        self.search.wake()
        return session_pb2.ForkSessionResponse(session=convert.session(row))


def _parse_cursor(text: str) -> SessionCursor:
    updated_us, session_id = text.split(" ")
    return SessionCursor(parse_time_us(updated_us), parse_id(session_id))
