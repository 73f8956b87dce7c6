"""The client."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from chathistory_client.documents import Documents
from chathistory_client.health import Health
from chathistory_client.messages import Messages
from chathistory_client.sessions import Sessions
from chathistory_client.users import Users


class ChatHistoryClient(Users, Sessions, Messages, Documents, Health):
    """The ChatHistory service. One client serves a whole process: keep it open, as a context manager or with `close`.

    >>> async with ChatHistoryClient(address) as client:
    ...     user = await client.create_user(name="Ada")
    ...     reply = await client.append_messages(user_id=user.id, messages=[message("user", "Hello!")])
    ...     page = await client.list_messages(user_id=user.id, session_id=reply.session_id)
    ...     [(each.seq, each.content) for each in page.messages]
    [(1, 'Hello!')]

    Every method is the RPC of that name. It waits until the service can be reached, at most until its deadline (10 s, or what
    `timeout` says); what fails with UNAVAILABLE is tried again, up to five times, with the same ids; what fails for good raises
    one of the errors in `chathistory_client.errors`.

    Args:
        target: `host:port`, whose every address takes a share of the calls, or any gRPC target (`dns:///`, `unix:`, …).
        tls: True for TLS by the public authorities, or a `Tls` with certificates of your own.
        token: A bearer token, or a function, async or not, that returns a fresh one. It is asked again before a JWT expires
            and when the service refuses the token.
        allow_insecure_token: Send the token in plaintext to another machine, where a mesh encrypts what leaves this one.
        timeout: Seconds that a call may take when it does not say itself.
        wait_for_ready: False to fail at once, and not at the deadline, while the service cannot be reached.
        options: More gRPC channel options; they override those made here.
    """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
