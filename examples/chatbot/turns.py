"""One turn of a conversation: the question is stored, answered, and the answer stored, whatever becomes of the browser."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from chathistory_client import AlreadyExists, ChatHistoryError, Message, NotFound, message, new_id

from . import history, schemas
from .history import AWAY, History
from .model import Model, ModelFailed

MAX_ANSWER = 200_000
"""Characters of an answer that are kept: the service takes 256 KiB."""
LAST_CHANCE = 1.0
"""Seconds that storing may take after the answer is there, when the service was away before it."""

_log = logging.getLogger(__name__)


@dataclass
class Turn:
    """What is known of one turn."""

    user_id: str
    question: Message
    session_id: str = ""
    question_saved: bool = False
    saved: bool = False
    title: str | None = None
    """Set when this turn has started the conversation."""
    passages: list[schemas.Source] | None = None
    conversation: list[Message] = field(default_factory=list)
    answer: Message | None = None
    """What is stored or to be stored; set from the start when the turn is a repetition."""
    stopped: bool = False

    @property
    def answer_id(self) -> str:
        """The answer's id, made from the question's: a repetition of the turn has the same one."""
        return (
            self.answer.id
            if self.answer
            else str(uuid.uuid5(uuid.UUID(self.question.id), "answer"))
        )

    @property
    def sources(self) -> list[schemas.Source]:
        """What the answer stands on."""
        return history.sources_of(self.answer) if self.answer else self.passages or []

    def begun(self) -> schemas.Begun:
        """Describe it as it begins."""
        return schemas.Begun.model_validate(
            {
                "session_uuid": self.session_id or None,
                "message_id": self.question.id,
                "answer_id": self.answer_id,
                "saved": self.question_saved,
                "title": self.title,
                "sources": self.sources,
            }
        )

    def done(self) -> schemas.ChatResponse:
        """Describe it at its end."""
        return schemas.ChatResponse.model_validate(
            self.begun().model_dump()
            | {
                "answer": self.answer.content if self.answer else "",
                "saved": self.saved,
                "stopped": self.stopped,
            }
        )


class Turns:
    """Begins turns and sees each to its end."""

    def __init__(
        self, store: History, model: Model, *, context_tokens: int, require_history: bool
    ) -> None:
        self._store = store
        self._model = model
        self._context_tokens = context_tokens
        self._require_history = require_history
        self._under_way: set[Answering] = set()

    async def begin(self, user_id: str, request: schemas.ChatRequest) -> Turn:
        """Store the question and gather what its answer needs.

        Raises:
            NotFound: there is no such conversation.
            AlreadyExists: the message id stands for another message.
            ChatHistoryError: the service is away and `require_history` is set.
        """
        turn = Turn(
            user_id, message("user", request.message, id=str(request.message_id or new_id()))
        )
        turn.session_id = str(request.session_uuid or "")
        searching = asyncio.create_task(self._store.passages(user_id, request.message))
        try:
            await self._store_question(turn)
            turn.passages = await searching
        finally:
            searching.cancel()
        return turn

    async def _store_question(self, turn: Turn) -> None:
        try:
            stored = await self._store.append(
                turn.user_id,
                turn.session_id,
                [turn.question],
                title=history.title_of(turn.question.content),
            )
            turn.session_id, turn.question_saved = stored.session_id, True
            if stored.started:
                turn.title = history.title_of(turn.question.content)
            if stored.replayed:
                self._found(
                    turn, await self._store.answer(turn.user_id, turn.session_id, turn.answer_id)
                )
            if turn.answer is None:
                context = await self._store.client.get_context(
                    user_id=turn.user_id,
                    session_id=turn.session_id,
                    max_tokens=self._context_tokens,
                )
                turn.conversation = [each for each in context.messages if each.seq <= stored.seq]
        except AWAY as error:
            _log.warning("history is away: %s", error)
            if self._require_history:
                raise
        turn.conversation = turn.conversation or [turn.question]

    def answer(self, turn: Turn) -> Answering:
        """Let the answer be made, and stored at its end whoever listens."""
        answering = Answering(self, turn)
        self._under_way.add(answering)
        answering.ended.add_done_callback(lambda _: self._under_way.discard(answering))
        return answering

    async def close(self) -> None:
        """Break off what is under way, and store what there is of it."""
        under_way = list(self._under_way)
        for answering in under_way:
            answering.leave()
        await asyncio.gather(*(answering.ended for answering in under_way), return_exceptions=True)

    async def pieces(self, turn: Turn) -> AsyncIterator[str]:
        """Give the answer in pieces: the stored one of a turn that is a repetition, or a new one."""
        if turn.answer is not None:
            yield turn.answer.content
            return
        length = 0
        async for piece in self._model.answer(turn.conversation, turn.passages):
            length += len(piece)
            if length > MAX_ANSWER:
                turn.stopped = True
                return
            yield piece

    async def store_answer(self, turn: Turn, text: str) -> None:
        """Store the answer; and the question with it, when the service was away before."""
        if turn.answer is not None or not text:
            return
        metadata = {"sources": history.titles(turn.sources)} | (
            {"stopped": True} if turn.stopped else {}
        )
        answer = message(
            "assistant",
            text,
            id=turn.answer_id,
            parts=history.cited(turn.sources),
            metadata=metadata,
        )
        turn.answer = answer
        late = None if turn.question_saved else LAST_CHANCE
        messages = [answer] if turn.question_saved else [turn.question, answer]
        title = history.title_of(turn.question.content)
        try:
            stored = await self._store.append(
                turn.user_id, turn.session_id, messages, title=title, timeout=late
            )
            turn.session_id = stored.session_id
            turn.question_saved = turn.saved = True
        except AlreadyExists:
            # The same turn has been answered twice at once: the first answer stands.
            self._found(turn, await self._store.answer(turn.user_id, turn.session_id, answer.id))
        except NotFound:
            _log.info("the conversation was deleted while its answer was made")
        except ChatHistoryError as error:
            _log.warning("the answer is not stored: %s", error)

    def _found(self, turn: Turn, stored: Message | None) -> None:
        if stored is not None:
            turn.answer, turn.saved, turn.stopped = stored, True, history.stopped(stored)


class Answering:
    """An answer in the making, in tasks of its own: the browser may leave."""

    def __init__(self, turns: Turns, turn: Turn) -> None:
        self._turns = turns
        self.turn = turn
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._text: list[str] = []
        self._making = asyncio.create_task(self._make())
        self.ended = asyncio.create_task(self._see_to_the_end())
        """Done when the answer is stored, as far as it can be."""

    def leave(self) -> None:
        """Break the answer off; what there is of it is stored."""
        self._making.cancel()

    async def pieces(self) -> AsyncIterator[str]:
        """Give the answer in pieces, as they come; whoever stops listening breaks the answer off."""
        try:
            while (piece := await self._pieces.get()) is not None:
                yield piece
            await asyncio.shield(self.ended)
        finally:
            self.leave()

    async def _make(self) -> None:
        async for piece in self._turns.pieces(self.turn):
            self._text.append(piece)
            self._pieces.put_nowait(piece)

    async def _see_to_the_end(self) -> None:
        await asyncio.wait([self._making])
        try:
            if self._making.cancelled():
                self.turn.stopped = True
            elif (error := self._making.exception()) is not None:
                self.turn.stopped = True
                if not isinstance(error, ModelFailed):
                    _log.error("the answer failed", exc_info=error)
            await self._turns.store_answer(self.turn, "".join(self._text))
        finally:
            self._pieces.put_nowait(None)
