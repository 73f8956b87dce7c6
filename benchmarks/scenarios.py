"""The scenarios. Search has a module of its own.

Each scenario starts its servers on a database of its own and returns its part of results.json.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import jwt
from chathistory.v1 import message_pb2

from benchmarks import pipeline_costs, workload
from benchmarks.bench import SESSIONS, TYPICAL_IN_FLIGHT, Bench, body_count
from benchmarks.comparison import Comparison, Subject, compare
from benchmarks.environment import Server
from benchmarks.load_generator import BenchError, Load
from benchmarks.search_scenario import search
from benchmarks.workload import Session
from service.auth.bearer import SERVICE_SCOPE
from tests.support import pgbouncer
from tests.support.pgbouncer import PgBouncer

MESSAGES_PER_CALL = 50
"""Messages per call in the scenario of large appends."""


async def append(bench: Bench) -> dict[str, Any]:
    """Append one message per call.

    With one call in flight, the same statement run by asyncpg directly is measured as well.
    """
    keys = await bench.new_sessions_in("append")
    results: list[Comparison] = []
    async with (
        bench.environment.service("append") as service,
        bench.environment.reference_server("echo") as echo,
        bench.environment.reference_server("direct", "append") as direct,
    ):
        for in_flight in bench.plan.in_flight:
            load = bench.write_load(in_flight)
            bodies = bench.append_bodies(keys, load)
            subjects = [
                Subject("service", service, "AppendMessages", bodies),
                Subject("echo", echo, "AppendMessages", bodies, cycle=True),
            ]
            if in_flight == 1:
                subjects.append(Subject("direct", direct, "AppendMessages", bodies))
            results.append(await bench.compare(subjects, load))
    acknowledged = sum(
        result.answered(*(name for name in ("service", "direct") if name in result.rounds))
        for result in results
    )
    return {
        "runs": [result.as_dict() for result in results],
        "rows": await bench.check_rows("append", acknowledged),
    }


async def append_many(bench: Bench) -> dict[str, Any]:
    """Append many messages per call."""
    keys = await bench.new_sessions_in("append_many")
    load = bench.write_load(TYPICAL_IN_FLIGHT)
    async with (
        bench.environment.service("append_many") as service,
        bench.environment.reference_server("echo") as echo,
    ):
        bodies = bench.append_bodies(keys, load, MESSAGES_PER_CALL)
        subjects = [
            Subject("service", service, "AppendMessages", bodies),
            Subject("echo", echo, "AppendMessages", bodies, cycle=True),
        ]
        result = await bench.compare(subjects, load)
    return {
        "runs": [result.as_dict()],
        "messages_per_call": MESSAGES_PER_CALL,
        "messages_per_second": round(
            result.medians("service").calls_per_second * MESSAGES_PER_CALL
        ),
        "rows": await bench.check_rows(
            "append_many", result.answered("service") * MESSAGES_PER_CALL
        ),
    }


async def reads(bench: Bench) -> dict[str, Any]:
    """Read 20 messages, as the context of a prompt and as a page of a list."""
    keys = await bench.new_sessions_in("reads", messages=workload.SESSION_MESSAGES)
    runs_by_method: dict[str, list[dict[str, Any]]] = {"GetContext": [], "ListMessages": []}
    async with (
        bench.environment.service("reads") as service,
        bench.environment.reference_server("echo") as echo,
    ):
        for method, bodies in (
            ("GetContext", workload.context_bodies(keys)),
            ("ListMessages", workload.list_bodies(keys)),
        ):
            for in_flight in bench.plan.in_flight:
                subjects = [
                    Subject(server.name, server, method, bodies, cycle=True)
                    for server in (service, echo)
                ]
                result = await bench.compare(subjects, bench.read_load(in_flight))
                _check_same_replies(result)
                runs_by_method[method].append(result.as_dict())
    return {method: {"runs": runs} for method, runs in runs_by_method.items()}


def _check_same_replies(result: Comparison) -> None:
    sizes = [result.medians(name).bytes_per_reply for name in result.rounds]
    if max(sizes) > 1.05 * min(sizes):
        raise BenchError(
            f"the replies of {' and '.join(result.rounds)} differ in size: {sizes} bytes"
        )


async def contention(bench: Bench) -> dict[str, Any]:
    """Compare concurrent appends to one session with concurrent appends to many sessions."""
    keys = await bench.new_sessions_in("contention", SESSIONS + 1)
    load = bench.write_load(TYPICAL_IN_FLIGHT)
    async with bench.environment.service("contention") as service:
        subjects = [
            Subject("one session", service, "AppendMessages", bench.append_bodies(keys[:1], load)),
            Subject(
                "many sessions", service, "AppendMessages", bench.append_bodies(keys[1:], load)
            ),
        ]
        result = await bench.compare(subjects, load)
    acknowledged = result.answered("one session", "many sessions")
    return {
        "runs": [result.as_dict()],
        "rows": await bench.check_rows("contention", acknowledged),
    }


async def pooler(bench: Bench) -> dict[str, Any]:
    """Compare appends through PgBouncer in transaction mode with appends without it.

    Only the connections without PgBouncer keep prepared statements.
    """
    if pgbouncer.find_program() is None:
        return {"skipped": "pgbouncer is not installed (apt-get install pgbouncer)"}
    keys = await bench.new_sessions_in("pooler")
    results: list[Comparison] = []
    with PgBouncer(bench.environment.database_url("postgres")) as bouncer:
        async with (
            bench.environment.service(
                "pooler", "pooled", DATABASE_URL=bouncer.url("pooler")
            ) as pooled,
            bench.environment.service("pooler", "direct") as direct,
        ):
            for in_flight in (1, TYPICAL_IN_FLIGHT):
                load = bench.write_load(in_flight)
                bodies = bench.append_bodies(keys, load)
                subjects = [
                    Subject(server.name, server, "AppendMessages", bodies)
                    for server in (pooled, direct)
                ]
                results.append(await bench.compare(subjects, load))
    acknowledged = sum(result.answered("pooled", "direct") for result in results)
    return {
        "runs": [result.as_dict() for result in results],
        "rows": await bench.check_rows("pooler", acknowledged),
    }


async def growth(bench: Bench) -> dict[str, Any]:
    """Append and read, one call at a time, on databases of increasing size."""
    async with AsyncExitStack() as exit_stack:
        keys: dict[str, list[Session]] = {}
        services: dict[str, Server] = {}
        for stored in bench.plan.stored:
            name = str(stored)
            keys[name] = await bench.new_sessions_in(
                name, stored // workload.SESSION_MESSAGES, workload.SESSION_MESSAGES
            )
            services[name] = await exit_stack.enter_async_context(
                bench.environment.service(name, f"service-{name}")
            )

        async def measure(
            method: str, bodies: Callable[[str], workload.Bodies], load: Load
        ) -> dict[str, Any]:
            subjects = [
                Subject(
                    name, services[name], method, bodies(name), cycle=method != "AppendMessages"
                )
                for name in reversed(services)
            ]
            return (await bench.compare(subjects, load)).as_dict()

        reading, writing = bench.read_load(1), bench.write_load(1)
        return {
            "stored": list(bench.plan.stored),
            "GetContext": await measure(
                "GetContext", lambda name: workload.context_bodies(keys[name]), reading
            ),
            "ListMessages": await measure(
                "ListMessages", lambda name: workload.list_bodies(keys[name]), reading
            ),
            "AppendMessages": await measure(
                "AppendMessages", lambda name: bench.append_bodies(keys[name], writing), writing
            ),
        }


async def long_session(bench: Bench) -> dict[str, Any]:
    """Page through a very long session, and measure pages at its start, middle and end.

    The service's memory is sampled under load and while a client reads all pages.
    """
    sessions = await bench.new_sessions_in("long", messages=workload.SESSION_MESSAGES)
    [long_session_key] = workload.new_sessions(1)
    async with bench.environment.connect("long") as connection:
        await workload.seed(connection, [long_session_key], bench.plan.long_session)
    async with bench.environment.service("long") as service:
        memory = await _memory_under_load(bench, service, sessions)
        async with _peak_memory(service) as peak_bytes:
            tokens = await _page_through(bench, service, long_session_key)
        memory |= {"paging_peak": peak_bytes(), "pages": len(tokens)}
        page_tokens = {"start": tokens[0], "middle": tokens[len(tokens) // 2], "end": tokens[-1]}
        pages = await bench.compare(
            [
                Subject(
                    position,
                    service,
                    "ListMessages",
                    workload.list_bodies([long_session_key], token),
                    cycle=True,
                )
                for position, token in reversed(page_tokens.items())
            ],
            bench.read_load(1),
        )
        bodies = workload.context_bodies([long_session_key])
        context = await bench.compare(
            [Subject("context", service, "GetContext", bodies, cycle=True)], bench.read_load(1)
        )
    return {
        "messages": bench.plan.long_session,
        "pages": pages.as_dict(),
        "context": context.as_dict(),
        "memory": memory,
    }


async def _memory_under_load(
    bench: Bench, service: Server, sessions: Sequence[Session]
) -> dict[str, Any]:
    """Return the service's memory in bytes: idle, after each of four loads, and the peak."""
    await asyncio.sleep(2)
    memory: dict[str, Any] = {"idle": service.rss_bytes, "load": []}
    load = Load(TYPICAL_IN_FLIGHT, bench.plan.memory_seconds / 4, 0.0)
    appends = Subject("service", service, "AppendMessages", bench.append_bodies(sessions, load))
    contexts = Subject(
        "service", service, "GetContext", workload.context_bodies(sessions), cycle=True
    )
    async with _peak_memory(service) as peak_bytes:
        for subject in (appends, contexts, appends, contexts):
            bench.progress.expect(1)
            await compare(bench.environment, [subject], load, 1, bench.progress.advance)
            memory["load"].append(service.rss_bytes)
    return memory | {"load_peak": peak_bytes()}


