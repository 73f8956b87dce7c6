"""Iteration over paged lists."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable
from typing import Any, Generic, Protocol, TypeVar


class _Page(Protocol):
    @property
    def next_page_token(self) -> str: ...


Response = TypeVar("Response", bound=_Page)
Item = TypeVar("Item")


class Pager(Generic[Response, Item]):
    """A list in pages: `async for` iterates over all items, `await` returns one page.

    >>> for number in range(3):
    ...     _ = await client.create_session(user_id=user_id, title=f"No. {number}")
    >>> [session.title async for session in client.list_sessions(user_id=user_id, page_size=2)]
    ['No. 2', 'No. 1', 'No. 0']

    A page is the response of the service. Only an empty `next_page_token` ends the list:

    >>> page = await client.list_sessions(user_id=user_id, page_size=2)
    >>> [session.title for session in page.sessions]
    ['No. 2', 'No. 1']
    >>> page = await client.list_sessions(
    ...     user_id=user_id, page_size=2, page_token=page.next_page_token
    ... )
    >>> [session.title for session in page.sessions], page.next_page_token
    (['No. 0'], '')
    """

    def __init__(
        self,
        fetch: Callable[[str], Awaitable[Response]],
        items: Callable[[Response], Iterable[Item]],
        page_token: str = "",
    ) -> None:
        self._fetch = fetch
        self._items = items
        self._page_token = page_token

    def __await__(self) -> Generator[Any, Any, Response]:
        return self._fetch(self._page_token).__await__()

    async def __aiter__(self) -> AsyncIterator[Item]:
        async for page in self.pages():
            for item in self._items(page):
                yield item

    async def pages(self) -> AsyncIterator[Response]:
        """Iterate over the pages."""
        token = self._page_token
        while True:
            page = await self._fetch(token)
            yield page
            token = page.next_page_token
            if not token:
                return
