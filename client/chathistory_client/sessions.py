"""RPCs of sessions: one conversation each."""

from __future__ import annotations

from chathistory.v1 import session_pb2
from chathistory.v1.session_pb2 import Session, SessionState

from chathistory_client.connection import (
    DELETE_TIMEOUT_S,
    Connection,
    ReadConsistency,
    read_metadata,
)
from chathistory_client.fields import UNSET, Metadata, Unset, set_fields, struct
from chathistory_client.ids import new_id
from chathistory_client.paging import Pager


class Sessions(Connection):
    """Creates, reads, updates, forks and deletes sessions."""

    async def create_session(
        self,
        *,
        user_id: str = "",
        session_id: str = "",
        title: str = "",
        summary: str = "",
        metadata: Metadata | None = None,
        timeout: float | None = None,
    ) -> Session:
        """Create an empty session.

        `append_messages` can create a session as well, in the same call. Retries send the same id,
        so the session is created once.

        >>> session = await client.create_session(user_id=user_id, title="Holidays")
        >>> session.title, session.last_seq
        ('Holidays', 0)

        Args:
            user_id: Id of the owner. Services must set it; user callers may leave it empty.
            session_id: UUID of the session. Empty for a new one.
            title: Display title, at most 512 characters.
            summary: Summary, at most 64 KiB.
            metadata: JSON object of your own, at most 16 KiB.
            timeout: Seconds for the call, including retries. None for the client's default.

        Returns:
            The stored session.

        Raises:
            AlreadyExists: The user has another session with this id (ID_TAKEN).
            NotFound: The owner does not exist (USER_NOT_FOUND).
        """
        session = Session(
            id=session_id or new_id(), title=title, summary=summary, metadata=struct(metadata)
        )
        request = session_pb2.CreateSessionRequest(user_id=user_id, session=session)
        return (await self._call(self._stub.CreateSession, request, timeout)).session

    async def get_session(
        self, *, user_id: str = "", session_id: str, timeout: float | None = None
    ) -> Session:
        """Return one session.

        Args:
            user_id: Id of the owner. Services must set it; user callers may leave it empty.
            session_id: Id of the session.
            timeout: Seconds for the call, including retries. None for the client's default.

        Returns:
            The stored session.

        Raises:
            NotFound: The user has no session with this id (SESSION_NOT_FOUND).
        """
        request = session_pb2.GetSessionRequest(user_id=user_id, session_id=session_id)
        return (await self._call(self._stub.GetSession, request, timeout)).session

    def list_sessions(
        self,
        *,
        user_id: str = "",
        state: SessionState.ValueType = SessionState.SESSION_STATE_UNSPECIFIED,
        page_size: int = 0,
        page_token: str = "",
        read_consistency: ReadConsistency = "strong",
        timeout: float | None = None,
    ) -> Pager[session_pb2.ListSessionsResponse, Session]:
        """List a user's sessions, newest activity first.

        >>> _ = await client.create_session(user_id=user_id, title="One")
        >>> [session.title async for session in client.list_sessions(user_id=user_id)]
        ['One']

        Args:
            user_id: Id of the owner. Services must set it; user callers may leave it empty.
            state: Only sessions in this state. Unspecified for any state.
            page_size: Maximum number of items in a page. 0 means 50, values over 1000 mean 1000.
            page_token: `next_page_token` of the page to continue after. Empty for the first page.
            read_consistency: `strong`, or `eventual` to accept the data of a replica that lags.
            timeout: Seconds for each page, including retries. None for the client's default.

        Returns:
            A pager: `async for` iterates over all items, `await` returns one page.
        """
        metadata = read_metadata(read_consistency)

        async def fetch(token: str) -> session_pb2.ListSessionsResponse:
            request = session_pb2.ListSessionsRequest(
                user_id=user_id, state=state, page_size=page_size, page_token=token
            )
            return await self._call(self._stub.ListSessions, request, timeout, metadata=metadata)

        return Pager(fetch, lambda page: page.sessions, page_token)

    async def update_session(
        self,
        *,
        user_id: str = "",
        session_id: str,
        title: str | Unset = UNSET,
        summary: str | Unset = UNSET,
        summarized_through_seq: int | Unset = UNSET,
        metadata: Metadata | Unset | None = UNSET,
        state: SessionState.ValueType | Unset = UNSET,
        etag: str = "",
        timeout: float | None = None,
    ) -> Session:
        """Update fields of a session.

        Fields that are left `UNSET` keep their value; None and empty values clear a field.

        >>> session = await client.create_session(
        ...     user_id=user_id, title="Untitled", metadata={"lang": "en"}
        ... )
        >>> session = await client.update_session(
        ...     user_id=user_id, session_id=session.id, title="Holidays"
        ... )
        >>> session.title, session.metadata["lang"]
        ('Holidays', 'en')

        Args:
            user_id: Id of the owner. Services must set it; user callers may leave it empty.
            session_id: Id of the session.
            title: Display title, at most 512 characters.
            summary: Summary of the messages up to `summarized_through_seq`, at most 64 KiB.
            summarized_through_seq: Last `seq` that the summary covers. `get_context` omits the
                messages up to it.
            metadata: JSON object of your own; replaces the stored one.
            state: Active, or archived to reject further messages.
            etag: If set, the update succeeds only while this is the etag of the stored session.
            timeout: Seconds for the call, including retries. None for the client's default.

        Returns:
            The stored session after the update.

        Raises:
            ValueError: No field was passed.
            Conflict: `etag` is not that of the stored session (ETAG_MISMATCH).
            NotFound: The user has no session with this id (SESSION_NOT_FOUND).
        """
        session = Session(id=session_id, etag=etag)
        mask = set_fields(
            session,
            title=title,
            summary=summary,
            summarized_through_seq=summarized_through_seq,
            metadata=metadata,
            state=state,
        )
        request = session_pb2.UpdateSessionRequest(
            user_id=user_id, session=session, update_mask=mask
        )
        return (await self._call(self._stub.UpdateSession, request, timeout)).session

    async def delete_session(
        self,
        *,
        user_id: str = "",
        session_id: str,
        allow_missing: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Delete a session permanently, with its messages.

        Args:
            user_id: Id of the owner. Services must set it; user callers may leave it empty.
            session_id: Id of the session.
            allow_missing: True to succeed when the session does not exist.
            timeout: Seconds for the call, including retries. None for 60 s.

        Raises:
            NotFound: The user has no session with this id (SESSION_NOT_FOUND).
        """
        request = session_pb2.DeleteSessionRequest(
            user_id=user_id, session_id=session_id, allow_missing=allow_missing
        )
        await self._call(self._stub.DeleteSession, request, timeout, DELETE_TIMEOUT_S)

    async def fork_session(
        self,
        *,
        user_id: str = "",
        session_id: str,
        through_seq: int,
        new_session_id: str = "",
        timeout: float | None = None,
    ) -> Session:
        """Copy the beginning of a session into a new one.

        Use it to regenerate an answer, edit a question, or branch. The copied messages keep their
        ids, `seq` and times.

        >>> source = await client.append_messages(
        ...     user_id=user_id, messages=[message("user", "Hi"), message("assistant", "?")]
        ... )
        >>> fork = await client.fork_session(
        ...     user_id=user_id, session_id=source.session_id, through_seq=1
        ... )
        >>> fork.last_seq, fork.forked_from.session_id == source.session_id
        (1, True)

        Args:
            user_id: Id of the owner. Services must set it; user callers may leave it empty.
            session_id: Id of the session to copy from.
            through_seq: Last `seq` to copy. 0 copies no message.
            new_session_id: UUID of the new session. Empty for a new one.
            timeout: Seconds for the call, including retries. None for the client's default.

        Returns:
            The new session.

        Raises:
            NotFound: The user has no session with this id (SESSION_NOT_FOUND).
            InvalidArgument: `through_seq` exceeds the session's `last_seq` (FIELD_VIOLATION).
            AlreadyExists: The user has another session with `new_session_id` (ID_TAKEN).
        """
        request = session_pb2.ForkSessionRequest(
            user_id=user_id,
            session_id=session_id,
            through_seq=through_seq,
            new_session_id=new_session_id or new_id(),
        )
        return (await self._call(self._stub.ForkSession, request, timeout)).session
