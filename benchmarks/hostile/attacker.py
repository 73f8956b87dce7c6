"""The process that runs one attack: `python -m benchmarks.hostile.attacker`.

It reads the account and the attack from its input, prepares, prints `ready`, reads the number of
seconds, attacks, and prints the tally. Its priority is the lowest from its start, so that it never
takes processor time from the process that measures the other user.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

import uvloop

from benchmarks.hostile.account import Account
from benchmarks.hostile.assault import Assault
from benchmarks.hostile.attacks import MATRIX, Attack
from benchmarks.hostile.matrix import Field, request
from benchmarks.hostile.specials import SPECIALS

_BODIES = 4
"""Requests of one attack of the matrix, which differ in random content."""


def main() -> None:
    """Run the attack that the input describes."""
    account = Account.from_json(sys.stdin.readline())
    attack = Attack.from_json(sys.stdin.readline())
    tally = uvloop.run(_run(account, attack))
    print(json.dumps(tally), flush=True)  # noqa: T201 - read by the parent process
    # Open calls and threads of gRPC must not delay the end.
    os._exit(0)


async def _run(account: Account, attack: Attack) -> dict[str, int]:
    assault = Assault(account, attack, _wait_for_start)
    command = _matrix if attack.kind == MATRIX else SPECIALS[attack.kind].run
    try:
        await command(assault)
    except (OSError, EOFError) as error:
        assault.tally[type(error).__name__] += 1
    return dict(assault.tally)


async def _wait_for_start() -> float:
    print("ready", flush=True)  # noqa: T201 - read by the parent process
    line = await asyncio.to_thread(sys.stdin.readline)
    if not line:
        raise EOFError
    return float(line)


async def _matrix(assault: Assault) -> None:
    """Send requests with one field of an extreme size."""
    rpc = assault.parameter("rpc")
    path = tuple(filter(None, assault.parameter("field").split(".")))
    bodies = [
        request(
            Field(rpc, path),
            assault.account,
            size=assault.parameter("size"),
            text=assault.parameter("text"),
            shape=assault.parameter("shape"),
            chance=assault.chance,
        )
        for _ in range(_BODIES)
    ]
    await assault.begin()
    await assault.flood(
        rpc,
        bodies,
        concurrency=assault.parameter("concurrency"),
        connections=assault.parameter("connections"),
        caller=assault.parameter("caller"),
    )


if __name__ == "__main__":
    main()
