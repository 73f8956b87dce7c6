"""A conversation in ChatHistory: python examples/quickstart.py [ADDRESS].

It needs the client library and a service. `make run` serves at the default address.
"""

import asyncio
import sys

from chathistory_client import ChatHistoryClient, NotFound, Session, User, message

DEFAULT_ADDRESS = "127.0.0.1:50051"


async def get_or_create_user(client: ChatHistoryClient, external_id: str) -> User:
    """Return the user with this id of the caller's own system."""
    try:
        return await client.get_user(external_id=external_id)
    except NotFound:
        return await client.create_user(external_id=external_id, name="Ada")


async def main(address: str) -> None:
    """Store a question and its answer, read them in three ways, and repeat a write safely."""
    async with ChatHistoryClient(address) as client:
        user = await get_or_create_user(client, "quickstart-ada")
        print(f"user      {user.name}, {user.id}")

        # Without a session id, an append starts a session.
        question = message("user", "What is a heron?")
        reply = await client.append_messages(
            user_id=user.id, messages=[question], session=Session(title="Herons")
        )
        session_id = reply.session_id
        print(f"question  stored as seq {reply.messages[0].seq} of a new session")

        # The context is what a language model needs to answer: the newest messages that fit.
        context = await client.get_context(user_id=user.id, session_id=session_id, max_tokens=4000)
        print(f"context   {len(context.messages)} message, {context.token_count} tokens")

        answer = message("assistant", "A long-legged bird that wades in shallow water.")
        for attempt in ("answer", "retry"):
            # The same message id again stores nothing: the stored message is returned.
            reply = await client.append_messages(
                user_id=user.id, session_id=session_id, messages=[answer]
            )
            stored = reply.messages[0]
            print(f"{attempt:<8}  seq {stored.seq}, replayed: {stored.replayed}")

        async for entry in client.list_messages(user_id=user.id, session_id=session_id):
            print(f"listed    {entry.seq}. {entry.content}")

        # A watch sends the stored messages, and then each new one until it is closed.
        async for entry in client.watch_messages(
            user_id=user.id, session_id=session_id, after_seq=1
        ):
            print(f"watched   {entry.seq}. {entry.content}")
            break


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else DEFAULT_ADDRESS))
