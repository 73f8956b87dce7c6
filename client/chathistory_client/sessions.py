"""Sessions: one conversation each."""

from __future__ import annotations

from chathistory.v1 import session_pb2
from chathistory.v1.session_pb2 import Session, SessionState

from chathistory_client.connection import DELETE_TIMEOUT_S, Connection
from chathistory_client.fields import UNSET, Metadata, Unset, set_fields, struct
from chathistory_client.ids import new_id
from chathistory_client.paging import Pager


class Sessions(Connection):
    """Creates, reads, changes, forks and erases sessions. A user caller may leave `user_id` out."""

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
        """Create an empty session; `append_messages` can start one as well, in the same call.

        >>> session = await client.create_session(user_id=user_id, title="Holidays")
        >>> session.title, session.last_seq
        ('Holidays', 0)

        Raises:
            AlreadyExists: the id that you chose is that of another session (ID_TAKEN).
        """
        session = Session(
            id=session_id or new_id(), title=title, summary=summary, metadata=struct(metadata)
        )
        request = session_pb2.CreateSessionRequest(user_id=user_id, session=session)
        return (await self._call(self._stub.CreateSession, request, timeout)).session

    async def get_session(
        self, *, user_id: str = "", session_id: str, timeout: float | None = None
    ) -> Session:
        """Read one session.

        Raises:
            NotFound: it is missing, or somebody else's (SESSION_NOT_FOUND).
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
        timeout: float | None = None,
    ) -> Pager[session_pb2.ListSessionsResponse, Session]:
        """List a user's sessions, newest activity first: `async for` gives all of them, `await` one page.

        >>> _ = await client.create_session(user_id=user_id, title="One")
        >>> [session.title async for session in client.list_sessions(user_id=user_id)]
        ['One']
        """

        async def fetch(token: str) -> session_pb2.ListSessionsResponse:
            request = session_pb2.ListSessionsRequest(
                user_id=user_id, state=state, page_size=page_size, page_token=token
            )
            return await self._call(self._stub.ListSessions, request, timeout)

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
        """Change the fields that are given.

        >>> session = await client.create_session(user_id=user_id, title="Untitled", metadata={"lang": "en"})
        >>> session = await client.update_session(user_id=user_id, session_id=session.id, title="Holidays")
        >>> session.title, session.metadata["lang"]
        ('Holidays', 'en')

        Raises:
            Conflict: `etag` is given and is not that of the stored session (ETAG_MISMATCH).
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
        """Erase a session with its messages."""
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
        """Copy a session up to a message into a new one: to regenerate an answer, edit a question, or branch.

        >>> first = await client.append_messages(user_id=user_id, messages=[message("user", "Hi"), message("assistant", "?")])
        >>> fork = await client.fork_session(user_id=user_id, session_id=first.session_id, through_seq=1)
        >>> fork.last_seq, fork.forked_from.session_id == first.session_id
        (1, True)
        """
        request = session_pb2.ForkSessionRequest(
            user_id=user_id,
            session_id=session_id,
            through_seq=through_seq,
            new_session_id=new_session_id or new_id(),
        )
        return (await self._call(self._stub.ForkSession, request, timeout)).session
