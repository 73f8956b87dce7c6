"""The RPCs of users."""

from __future__ import annotations

from typing import TYPE_CHECKING

import uuid_utils
from chathistory.v1 import user_pb2

from service.errors import InvalidArgument, NotFound, PermissionDenied
from service.rpc import convert, field_masks, paging
from service.rpc.pipeline import Call
from service.store import documents, sessions, users
from service.store.db.database import Database
from service.store.tables import SYSTEM_USER_ID

if TYPE_CHECKING:
    from service.search.service import Search

_WRITABLE = ("external_id", "email", "name", "metadata")


class Users:
    """Creates, reads, changes and erases users."""

    database: Database
    search: Search | None

    async def CreateUser(
        self, request: user_pb2.CreateUserRequest, call: Call
    ) -> user_pb2.CreateUserResponse:
        """Create a user; a retry with the same id and content returns it."""
        call.caller.require_service()
        user_id = request.user.id.lower() or str(uuid_utils.uuid7())
        if user_id == SYSTEM_USER_ID:
            raise InvalidArgument.field("user.id", "is the system's own")
        values = convert.user_values(request.user, user_id)
        row = await self.database.write(users.create, call.deadline, values)
        return user_pb2.CreateUserResponse(user=convert.user(row))

    async def GetUser(
        self, request: user_pb2.GetUserRequest, call: Call
    ) -> user_pb2.GetUserResponse:
        """Read one user; a user caller gets itself only, by whatever key."""
        key = request.WhichOneof("key")
        caller = call.caller
        if key in (None, "user_id") or not getattr(request, key):
            row = await self.database.read(
                users.get, call.deadline, caller.owner(request.user_id if key == "user_id" else "")
            )
        elif caller.user_id is not None:
            row = await self.database.read(users.get, call.deadline, caller.user_id)
            own = (
                (row.email or "").lower() == request.email.lower()
                if key == "email"
                else row.external_id == request.external_id
            )
            if not own:
                raise PermissionDenied("not yours", reason="USER_MISMATCH")
        else:
            row = await self.database.read(
                users.get_by, call.deadline, **{key: getattr(request, key)}
            )
        return user_pb2.GetUserResponse(user=convert.user(row))

    async def ListUsers(
        self, request: user_pb2.ListUsersRequest, call: Call
    ) -> user_pb2.ListUsersResponse:
        """List all users in order of id."""
        call.caller.require_service()
        size = paging.page_size(request.page_size)
        after = paging.place(request.page_token, "ListUsers")
        rows = await self.database.read(users.list_page, call.deadline, after, size + 1)
        page, token = paging.cut(
            rows[:size],
            convert.user,
            lambda row: paging.token(row.id, "ListUsers"),
            more=len(rows) > size,
        )
        return user_pb2.ListUsersResponse(users=page, next_page_token=token)

    async def UpdateUser(
        self, request: user_pb2.UpdateUserRequest, call: Call
    ) -> user_pb2.UpdateUserResponse:
        """Change fields of a user."""
        inside = request.user.id.lower()
        user_id = call.caller.owner(request.user_id or inside)
        if inside not in ("", user_id):
            raise InvalidArgument.field("user.id", "is not the request's user_id")
        paths = field_masks.paths(request.update_mask, request.user, _WRITABLE)
        if "external_id" in paths:
            call.caller.require_service()
        values = convert.user_changes(request.user, paths)
        row = await self.database.write(
            users.update, call.deadline, user_id, values, request.user.etag
        )
        return user_pb2.UpdateUserResponse(user=convert.user(row))

    async def DeleteUser(
        self, request: user_pb2.DeleteUserRequest, call: Call
    ) -> user_pb2.DeleteUserResponse:
        """Erase a user everywhere; what is large goes in slices, the user itself last."""
        call.caller.require_service()
        user_id = call.caller.owner(request.user_id)
        messages = chunks = 0
        more = True
        while more:
            erased, more = await self.database.write(sessions.delete_slice, call.deadline, user_id)
            messages += erased
        more = True
        while more:
            erased, more = await self.database.write(documents.delete_slice, call.deadline, user_id)
            chunks += erased
        gone = await self.database.write(
            users.delete, call.deadline, user_id, search_enabled=self.search is not None
        )
        if gone is None:
            if not request.allow_missing:
                raise NotFound.user(user_id)
            return user_pb2.DeleteUserResponse()
        messages, chunks = messages + gone.messages, chunks + gone.chunks
        vectors = 0
        if self.search is not None:
            vectors = chunks + (messages if self.search.messages else 0)
            self.search.wake()
        return user_pb2.DeleteUserResponse(
            session_count=gone.sessions,
            message_count=messages,
            document_count=gone.documents,
            chunk_count=chunks,
            vector_count=vectors,
        )
