"""Full-text queries: PostgreSQL's `tsquery` as a tree, to bound it and to derive words from it.

PostgreSQL alone parses what a user has typed. This module reads its result in text form, so a
query means here exactly what it means there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

_TOKEN = re.compile(r"\s*(?:'((?:[^'\\]|''|\\.)*)'|<(-|\d+)>|([&|!()]))", re.DOTALL)
_ESCAPED = re.compile(r"''|\\(.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Term:
    """One word."""

    word: str


@dataclass(frozen=True, slots=True)
class Not:
    """A node that must not match."""

    node: Node


@dataclass(frozen=True, slots=True)
class And:
    """Nodes that must all match."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """Nodes of which at least one must match."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Phrase:
    """Nodes that must match one after the other."""

    nodes: tuple[Node, ...]
    distances: tuple[str, ...]
    """Between neighbours, as PostgreSQL writes them: `-` or a number of words."""


Node = Term | Not | And | Or | Phrase


class RequiredWords(NamedTuple):
    """Words without which no text matches a query: a cheap test of texts before the exact one."""

    all: tuple[str, ...]
    """All of these occur in a text that matches."""
    any: tuple[str, ...]
    """At least one of these does, unless there are none."""


def parse(text: str) -> Node | None:
    """Parse PostgreSQL's text form of a query; None if it has no words.

    Raises:
        ValueError: PostgreSQL does not write such text.
    """
    parser = _Parser(text)
    if parser.is_at_end():
        return None
    node = parser.alternatives()
    if not parser.is_at_end():
        raise ValueError("the query does not end where it should")
    return node


class _Token(NamedTuple):
    kind: str
    """`word`, `distance`, or the operator itself."""
    value: str = ""


class _Parser:
    """Parses by descent: `!` binds closest, then the distances of phrases, `&` and `|`."""

    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text)
        self._token = next(self._tokens, None)

    def is_at_end(self) -> bool:
        return self._token is None

    def _accept(self, kind: str) -> _Token | None:
        """Consume the next token if it is of this kind."""
        token = self._token
        if token is None or token.kind != kind:
            return None
        self._token = next(self._tokens, None)
        return token

    def alternatives(self) -> Node:
        return self._sequence("|", self._conjunction, Or)

    def _conjunction(self) -> Node:
        return self._sequence("&", self._phrase, And)

    def _sequence(
        self,
        operator: str,
        operand: Callable[[], Node],
        combine: Callable[[tuple[Node, ...]], Node],
    ) -> Node:
        nodes = [operand()]
        while self._accept(operator):
            nodes.append(operand())
        return nodes[0] if len(nodes) == 1 else combine(tuple(nodes))

    def _phrase(self) -> Node:
        nodes, distances = [self._operand()], []
        while distance := self._accept("distance"):
            distances.append(distance.value)
            nodes.append(self._operand())
        return nodes[0] if not distances else Phrase(tuple(nodes), tuple(distances))

    def _operand(self) -> Node:
        is_excluded = False
        # A loop, since a user may type thousands of minus signs in front of a word.
        while self._accept("!"):
            is_excluded = not is_excluded
        if self._accept("("):
            node = self.alternatives()
            if not self._accept(")"):
                raise ValueError("a bracket is not closed")
        elif word := self._accept("word"):
            node = Term(word.value)
        else:
            raise ValueError("a word is missing")
        return Not(node) if is_excluded else node


def _tokens(text: str) -> Iterator[_Token]:
    position, end = 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError("the query is not in PostgreSQL's form")
        position = match.end()
        word, distance, operator = match.groups()
        if word is not None:
            yield _Token("word", _ESCAPED.sub(lambda escaped: escaped[1] or "'", word))
        elif distance is not None:
            yield _Token("distance", distance)
        else:
            yield _Token(operator)


