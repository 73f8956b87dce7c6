"""Users: the owners of everything else. Most of it is for service callers only."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from chathistory.v1 import export_pb2, user_pb2
from chathistory.v1.user_pb2 import User

from chathistory_client.connection import DELETE_TIMEOUT_S, EXPORT_TIMEOUT_S, Connection
from chathistory_client.fields import UNSET, Metadata, Unset, set_fields, struct
from chathistory_client.ids import new_id
from chathistory_client.paging import Pager


class Users(Connection):
    """Creates, reads, changes, exports and erases users."""

    async def create_user(
        self,
        *,
        user_id: str = "",
        external_id: str = "",
        email: str = "",
        name: str = "",
        metadata: Metadata | None = None,
        timeout: float | None = None,
    ) -> User:
        """Create a user. With an id of your own, the same call again returns the user that is there.

        >>> user = await client.create_user(external_id="crm-4711", name="Ada", metadata={"plan": "team"})
        >>> user.name, user.metadata["plan"]
        ('Ada', 'team')

        Raises:
            AlreadyExists: the e-mail address (EMAIL_TAKEN), external id (EXTERNAL_ID_TAKEN) or id (ID_TAKEN) is another's.
        """
        user = User(
            id=user_id or new_id(),
            external_id=external_id,
            email=email,
            name=name,
            metadata=struct(metadata),
        )
        return (
            await self._call(self._stub.CreateUser, user_pb2.CreateUserRequest(user=user), timeout)
        ).user

    async def get_user(
        self,
        *,
        user_id: str | None = None,
        email: str | None = None,
        external_id: str | None = None,
        timeout: float | None = None,
    ) -> User:
        """Read one user by exactly one of its keys; a user caller needs none and gets itself.

        >>> user = await client.create_user(email="grace@example.com")
        >>> (await client.get_user(email="Grace@Example.com")).id == user.id
        True
        """
        keys = {"user_id": user_id, "email": email, "external_id": external_id}
        given = {name: key for name, key in keys.items() if key is not None}
        if len(given) > 1:
            raise ValueError(f"give one of {', '.join(given)}")
        request = user_pb2.GetUserRequest(**given)
        return (await self._call(self._stub.GetUser, request, timeout)).user

    def list_users(
        self, *, page_size: int = 0, page_token: str = "", timeout: float | None = None
    ) -> Pager[user_pb2.ListUsersResponse, User]:
        """List all users in order of id."""

        async def fetch(token: str) -> user_pb2.ListUsersResponse:
            request = user_pb2.ListUsersRequest(page_size=page_size, page_token=token)
            return await self._call(self._stub.ListUsers, request, timeout)

        return Pager(fetch, lambda page: page.users, page_token)

    async def update_user(
        self,
        *,
        user_id: str,
        external_id: str | Unset = UNSET,
        email: str | Unset = UNSET,
        name: str | Unset = UNSET,
        metadata: Metadata | Unset | None = UNSET,
        etag: str = "",
        timeout: float | None = None,
    ) -> User:
        """Change the fields that are given.

        >>> user = await client.create_user(name="Ada")
        >>> (await client.update_user(user_id=user.id, name="Ada Lovelace", etag=user.etag)).name
        'Ada Lovelace'

        Raises:
            Conflict: `etag` is given and is not that of the stored user (ETAG_MISMATCH).
        """
        user = User(id=user_id, etag=etag)
        mask = set_fields(user, external_id=external_id, email=email, name=name, metadata=metadata)
        request = user_pb2.UpdateUserRequest(user_id=user_id, user=user, update_mask=mask)
        return (await self._call(self._stub.UpdateUser, request, timeout)).user

    async def delete_user(
        self, *, user_id: str, allow_missing: bool = False, timeout: float | None = None
    ) -> user_pb2.DeleteUserResponse:
        """Erase a user everywhere, and say how much went.

        >>> user = await client.create_user()
        >>> _ = await client.create_session(user_id=user.id)
        >>> (await client.delete_user(user_id=user.id)).session_count
        1
        """
        request = user_pb2.DeleteUserRequest(user_id=user_id, allow_missing=allow_missing)
        return await self._call(self._stub.DeleteUser, request, timeout, DELETE_TIMEOUT_S)

    async def export_user_data(
        self, *, user_id: str = "", timeout: float = EXPORT_TIMEOUT_S
    ) -> AsyncGenerator[export_pb2.ExportUserDataResponse]:
        """Read everything of one user, item by item: the user, each session with its messages, each document with its chunks.

        >>> _ = await client.append_messages(user_id=user_id, messages=[message("user", "Hi")])
        >>> [item.WhichOneof("item") async for item in client.export_user_data(user_id=user_id)]
        ['user', 'session', 'message']
        """
        request = export_pb2.ExportUserDataRequest(user_id=user_id)
        token = await self._get_token(self._timeout)
        async with aclosing(
            self._stream(lambda stub: stub.ExportUserData, request, token, timeout)
        ) as items:
            async for item in items:
                yield item