@asynccontextmanager
async def _peak_memory(server: Server) -> AsyncIterator[Callable[[], int]]:
    """Sample a server's memory during the block and yield a function that returns the peak."""
    peak_bytes = server.rss_bytes

    async def watch() -> None:
        nonlocal peak_bytes
        while True:
            peak_bytes = max(peak_bytes, server.rss_bytes)
            await asyncio.sleep(0.05)

    task = asyncio.create_task(watch())
    try:
        yield lambda: peak_bytes
    finally:
        task.cancel()


async def _page_through(bench: Bench, service: Server, session: Session) -> list[str]:
    """Read all pages of a session as a client does and return their tokens, the first one empty."""
    page_size = 1000
    bench.progress.expect(bench.plan.long_session // page_size)
    tokens = [""]
    message_count = 0
    async with service.stub() as stub:
        while True:
            reply = await stub.ListMessages(
                message_pb2.ListMessagesRequest(
                    user_id=session.user_id,
                    session_id=session.id,
                    page_size=page_size,
                    page_token=tokens[-1],
                ),
                timeout=30,
            )
            for message in reply.messages:
                message_count += 1
                if message.seq != message_count:
                    raise BenchError(
                        f"long session: expected seq {message_count}, got {message.seq}"
                    )
            bench.progress.advance()
            if not reply.next_page_token:
                break
            tokens.append(reply.next_page_token)
    if message_count != bench.plan.long_session:
        raise BenchError(
            f"long session: read {message_count} of {bench.plan.long_session} messages"
        )
    return tokens


async def baseline(bench: Bench) -> dict[str, Any]:
    """Compare the service with FastAPI and SQLAlchemy's ORM on the same tables."""
    keys = await bench.new_sessions_in("baseline", messages=workload.SESSION_MESSAGES)
    writing, reading = bench.write_load(TYPICAL_IN_FLIGHT), bench.read_load(TYPICAL_IN_FLIGHT)
    async with (
        bench.environment.service("baseline") as service,
        bench.environment.reference_server("baseline", "baseline") as plain,
    ):
        listed = await bench.compare(
            [
                Subject("service", service, "ListMessages", workload.list_bodies(keys), cycle=True),
                Subject(
                    "baseline", plain, "", workload.http_list_bodies(keys), cycle=True, http1=True
                ),
            ],
            reading,
        )
        count = body_count(writing)
        appended = await bench.compare(
            [
                Subject("service", service, "AppendMessages", workload.append_bodies(keys, count)),
                Subject(
                    "baseline", plain, "", workload.http_append_bodies(keys, count), http1=True
                ),
            ],
            writing,
        )
    acknowledged = appended.answered("service", "baseline") + SESSIONS * workload.SESSION_MESSAGES
    return {
        "ListMessages": listed.as_dict(),
        "AppendMessages": appended.as_dict(),
        "rows": await bench.check_rows("baseline", acknowledged),
    }


async def pipeline(bench: Bench) -> dict[str, Any]:
    """Measure the pipeline that every call passes.

    Each layer is measured in this process, and the whole pipeline around the echo over the wire.
    """
    costs = await pipeline_costs.measure()
    load = bench.write_load(TYPICAL_IN_FLIGHT)
    bodies = workload.append_bodies(workload.new_sessions(SESSIONS), body_count(load))
    async with (
        bench.environment.reference_server("pipeline_echo") as pipeline_echo,
        bench.environment.reference_server("echo") as echo,
    ):
        subjects = [
            Subject(server.name, server, "AppendMessages", bodies, cycle=True)
            for server in (pipeline_echo, echo)
        ]
        result = await bench.compare(subjects, load)
    return {"layers": costs, "runs": [result.as_dict()]}


@dataclass(frozen=True)
class Variant:
    """A configuration of the service that differs from the default."""

    settings: dict[str, str]
    headers: Sequence[str] = ()
    """Metadata of the calls, each as `name:value`."""


def with_jwt() -> Variant:
    """Return the variant with JWT identity. Every call carries the same service token."""
    key = secrets.token_urlsafe(48)
    claims = {"sub": "bench", "scope": SERVICE_SCOPE, "exp": int(time.time()) + 24 * 3600}
    token = jwt.encode(claims, key, algorithm="HS256")
    settings = {"CHAT_HISTORY_AUTH": "jwt", "CHAT_HISTORY_JWT_KEY": key}
    return Variant(settings, (f"authorization:Bearer {token}",))


def with_search_and_jwt() -> Variant:
    """Return the variant with JWT identity and semantic search."""
    identity = with_jwt()
    return Variant(identity.settings | {"CHAT_HISTORY_SEARCH": "on"}, identity.headers)


VARIANTS: dict[str, Callable[[], Variant]] = {
    "JWT identity": with_jwt,
    "search on, JWT identity": with_search_and_jwt,
}


async def variants(bench: Bench) -> dict[str, Any]:
    """Compare the service in other configurations with the service as in the other scenarios."""
    keys = await bench.new_sessions_in("variants", messages=workload.SESSION_MESSAGES)
    writing, reading = bench.write_load(TYPICAL_IN_FLIGHT), bench.read_load(TYPICAL_IN_FLIGHT)
    count = body_count(writing)
    results: dict[str, Any] = {}
    acknowledged = SESSIONS * workload.SESSION_MESSAGES
    for number, (name, new_variant) in enumerate(VARIANTS.items()):
        variant = new_variant()
        async with (
            bench.environment.service("variants") as default,
            bench.environment.service(
                "variants", f"variant-{number}", **variant.settings
            ) as configured,
        ):
            results[name] = {}
            for method, bodies, load in (
                ("GetContext", workload.context_bodies(keys), reading),
                ("ListMessages", workload.list_bodies(keys), reading),
                ("AppendMessages", workload.append_bodies(keys, count), writing),
            ):
                cycle = method != "AppendMessages"
                subjects = [
                    Subject(
                        "variant", configured, method, bodies, cycle=cycle, headers=variant.headers
                    ),
                    Subject("service", default, method, bodies, cycle=cycle),
                ]
                result = await bench.compare(subjects, load)
                results[name][method] = result.as_dict()
                acknowledged += 0 if cycle else result.answered("variant", "service")
    return {"variants": results, "rows": await bench.check_rows("variants", acknowledged)}


SCENARIOS: dict[str, Callable[[Bench], Awaitable[dict[str, Any]]]] = {
    "append": append,
    "append_many": append_many,
    "reads": reads,
    "pipeline": pipeline,
    "contention": contention,
    "pooler": pooler,
    "growth": growth,
    "long_session": long_session,
    "baseline": baseline,
    "variants": variants,
    "search": search,
}
"""All scenarios, in the order in which they run."""
