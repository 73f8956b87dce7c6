"""`ChatHistoryClient`, which combines the groups of RPCs."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from chathistory_client.documents import Documents
from chathistory_client.health import Health
from chathistory_client.messages import Messages
from chathistory_client.sessions import Sessions
from chathistory_client.users import Users


class ChatHistoryClient(Users, Sessions, Messages, Documents, Health):
    """A client of the ChatHistory service.

    Create one client per process and keep it open. Use it as a context manager, or call `close`.

    >>> async with ChatHistoryClient(address) as client:
    ...     user = await client.create_user(name="Ada")
    ...     reply = await client.append_messages(
    ...         user_id=user.id, messages=[message("user", "Hello!")]
    ...     )
    ...     page = await client.list_messages(user_id=user.id, session_id=reply.session_id)
    ...     [(item.seq, item.content) for item in page.messages]
    [(1, 'Hello!')]

    Each method is the RPC of the same name. A call waits until the service can be reached, at most
    until its deadline (10 s, or `timeout`). Calls that fail with UNAVAILABLE are retried, up to
    five attempts, with the same ids. A final failure raises one of the errors in
    `chathistory_client.errors`.

    Args:
        target: `host:port`, or any gRPC target (`dns:///`, `unix:`, …). All addresses of the name
            share the calls.
        tls: True for TLS with the public certificate authorities, or a `Tls` with your own
            certificates.
        token: A bearer token, or a function, async or not, that returns one. The function is called
            again before a JWT expires and when the service rejects the token.
        allow_insecure_token: True to send the token in plaintext to another machine, for example
            where a mesh encrypts the traffic.
        timeout: Default timeout of a call, in seconds.
        wait_for_ready: True to wait until the deadline while the service cannot be reached. False
            to fail immediately.
        options: gRPC channel options. They override the client's own.

    Raises:
        ValueError: The token would be sent to another machine in plaintext.
    """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
