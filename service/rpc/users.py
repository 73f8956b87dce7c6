"""The RPCs of users."""

from __future__ import annotations

from chathistory.v1 import user_pb2

from service.auth.authenticators import FindUserId
from service.errors import InvalidArgument, NotFound, PermissionDenied
from service.ids import SYSTEM_USER_ID, new_id
from service.rpc import convert, field_masks, paging
from service.rpc.call import Call
from service.rpc.handler import Handler
from service.store import documents, sessions, users
from service.store.db.database import NO_OWNER, Database

_WRITABLE = ("external_id", "email", "name", "metadata")


class Users(Handler):
    """Creates, reads, changes and erases users."""

    async def CreateUser(
        self, request: user_pb2.CreateUserRequest, call: Call
    ) -> user_pb2.CreateUserResponse:
        """Create a user; a retry with the same id and content returns it."""
        user_id = request.user.id.lower() or new_id()
        if user_id == SYSTEM_USER_ID:
            raise InvalidArgument.field("user.id", "is the system's own")
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
        """Read one user; a user caller gets itself only, by whatever key."""
        key = request.WhichOneof("key")
        caller = call.caller
        if key in (None, "user_id") or not getattr(request, key):
            user_id = caller.resolve_user_id(request.user_id if key == "user_id" else "")
            row = await self.database.read(
                lambda connection: users.get(connection, user_id),
                owner_id=user_id,
                deadline=call.deadline,
            )
        elif (own_id := caller.user_id) is not None:
            row = await self.database.read(
                lambda connection: users.get(connection, own_id),
                owner_id=own_id,
                deadline=call.deadline,
            )
            own = (
                (row.email or "").lower() == request.email.lower()
                if key == "email"
                else row.external_id == request.external_id
            )
            if not own:
                raise PermissionDenied("not yours", reason="USER_MISMATCH")
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
        size = paging.page_size(request.page_size)
        after = paging.place(request.page_token, "ListUsers")
        rows = await self.database.read(
            lambda connection: users.list_page(connection, after, size + 1),
            owner_id=NO_OWNER,
            deadline=call.deadline,
        )
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
        user_id = call.caller.resolve_user_id(request.user_id or inside)
        if inside not in ("", user_id):
            raise InvalidArgument.field("user.id", "is not the request's user_id")
        paths = field_masks.paths(request.update_mask, request.user, _WRITABLE)
        if "external_id" in paths:
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
        """Erase a user everywhere; what is large goes in slices, the user itself last."""
        user_id = call.caller.resolve_user_id(request.user_id)
        messages = chunks = 0
        more = True
        while more:
            erased, more = await self.database.write(
                lambda connection: sessions.delete_slice(connection, user_id),
                owner_id=user_id,
                deadline=call.deadline,
            )
            messages += erased
        more = True
        while more:
            erased, more = await self.database.write(
                lambda connection: documents.delete_slice(connection, user_id),
                owner_id=user_id,
                deadline=call.deadline,
            )
            chunks += erased
        gone = await self.database.write(
            lambda connection: users.delete(
                connection, user_id, search_enabled=self.search.is_enabled
            ),
            owner_id=user_id,
            deadline=call.deadline,
        )
        if gone is None:
            if not request.allow_missing:
                raise NotFound.user(user_id)
            return user_pb2.DeleteUserResponse()
        messages, chunks = messages + gone.messages, chunks + gone.chunks
        vectors = 0
        if self.search.is_enabled:
            vectors = chunks + (messages if self.search.indexes_messages else 0)
            self.search.wake()
        return user_pb2.DeleteUserResponse(
            session_count=gone.sessions,
            message_count=messages,
            document_count=gone.documents,
            chunk_count=chunks,
            vector_count=vectors,
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
