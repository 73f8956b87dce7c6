"""Draws attacks from a seed: the same seed gives the same attacks."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self, TypeVar

from benchmarks.hostile.matrix import SERVICE, SERVICE_ONLY, SHAPES, SIZES, TEXTS, fields
from benchmarks.hostile.specials import SPECIALS

MATRIX = "matrix"
CONCURRENCY = (1, 8, 64, 500)
_SEARCH_RPCS = frozenset(
    {"SearchMessages", "SearchDocuments", "CreateDocument", "AppendDocumentChunks"}
)
"""RPCs that do more work while search is on."""
_SERVICE_RPCS = SERVICE_ONLY - {"RebuildSearchIndex"}
"""RPCs that half of the attacks call as a service. A rebuild is a command of the operator's own."""
_SEARCH_SHARE = 0.2
"""Share of the other attacks that run while search is on."""

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Attack:
    """One attack: everything that its process must know, next to the account."""

    number: int
    kind: str
    """`matrix`, or a name in `SPECIALS`."""
    parameters: dict[str, Any]
    seed: int
    """Seed of the choices that the attack itself makes."""
    needs_search: bool
    """Whether it runs while semantic search is on."""

    def __str__(self) -> str:
        values = " ".join(f"{name}={value}" for name, value in self.parameters.items())
        return f"#{self.number} {self.kind} {values}".rstrip()

    def to_json(self) -> str:
        """Serialise, for the attacker's process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))


def attacks(seed: int, count: int, only: Sequence[str] = ()) -> list[Attack]:
    """Draw attacks: half of them of the matrix, half special ones, those with search first.

    Every kind, and every RPC of the matrix, is drawn once before any is drawn again.

    Args:
        seed: Determines all choices.
        count: Number of attacks.
        only: Kinds to draw; all of them but those that are not drawn by default if empty.
    """
    chance = random.Random(seed)  # noqa: S311 - the attacks must be repeatable
    kinds = _kinds(chance, only)
    rpcs = _deck(sorted(method.name for method in SERVICE.methods), chance)
    drawn = [_draw(number, next(kinds), rpcs, chance) for number in range(count)]
    return sorted(drawn, key=lambda attack: not attack.needs_search)


def _kinds(chance: random.Random, only: Sequence[str]) -> Iterator[str]:
    unknown = set(only) - {MATRIX, *SPECIALS}
    if unknown:
        raise ValueError(f"unknown kind of attack: {', '.join(sorted(unknown))}")
    specials = [
        name for name, special in SPECIALS.items() if (name in only if only else special.is_default)
    ]
    if not specials:
        return _deck([MATRIX], chance)
    deck = _deck(specials, chance)
    return _alternating(deck) if not only or MATRIX in only else deck


def _alternating(specials: Iterator[str]) -> Iterator[str]:
    while True:
        yield MATRIX
        yield next(specials)


def _deck(items: Sequence[_Item], chance: random.Random) -> Iterator[_Item]:
    """Yield all items in a random order, then all of them in another one, and so on."""
    while True:
        yield from chance.sample(items, len(items))


def _draw(number: int, kind: str, rpcs: Iterator[str], chance: random.Random) -> Attack:
    if kind == MATRIX:
        rpc = next(rpcs)
        parameters = _matrix_parameters(rpc, chance)
        needs_search = rpc in _SEARCH_RPCS
    else:
        special = SPECIALS[kind]
        parameters = {name: chance.choice(values) for name, values in special.choices.items()}
        needs_search = special.needs_search
    needs_search = needs_search or chance.random() < _SEARCH_SHARE
    return Attack(number, kind, parameters, chance.getrandbits(32), needs_search)


def _matrix_parameters(rpc: str, chance: random.Random) -> dict[str, Any]:
    candidates = fields(rpc)
    field = chance.choice(candidates) if candidates else None
    return {
        "rpc": rpc,
        "field": ".".join(field.path) if field else "",
        "size": chance.choice(SIZES),
        "text": chance.choice(tuple(TEXTS)),
        "shape": chance.choice(SHAPES),
        "concurrency": chance.choice(CONCURRENCY),
        "connections": chance.choice((1, 4)),
        "caller": chance.choice(("user", "service")) if rpc in _SERVICE_RPCS else "user",
    }
