"""One turn of a conversation: store the question, answer it, store the answer.

The answer is generated and stored in tasks of its own, so a browser that disconnects loses nothing.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from chathistory_client import AlreadyExists, ChatHistoryError, Message, NotFound, message, new_id

from . import convert, schemas
from .history import OUTAGE_ERRORS, History
from .model import Model, ModelFailed

MAX_ANSWER_CHARS = 200_000
"""Longer answers are cut: the service stores at most 256 KiB of text in a message."""
LATE_STORE_TIMEOUT_S = 1.0
"""Time to store a finished answer when the service was already unavailable for its question."""

_log = logging.getLogger(__name__)


@dataclass
class Turn:
    """The state of one turn."""

    user_id: str
    question: Message
    session_id: str = ""
    """Empty until a new conversation is stored."""
    question_saved: bool = False
    saved: bool = False
    """Whether question and answer are both stored."""
    title: str | None = None
    """Title of the conversation, if this turn started it."""
    passages: list[schemas.Source] | None = None
    """Passages that match the question. None while search is unavailable."""
    conversation: list[Message] = field(default_factory=list)
    """Messages for the model, the question last."""
    answer: Message | None = None
    """The answer once it is complete; set from the start if this turn repeats an answered one."""
    stopped: bool = False
    """Whether the answer is incomplete."""

    @property
    def answer_id(self) -> str:
        """The answer's id, derived from the question's: a repeated turn has the same one."""
        if self.answer is not None:
            return self.answer.id
        return str(uuid.uuid5(uuid.UUID(self.question.id), "answer"))

    @property
    def sources(self) -> list[schemas.Source]:
        """The passages that the answer is based on."""
        if self.answer is not None:
            return convert.stored_sources(self.answer)
        return self.passages or []

    def use_stored_answer(self, answer: Message | None) -> None:
        """Adopt the answer that an earlier or concurrent request with the same id has stored."""
        if answer is not None:
            self.answer, self.saved, self.stopped = answer, True, convert.is_stopped(answer)

    def begin_event(self) -> schemas.BeginEvent:
        """Describe the turn before its answer."""
        return schemas.BeginEvent.model_validate(
            {
                "session_uuid": self.session_id or None,
                "message_id": self.question.id,
                "answer_id": self.answer_id,
                "saved": self.question_saved,
                "title": self.title,
                "sources": self.sources,
            }
        )

    def response(self) -> schemas.ChatResponse:
        """Describe the finished turn."""
        return schemas.ChatResponse.model_validate(
            self.begin_event().model_dump()
            | {
                "answer": self.answer.content if self.answer else "",
                "saved": self.saved,
                "stopped": self.stopped,
            }
        )


class TurnRunner:
    """Runs turns. A turn is prepared by `begin` and answered by `answer`."""

    def __init__(
        self, history: History, model: Model, *, context_tokens: int, require_history: bool
    ) -> None:
        self._history = history
        self._model = model
        self._context_tokens = context_tokens
        self._require_history = require_history
        self._in_flight: set[AnswerTask] = set()

    async def begin(self, user_id: str, request: schemas.ChatRequest) -> Turn:
        """Store the question and gather the context and passages for its answer.

        Raises:
            NotFound: the conversation does not exist, or belongs to another user.
            AlreadyExists: the message id is in use for another message.
            ChatHistoryError: the service is unavailable and `require_history` is set.
        """
        turn = Turn(
            user_id,
            question=message("user", request.message, id=str(request.message_id or new_id())),
            session_id=str(request.session_uuid or ""),
        )
        search = asyncio.create_task(self._history.find_passages(user_id, request.message))
        try:
            try:
                await self._store_question(turn)
            except OUTAGE_ERRORS as error:
                _log.warning("history service unavailable: %s", error)
                if self._require_history:
                    raise
            turn.conversation = turn.conversation or [turn.question]
            turn.passages = await search
        finally:
            search.cancel()
        return turn

    async def _store_question(self, turn: Turn) -> None:
        title = convert.title_from_question(turn.question.content)
        stored = await self._history.append(
            turn.user_id, turn.session_id, [turn.question], title=title
        )
        turn.session_id, turn.question_saved = stored.session_id, True
        if stored.session_created:
            turn.title = title
        if stored.replayed:
            turn.use_stored_answer(
                await self._history.find_answer(turn.user_id, turn.session_id, turn.answer_id)
            )
        if turn.answer is None:
            context = await self._history.client.get_context(
                user_id=turn.user_id,
                session_id=turn.session_id,
                max_tokens=self._context_tokens,
            )
            # Messages of concurrent turns may follow the question.
            turn.conversation = [item for item in context.messages if item.seq <= stored.first_seq]

    def answer(self, turn: Turn) -> AnswerTask:
        """Start generating the answer. It is stored at its end even if the client disconnects."""
        task = AnswerTask(self, turn)
        self._in_flight.add(task)
        task.finished.add_done_callback(lambda _: self._in_flight.discard(task))
        return task

    async def close(self) -> None:
        """Stop the answers in flight and store their text so far."""
        tasks = list(self._in_flight)
        for task in tasks:
            task.stop()
        await asyncio.gather(*(task.finished for task in tasks), return_exceptions=True)

    async def generate(self, turn: Turn) -> AsyncIterator[str]:
        """Yield the answer in pieces. A repeated turn yields the stored answer."""
        if turn.answer is not None:
            yield turn.answer.content
            return
        length = 0
        async for piece in self._model.answer(turn.conversation, turn.passages):
            length += len(piece)
            if length > MAX_ANSWER_CHARS:
                turn.stopped = True
                return
            yield piece

    async def store_answer(self, turn: Turn, text: str) -> None:
        """Store the answer, together with the question if that could not be stored before."""
        if turn.answer is not None or not text:
            return
        turn.answer = message(
            "assistant",
            text,
            id=turn.answer_id,
            parts=convert.citation_parts(turn.sources),
            metadata=convert.answer_metadata(turn.sources, stopped=turn.stopped),
        )
        try:
            stored = await self._history.append(
                turn.user_id,
                turn.session_id,
                [turn.answer] if turn.question_saved else [turn.question, turn.answer],
                title=convert.title_from_question(turn.question.content),
                timeout_s=None if turn.question_saved else LATE_STORE_TIMEOUT_S,
            )
        except AlreadyExists:
            # A concurrent request with the same message id has stored its answer first.
            turn.use_stored_answer(
                await self._history.find_answer(turn.user_id, turn.session_id, turn.answer_id)
            )
        except NotFound:
            _log.info("the conversation was deleted while its answer was generated")
        except ChatHistoryError as error:
            _log.warning("the answer is not stored: %s", error)
        else:
            turn.session_id = stored.session_id
            turn.question_saved = turn.saved = True


class AnswerTask:
    """Generates and stores the answer of one turn, independently of the client's connection."""

    def __init__(self, turns: TurnRunner, turn: Turn) -> None:
        self._turns = turns
        self._turn = turn
        self._pieces: list[str] = []
        self._queue: asyncio.Queue[str | None] = asyncio.Queue()
        """Pieces for the client; None marks the end."""
        self._generation = asyncio.create_task(self._generate())
        self.finished = asyncio.create_task(self._finish())
        """Done when the answer is stored, or could not be."""

    def stop(self) -> None:
        """Stop generating. The text so far is stored."""
        self._generation.cancel()

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the answer in pieces, as generated. Closing this iterator stops the answer."""
        try:
            while (piece := await self._queue.get()) is not None:
                yield piece
            await asyncio.shield(self.finished)
        finally:
            self.stop()

    async def _generate(self) -> None:
        async for piece in self._turns.generate(self._turn):
            self._pieces.append(piece)
            self._queue.put_nowait(piece)

    async def _finish(self) -> None:
        await asyncio.wait([self._generation])
        try:
            if self._generation.cancelled():
                self._turn.stopped = True
            elif (error := self._generation.exception()) is not None:
                self._turn.stopped = True
                if not isinstance(error, ModelFailed):
                    _log.error("answer failed", exc_info=error)
            await self._turns.store_answer(self._turn, "".join(self._pieces))
        finally:
            self._queue.put_nowait(None)
