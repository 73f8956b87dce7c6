"""The RPCs of users."""

from __future__ import annotations

from functools import partial

from chathistory.v1 import user_pb2

from service.auth.authenticators import FindUserId
from service.errors import InvalidArgument, NotFound, PermissionDenied
from service.ids import SYSTEM_USER_ID, new_id
from service.rpc import convert, field_masks, paging
from service.rpc.call import Call
from service.rpc.handler import Handler
from service.rpc.page_reads import read_page
from service.rpc.page_tokens import parse_id
from service.store import users
from service.store.bounded_reads import Connection, Page
from service.store.db.database import NO_OWNER, Database
from service.store.rows import UserRow
from service.store.slices import chunk_slices, message_slices

_WRITABLE = ("external_id", "email", "name", "metadata")
_WRITTEN_BY_SERVICES = frozenset({"external_id", "email"})
"""Fields that identify a user.

A user could claim the address of another person, because the service does not verify addresses,
and could find out by EMAIL_TAKEN which addresses are in use.
"""


class Users(Handler):
    """Creates, reads, updates and deletes users."""

    async def CreateUser(
        self, request: user_pb2.CreateUserRequest, call: Call
    ) -> user_pb2.CreateUserResponse:
        """Create a user; a retry with the same id and content returns it."""
        user_id = request.user.id.lower() or new_id()
        if user_id == SYSTEM_USER_ID:
            raise InvalidArgument.field("user.id", "is the system's own user: choose another id")
        values = convert.user_values(request.user, user_id)
        row = await self.database.write(
            lambda connection: users.create(connection, values),
            owner_id=user_id,
            deadline=call.deadline,
        )
        return user_pb2.CreateUserResponse(user=convert.user(row))

    async def GetUser(
        self, request: user_pb2.GetUserRequest, call: Call
    ) -> user_pb2.GetUserResponse:
        """Read one user; a user caller gets itself only, whichever key it names."""
        key = request.WhichOneof("key")
        if key in (None, "user_id") or not getattr(request, key):
            user_id = call.caller.resolve_user_id(request.user_id if key == "user_id" else "")
            row = await self._get_user(user_id, call)
        elif (own_id := call.caller.user_id) is not None:
            row = await self._get_user(own_id, call)
            is_own_key = (
                (row.email or "").lower() == request.email.lower()
                if key == "email"
                else row.external_id == request.external_id
            )
            if not is_own_key:
                raise PermissionDenied(f"{key} is not the caller's own", reason="USER_MISMATCH")
        else:
            row = await self.database.read(
                lambda connection: users.get_by(connection, **{key: getattr(request, key)}),
                owner_id=NO_OWNER,
                deadline=call.deadline,
            )
        return user_pb2.GetUserResponse(user=convert.user(row))

    async def ListUsers(
        self, request: user_pb2.ListUsersRequest, call: Call
    ) -> user_pb2.ListUsersResponse:
        """List all users in order of id."""
        page_size = paging.effective_page_size(request.page_size)
        tokens = await self.page_tokens.of_list(NO_OWNER, call.deadline, "ListUsers")
        cursor = tokens.read(request.page_token, parse_id)

        async def list_rows(
            connection: Connection, last_row: UserRow | None, limit: int, max_bytes: int
        ) -> Page[UserRow]:
            after = last_row.id if last_row else cursor
            return await users.list_page(connection, after, limit, max_bytes)

        rows, has_more = await read_page(
            self.database, "ListUsers", list_rows, page_size, NO_OWNER, call
        )
        page, next_page_token = await paging.build_page(
            rows,
            convert.user,
            lambda row: tokens.make(row.id),
            partial(self.conversions.pause, NO_OWNER, call.deadline),
            has_more=has_more,
        )
        return user_pb2.ListUsersResponse(users=page, next_page_token=next_page_token)

    async def UpdateUser(
        self, request: user_pb2.UpdateUserRequest, call: Call
    ) -> user_pb2.UpdateUserResponse:
        """Update fields of a user."""
        inner_id = request.user.id.lower()
        user_id = call.caller.resolve_user_id(request.user_id or inner_id)
        if inner_id not in ("", user_id):
            raise InvalidArgument.field("user.id", "must be empty or equal to the request's")
        paths = field_masks.update_paths(request.update_mask, request.user, _WRITABLE)
        if not _WRITTEN_BY_SERVICES.isdisjoint(paths):
            call.caller.require_service()
        values = convert.user_changes(request.user, paths)
        row = await self.database.write(
            lambda connection: users.update(connection, user_id, values, request.user.etag),
            owner_id=user_id,
            deadline=call.deadline,
        )
        return user_pb2.UpdateUserResponse(user=convert.user(row))

    async def DeleteUser(
        self, request: user_pb2.DeleteUserRequest, call: Call
    ) -> user_pb2.DeleteUserResponse:
        """Delete a user with all data: messages and chunks in slices, the user last."""
        user_id = call.caller.resolve_user_id(request.user_id)
        message_count = await self.delete_in_slices(message_slices(user_id), user_id, call)
        chunk_count = await self.delete_in_slices(chunk_slices(user_id), user_id, call)
        counts = await self.database.write(
            lambda connection: users.delete(
                connection, user_id, search_enabled=self.search.is_enabled
            ),
            owner_id=user_id,
            deadline=call.deadline,
        )
        if counts is None:
            if not request.allow_missing:
                raise NotFound.user(user_id)
            await self.confirm_absence(user_id, call)
            return user_pb2.DeleteUserResponse()
        self.appender.tombstones.wake()
        message_count += counts.messages
        chunk_count += counts.chunks
        vector_count = 0
        if self.search.is_enabled:
            vector_count = chunk_count + (message_count if self.search.indexes_messages else 0)
            self.search.wake()
        return user_pb2.DeleteUserResponse(
            session_count=counts.sessions,
            message_count=message_count,
            document_count=counts.documents,
            chunk_count=chunk_count,
            vector_count=vector_count,
        )

    async def _get_user(self, user_id: str, call: Call) -> UserRow:
        return await self.database.read(
            lambda connection: users.get(connection, user_id),
            owner_id=user_id,
            deadline=call.deadline,
        )


def external_id_lookup(database: Database) -> FindUserId:
    """Return a function that finds the user with an external id, for the authenticator."""

    async def find_user_id(external_id: str, deadline: float) -> str | None:
        if "\0" in external_id:  # PostgreSQL's text cannot contain it.
            return None
        try:
            user = await database.read(
                lambda connection: users.get_by(connection, external_id=external_id),
                owner_id=f"external:{external_id}",
                deadline=deadline,
            )
        except NotFound:
            return None
        return user.id

    return find_user_id