def render(node: Node) -> str:
    """Return a query in the text form that PostgreSQL reads."""
    match node:
        case Term(word):
            return "'" + word.replace("\\", "\\\\").replace("'", "''") + "'"
        case Not(excluded):
            return f"!({render(excluded)})"
        case And(nodes):
            return " & ".join(f"({render(operand)})" for operand in nodes)
        case Or(nodes):
            return " | ".join(f"({render(operand)})" for operand in nodes)
        case Phrase(nodes, distances):
            text = f"({render(nodes[0])})"
            for distance, operand in zip(distances, nodes[1:], strict=True):
                text += f" <{distance}> ({render(operand)})"
            return text


def count_terms(node: Node) -> int:
    """Return the number of words in a query; a repeated word counts each time."""
    match node:
        case Term():
            return 1
        case Not(excluded):
            return count_terms(excluded)
        case And(nodes) | Or(nodes) | Phrase(nodes):
            return sum(map(count_terms, nodes))


def first_terms(node: Node, limit: int) -> Node:
    """Return a query cut after its first `limit` words; at least one."""
    match node:
        case Term():
            return node
        case Not(excluded):
            return Not(first_terms(excluded, limit))
        case And(nodes) | Or(nodes) | Phrase(nodes):
            kept: list[Node] = []
            for operand in nodes:
                if limit <= 0:
                    break
                kept.append(first_terms(operand, limit))
                limit -= count_terms(operand)
            return _with_nodes(node, kept)


def _with_nodes(node: And | Or | Phrase, kept: list[Node]) -> Node:
    """Return a node with the first of its operands only."""
    if len(kept) == 1:
        return kept[0]
    match node:
        case And():
            return And(tuple(kept))
        case Or():
            return Or(tuple(kept))
        case Phrase(_, distances):
            return Phrase(tuple(kept), distances[: len(kept) - 1])


def without_exclusions(node: Node) -> Node | None:
    """Return a query without its excluded parts; None if nothing is left."""
    match node:
        case Term() | Phrase():
            return node
        case Not():
            return None
        case And(nodes) | Or(nodes):
            kept = [part for operand in nodes if (part := without_exclusions(operand)) is not None]
            return _with_nodes(node, kept) if kept else None


def words(node: Node | None) -> list[str]:
    """Return the words of a query in their order, each once."""
    match node:
        case None:
            return []
        case Term(word):
            return [word]
        case Not(excluded):
            return words(excluded)
        case And(nodes) | Or(nodes) | Phrase(nodes):
            return list(dict.fromkeys(word for operand in nodes for word in words(operand)))


def required_words(node: Node, limit: int) -> RequiredWords:
    """Return words that a query implies, at most `limit` that must all occur."""
    clauses = _clauses(node)
    single = {word for clause in clauses if len(clause) == 1 for word in clause}
    # A word that is part of another one excludes nothing that the other does not.
    longest = sorted(single, key=lambda word: (-len(word), word))
    kept: list[str] = []
    for word in longest:
        if len(kept) < limit and not any(word in longer for longer in kept):
            kept.append(word)
    alternatives = [clause for clause in clauses if len(clause) > 1]
    best = min(alternatives, key=_selectivity, default=frozenset())
    return RequiredWords(tuple(kept), tuple(sorted(best)))


def _clauses(node: Node) -> list[frozenset[str]]:
    """Return sets of words; a text that matches contains at least one word of each set."""
    match node:
        case Term(word):
            return [frozenset((word,))]
        case Not():
            return []
        case And(nodes) | Phrase(nodes):
            return [clause for operand in nodes for clause in _clauses(operand)]
        case Or(nodes):
            alternatives = [_clauses(operand) for operand in nodes]
            if not all(alternatives):
                return []  # One alternative requires nothing.
            best = (min(clauses, key=_selectivity) for clauses in alternatives)
            return [frozenset().union(*best)]


def _selectivity(clause: frozenset[str]) -> tuple[int, int]:
    """Sort key of a set of alternatives: the set that fewer texts satisfy, presumably, first."""
    return len(clause), -min(map(len, clause))
