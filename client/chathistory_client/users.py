"""RPCs of users. All but `get_user`, `update_user` and `export_user_data` are for services only."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from chathistory.v1 import export_pb2, user_pb2
from chathistory.v1.user_pb2 import User

from chathistory_client.connection import (
    DELETE_TIMEOUT_S,
    EXPORT_TIMEOUT_S,
    Connection,
    ReadConsistency,
    read_metadata,
)
from chathistory_client.fields import UNSET, Metadata, Unset, set_fields, struct
from chathistory_client.ids import new_id
from chathistory_client.paging import Pager


class Users(Connection):
    """Creates, reads, updates, exports and deletes users."""

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
        """Create a user.

        Retries send the same id, so the user is created once. To repeat the call yourself, pass
        `user_id`: the same content returns the stored user.

        >>> user = await client.create_user(
        ...     external_id="crm-4711", name="Ada", metadata={"plan": "team"}
        ... )
        >>> user.name, user.metadata["plan"]
        ('Ada', 'team')

        Args:
            user_id: UUID of the user. Empty for a new one.
            external_id: Id of the user in your own system. Unique when set.
            email: E-mail address. Unique when set, compared case-insensitively.
            name: Display name.
            metadata: JSON object of your own, at most 16 KiB.
            timeout: Seconds for the call, including retries. None for the client's default.

        Returns:
            The stored user.

        Raises:
            AlreadyExists: Another user has the e-mail address (EMAIL_TAKEN), the external id
                (EXTERNAL_ID_TAKEN) or the id (ID_TAKEN).
            PermissionDenied: The caller is a user (SERVICE_ONLY).
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
        """Return one user by exactly one of its keys.

        >>> user = await client.create_user(email="grace@example.com")
        >>> (await client.get_user(email="Grace@Example.com")).id == user.id
        True

        Args:
            user_id: Id of the user.
            email: E-mail address of the user, compared case-insensitively.
            external_id: External id of the user.
            timeout: Seconds for the call, including retries. None for the client's default.

        Returns:
            The stored user. Without a key, the user who calls.

        Raises:
            ValueError: More than one key was passed.
            NotFound: No user has this key (USER_NOT_FOUND).
            PermissionDenied: A user caller asked for another user (USER_MISMATCH).
        """
        keys = {"user_id": user_id, "email": email, "external_id": external_id}
        passed = {name: key for name, key in keys.items() if key is not None}
        if len(passed) > 1:
            raise ValueError(f"pass only one of {', '.join(passed)}")
        request = user_pb2.GetUserRequest(**passed)
        return (await self._call(self._stub.GetUser, request, timeout)).user

    def list_users(
        self, *, page_size: int = 0, page_token: str = "", timeout: float | None = None
    ) -> Pager[user_pb2.ListUsersResponse, User]:
        """List all users, ordered by id.

        Args:
            page_size: Maximum number of items in a page. 0 means 50, values over 1000 mean 1000.
            page_token: `next_page_token` of the page to continue after. Empty for the first page.
            timeout: Seconds for each page, including retries. None for the client's default.

        Returns:
            A pager: `async for` iterates over all items, `await` returns one page.

        Raises:
            PermissionDenied: The caller is a user (SERVICE_ONLY).
        """

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
        """Update fields of a user.

        Fields that are left `UNSET` keep their value; None and empty values clear a field.

        >>> user = await client.create_user(name="Ada")
        >>> user = await client.update_user(user_id=user.id, name="Ada Lovelace", etag=user.etag)
        >>> user.name
        'Ada Lovelace'

        Args:
            user_id: Id of the user.
            external_id: Id of the user in your own system. Written by services only.
            email: E-mail address. Written by services only.
            name: Display name.
            metadata: JSON object of your own; replaces the stored one.
            etag: If set, the update succeeds only while this is the etag of the stored user.
            timeout: Seconds for the call, including retries. None for the client's default.

        Returns:
            The stored user after the update.

        Raises:
            ValueError: No field was passed.
            Conflict: `etag` is not that of the stored user (ETAG_MISMATCH).
            AlreadyExists: Another user has the e-mail address (EMAIL_TAKEN) or the external id
                (EXTERNAL_ID_TAKEN).
            NotFound: No user has this id (USER_NOT_FOUND).
            PermissionDenied: A user caller wrote `email` or `external_id` (SERVICE_ONLY).
        """
        user = User(id=user_id, etag=etag)
        mask = set_fields(user, external_id=external_id, email=email, name=name, metadata=metadata)
        request = user_pb2.UpdateUserRequest(user_id=user_id, user=user, update_mask=mask)
        return (await self._call(self._stub.UpdateUser, request, timeout)).user

    async def delete_user(
        self, *, user_id: str, allow_missing: bool = False, timeout: float | None = None
    ) -> user_pb2.DeleteUserResponse:
        """Delete a user permanently, with all sessions, messages and documents.

        >>> user = await client.create_user()
        >>> _ = await client.create_session(user_id=user.id)
        >>> (await client.delete_user(user_id=user.id)).session_count
        1

        Args:
            user_id: Id of the user.
            allow_missing: True to succeed when the user does not exist.
            timeout: Seconds for the call, including retries. None for 60 s.

        Returns:
            The numbers of deleted resources.

        Raises:
            NotFound: No user has this id (USER_NOT_FOUND).
            PermissionDenied: The caller is a user (SERVICE_ONLY).
        """
        request = user_pb2.DeleteUserRequest(user_id=user_id, allow_missing=allow_missing)
        return await self._call(self._stub.DeleteUser, request, timeout, DELETE_TIMEOUT_S)

    async def export_user_data(
        self,
        *,
        user_id: str = "",
        read_consistency: ReadConsistency = "strong",
        timeout: float = EXPORT_TIMEOUT_S,
    ) -> AsyncGenerator[export_pb2.ExportUserDataResponse]:
        """Stream all data of one user.

        The user is first. Each session is followed by its messages, then each document by its
        chunks. The export is complete only if the iteration ends without an error.

        >>> _ = await client.append_messages(user_id=user_id, messages=[message("user", "Hi")])
        >>> [item.WhichOneof("item") async for item in client.export_user_data(user_id=user_id)]
        ['user', 'session', 'message']

        Args:
            user_id: Id of the user. Services must set it; user callers may leave it empty.
            read_consistency: `strong`, or `eventual` to accept the data of a replica that lags.
            timeout: Seconds for the whole export.

        Raises:
            NotFound: No user has this id, or it was deleted during the export (USER_NOT_FOUND).
        """
        metadata = read_metadata(read_consistency)
        request = export_pb2.ExportUserDataRequest(user_id=user_id)
        token = await self._get_token(self._timeout_s)
        async with aclosing(
            self._stream(lambda stub: stub.ExportUserData, request, token, timeout, metadata)
        ) as items:
            async for item in items:
                yield item
