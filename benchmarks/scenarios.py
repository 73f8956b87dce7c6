"""What is measured. Each scenario starts its servers on a database of its own and returns what goes into the file of results."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import jwt
from chathistory.v1 import message_pb2

from benchmarks import pipeline_costs, workload
from benchmarks.comparison import Comparison, Subject, compare
from benchmarks.environment import Environment, Server
from benchmarks.load_generator import BenchError, Load
from benchmarks.search_scenario import search
from benchmarks.workload import Session
from service.auth.bearer import SERVICE_SCOPE
from tests.support import pgbouncer
from tests.support.pgbouncer import PgBouncer

SESSIONS = 200
BATCH = 50
"""Messages in a call that carries many."""
TYPICAL = 64
"""Calls in flight where only one number is looked at."""
_CALLS_PER_SECOND = 12_000
"""More than any server answers: so many bodies are made."""


@dataclass(frozen=True)
class Plan:
    """How long and how much."""

    rounds: int = 5
    seconds: float = 2.5
    read_seconds: float = 1.5
    warmup: float = 0.5
    in_flight: tuple[int, ...] = (1, 16, 64, 256)
    stored: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    long_session: int = 1_000_000
    memory_seconds: float = 20.0
    chunks: tuple[int, ...] = (1_000, 10_000)
    """Of one user, when documents are searched."""
    searches: int = 60


FULL = Plan()
QUICK = Plan(
    rounds=2, seconds=0.4, read_seconds=0.3, warmup=0.1, in_flight=(1, 64), stored=(10_000, 50_000), long_session=20_000,
    memory_seconds=1.5, chunks=(500, 1_000), searches=20,
)  # fmt: skip


class ProgressListener(Protocol):
    """Who is told how far it is."""

    def expect(self, steps: int) -> None:
        """Take so many more steps into account."""

    def advance(self) -> None:
        """Note that a step is done."""


class Bench:
    """A plan on a stack."""

    def __init__(self, environment: Environment, plan: Plan, progress: ProgressListener) -> None:
        self.environment = environment
        self.plan = plan
        self.progress = progress

    async def compare(self, subjects: Sequence[Subject], load: Load) -> Comparison:
        """Compare as the plan says."""
        rounds = self.plan.rounds
        self.progress.expect(rounds * len(subjects))
        return await compare(self.environment, subjects, load, rounds, self.progress.advance)

    def write_load(self, in_flight: int) -> Load:
        """Return the load of a scenario that writes."""
        return Load(in_flight, self.plan.seconds, self.plan.warmup)

    def read_load(self, in_flight: int) -> Load:
        """Return the load of a scenario that reads."""
        return Load(in_flight, self.plan.read_seconds, self.plan.warmup)

    def append_bodies(
        self, sessions: Sequence[Session], load: Load, messages: int = 1
    ) -> workload.Bodies:
        """Return bodies enough for one load."""
        return workload.append_bodies(sessions, body_count(load, messages), messages)

    async def new_sessions_in(
        self, database: str, sessions: int = SESSIONS, messages: int = 0
    ) -> list[Session]:
        """Make a database with sessions in it."""
        await self.environment.new_database(database)
        keys = workload.new_sessions(sessions)
        async with self.environment.connect(database) as connection:
            await workload.seed(connection, keys, messages)
        return keys

    async def check_rows(self, database: str, acknowledged: int) -> dict[str, Any]:
        """Compare what is stored with what was acknowledged.

        Raises:
            BenchError: a message is missing, or there is one too many.
        """
        async with self.environment.connect(database) as connection:
            stored, whole = await workload.count_rows(connection)
            [(updated, hot)] = await connection.fetch(
                "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'chat_sessions'"
            )
        if stored != acknowledged or not whole:
            raise BenchError(
                f"{acknowledged} messages were acknowledged and {stored} are stored; without a gap: {whole}"
            )
        return {
            "acknowledged": acknowledged,
            "stored": stored,
            "session_updates": updated,
            "hot_updates": hot,
        }


def body_count(load: Load, messages: int = 1) -> int:
    """Return how many bodies are more than a server can take in during a load."""
    return int(_CALLS_PER_SECOND / messages**0.4 * (load.seconds + load.warmup)) + load.in_flight


async def append(bench: Bench) -> dict[str, Any]:
    """Append one message a call; alone also beside the same statement by asyncpg directly."""
    keys = await bench.new_sessions_in("append")
    found: list[Comparison] = []
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
            found.append(await bench.compare(subjects, load))
    acknowledged = sum(
        result.answered(*(name for name in ("service", "direct") if name in result.rounds))
        for result in found
    )
    return {
        "runs": [result.as_dict() for result in found],
        "rows": await bench.check_rows("append", acknowledged),
    }


async def append_many(bench: Bench) -> dict[str, Any]:
    """Append many messages a call."""
    keys = await bench.new_sessions_in("append_many")
    load = bench.write_load(TYPICAL)
    async with (
        bench.environment.service("append_many") as service,
        bench.environment.reference_server("echo") as echo,
    ):
        bodies = bench.append_bodies(keys, load, BATCH)
        subjects = [
            Subject("service", service, "AppendMessages", bodies),
            Subject("echo", echo, "AppendMessages", bodies, cycle=True),
        ]
        result = await bench.compare(subjects, load)
    return {
        "runs": [result.as_dict()],
        "messages_per_call": BATCH,
        "messages_per_second": round(result.medians("service").calls_per_second * BATCH),
        "rows": await bench.check_rows("append_many", result.answered("service") * BATCH),
    }


async def reads(bench: Bench) -> dict[str, Any]:
    """Read 20 messages: what goes into a prompt, and a page."""
    keys = await bench.new_sessions_in("reads", messages=workload.SESSION_MESSAGES)
    found: dict[str, list[dict[str, Any]]] = {"GetContext": [], "ListMessages": []}
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
                found[method].append(result.as_dict())
    return {method: {"runs": runs} for method, runs in found.items()}


def _check_same_replies(result: Comparison) -> None:
    sizes = [result.medians(name).bytes_per_reply for name in result.rounds]
    if max(sizes) > 1.05 * min(sizes):
        raise BenchError(
            f"the replies of {' and '.join(result.rounds)} are not alike: {sizes} bytes"
        )


async def contention(bench: Bench) -> dict[str, Any]:
    """Write to one session from many callers, beside as many who write to sessions of their own."""
    keys = await bench.new_sessions_in("contention", SESSIONS + 1)
    load = bench.write_load(TYPICAL)
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
    """Append through PgBouncer in transaction mode, beside the direct way, where statements are prepared and kept."""
    if pgbouncer.program() is None:
        return {"skipped": "pgbouncer is not installed (apt-get install pgbouncer)"}
    keys = await bench.new_sessions_in("pooler")
    found: list[Comparison] = []
    with PgBouncer(bench.environment.database_url("postgres")) as bouncer:
        async with (
            bench.environment.service(
                "pooler", "pooled", DATABASE_URL=bouncer.url("pooler")
            ) as pooled,
            bench.environment.service("pooler", "direct") as direct,
        ):
            for in_flight in (1, TYPICAL):
                load = bench.write_load(in_flight)
                bodies = bench.append_bodies(keys, load)
                subjects = [
                    Subject(server.name, server, "AppendMessages", bodies)
                    for server in (pooled, direct)
                ]
                found.append(await bench.compare(subjects, load))
    acknowledged = sum(result.answered("pooled", "direct") for result in found)
    return {
        "runs": [result.as_dict() for result in found],
        "rows": await bench.check_rows("pooler", acknowledged),
    }


async def growth(bench: Bench) -> dict[str, Any]:
    """Append and read, one call at a time, with ever more messages stored."""
    async with AsyncExitStack() as running:
        keys: dict[str, list[Session]] = {}
        services: dict[str, Server] = {}
        for stored in bench.plan.stored:
            name = str(stored)
            keys[name] = await bench.new_sessions_in(
                name, stored // workload.SESSION_MESSAGES, workload.SESSION_MESSAGES
            )
            services[name] = await running.enter_async_context(
                bench.environment.service(name, f"service-{name}")
            )

        async def measured(
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
            "GetContext": await measured(
                "GetContext", lambda name: workload.context_bodies(keys[name]), reading
            ),
            "ListMessages": await measured(
                "ListMessages", lambda name: workload.list_bodies(keys[name]), reading
            ),
            "AppendMessages": await measured(
                "AppendMessages", lambda name: bench.append_bodies(keys[name], writing), writing
            ),
        }


async def long_session(bench: Bench) -> dict[str, Any]:
    """Read one very long session page by page, and pages at its start, middle and end; watch the service's memory."""
    sessions = await bench.new_sessions_in("long", messages=workload.SESSION_MESSAGES)
    [long] = workload.new_sessions(1)
    async with bench.environment.connect("long") as connection:
        await workload.seed(connection, [long], bench.plan.long_session)
    async with bench.environment.service("long") as service:
        await asyncio.sleep(2)
        memory: dict[str, Any] = {"idle": service.rss, "load": []}
        load = Load(TYPICAL, bench.plan.memory_seconds / 4, 0.0)
        async with _peak_memory(service) as peak:
            for subject in [
                Subject("service", service, "AppendMessages", bench.append_bodies(sessions, load)),
                Subject(
                    "service", service, "GetContext", workload.context_bodies(sessions), cycle=True
                ),
            ] * 2:
                bench.progress.expect(1)
                await compare(bench.environment, [subject], load, 1, bench.progress.advance)
                memory["load"].append(service.rss)
        memory["load_peak"] = peak()
        async with _peak_memory(service) as peak:
            tokens = await _page_through(bench, service, long)
        memory["paging_peak"] = peak()
        memory["pages"] = len(tokens)
        places = {"start": tokens[0], "middle": tokens[len(tokens) // 2], "end": tokens[-1]}
        subjects = [
            Subject(place, service, "ListMessages", workload.list_bodies([long], token), cycle=True)
            for place, token in reversed(places.items())
        ]
        pages = await bench.compare(subjects, bench.read_load(1))
        context = Subject(
            "context", service, "GetContext", workload.context_bodies([long]), cycle=True
        )
        at_end = await bench.compare([context], bench.read_load(1))
    return {
        "messages": bench.plan.long_session,
        "pages": pages.as_dict(),
        "context": at_end.as_dict(),
        "memory": memory,
    }


@asynccontextmanager
async def _peak_memory(server: Server) -> AsyncIterator[Callable[[], int]]:
    """Watch a server's memory during a block, and say afterwards the most that it was."""
    most = server.rss

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, server.rss)
            await asyncio.sleep(0.05)

    task = asyncio.create_task(watch())
    try:
        yield lambda: most
    finally:
        task.cancel()


async def _page_through(bench: Bench, service: Server, session: Session) -> list[str]:
    """Read a session whole as a client does; return the token of every page, the first one's being empty."""
    page_size = 1000
    bench.progress.expect(bench.plan.long_session // page_size)
    tokens = [""]
    read = 0
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
                read += 1
                if message.seq != read:
                    raise BenchError(f"message {read} of the long session came as {message.seq}")
            bench.progress.advance()
            if not reply.next_page_token:
                break
            tokens.append(reply.next_page_token)
    if read != bench.plan.long_session:
        raise BenchError(f"{read} messages of the long session were read")
    return tokens


async def baseline(bench: Bench) -> dict[str, Any]:
    """Measure what one would write without the service."""
    keys = await bench.new_sessions_in("baseline", messages=workload.SESSION_MESSAGES)
    writing, reading = bench.write_load(TYPICAL), bench.read_load(TYPICAL)
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
    """Measure what every call passes: each layer in this process, and all of it around the echo."""
    costs = await pipeline_costs.measure()
    load = bench.write_load(TYPICAL)
    bodies = workload.append_bodies(workload.new_sessions(SESSIONS), body_count(load))
    async with (
        bench.environment.reference_server("behind") as behind,
        bench.environment.reference_server("echo") as echo,
    ):
        subjects = [
            Subject(server.name, server, "AppendMessages", bodies, cycle=True)
            for server in (behind, echo)
        ]
        result = await bench.compare(subjects, load)
    return {"layers": costs, "runs": [result.as_dict()]}


@dataclass(frozen=True)
class Variant:
    """The service, configured otherwise."""

    settings: dict[str, str]
    headers: Sequence[str] = ()
    """What calls carry then."""


def with_jwt() -> Variant:
    """Return the variant whose callers prove who they are; the caller is a service, the same in every call."""
    key = secrets.token_urlsafe(48)
    claims = {"sub": "bench", "scope": SERVICE_SCOPE, "exp": int(time.time()) + 24 * 3600}
    token = jwt.encode(claims, key, algorithm="HS256")
    settings = {"CHAT_HISTORY_AUTH": "jwt", "CHAT_HISTORY_JWT_KEY": key}
    return Variant(settings, (f"authorization:Bearer {token}",))


def with_search_and_jwt() -> Variant:
    """Return the variant of a service that does all it can: search by meaning too."""
    identity = with_jwt()
    return Variant(identity.settings | {"CHAT_HISTORY_SEARCH": "on"}, identity.headers)


VARIANTS: dict[str, Callable[[], Variant]] = {
    "JWT identity": with_jwt,
    "search on, JWT identity": with_search_and_jwt,
}


async def variants(bench: Bench) -> dict[str, Any]:
    """Measure the service configured otherwise, beside itself as in the other scenarios."""
    keys = await bench.new_sessions_in("variants", messages=workload.SESSION_MESSAGES)
    writing, reading = bench.write_load(TYPICAL), bench.read_load(TYPICAL)
    count = body_count(writing)
    found: dict[str, Any] = {}
    acknowledged = SESSIONS * workload.SESSION_MESSAGES
    for number, (name, make) in enumerate(VARIANTS.items()):
        variant = make()
        async with (
            bench.environment.service("variants") as plain,
            bench.environment.service("variants", f"variant-{number}", **variant.settings) as other,
        ):
            found[name] = {}
            for method, bodies, load in (
                ("GetContext", workload.context_bodies(keys), reading),
                ("ListMessages", workload.list_bodies(keys), reading),
                ("AppendMessages", workload.append_bodies(keys, count), writing),
            ):
                cycle = method != "AppendMessages"
                subjects = [
                    Subject("variant", other, method, bodies, cycle=cycle, headers=variant.headers),
                    Subject("service", plain, method, bodies, cycle=cycle),
                ]
                result = await bench.compare(subjects, load)
                found[name][method] = result.as_dict()
                acknowledged += 0 if cycle else result.answered("variant", "service")
    return {"variants": found, "rows": await bench.check_rows("variants", acknowledged)}


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
