"""A plan of a benchmark run, and `Bench`, which runs comparisons as the plan says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks import workload
from benchmarks.comparison import Comparison, Subject, compare
from benchmarks.environment import Environment
from benchmarks.load_generator import BenchError, Load
from benchmarks.workload import Session

SESSIONS = 200
"""Sessions that a scenario stores unless it needs another number."""
TYPICAL_IN_FLIGHT = 64
"""Calls in flight in the scenarios that do not vary this number."""
_MAX_CALLS_PER_SECOND = 12_000
"""More than any server answers. Determines the number of request bodies to prepare."""


@dataclass(frozen=True)
class Plan:
    """Durations and sizes of a run."""

    rounds: int = 5
    seconds: float = 2.5
    """Duration of a measurement that writes."""
    read_seconds: float = 1.5
    """Duration of a measurement that reads."""
    warmup: float = 0.5
    """Seconds of load before each measurement."""
    in_flight: tuple[int, ...] = (1, 16, 64, 256)
    """Concurrent calls that scenarios measure in turn."""
    stored: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Messages in the databases of the growth scenario."""
    long_session: int = 1_000_000
    """Messages in the long session."""
    memory_seconds: float = 20.0
    """Seconds of load during which memory is measured."""
    chunks: tuple[int, ...] = (1_000, 10_000)
    """Chunks that one user has stored when documents are searched."""
    searches: int = 60
    """Searches that are measured for each number of chunks."""


FULL = Plan()
QUICK = Plan(
    rounds=2,
    seconds=0.4,
    read_seconds=0.3,
    warmup=0.1,
    in_flight=(1, 64),
    stored=(10_000, 50_000),
    long_session=20_000,
    memory_seconds=1.5,
    chunks=(500, 1_000),
    searches=20,
)


class ProgressListener(Protocol):
    """Receives the progress of a scenario."""

    def expect(self, steps: int) -> None:
        """Add to the number of expected steps."""

    def advance(self) -> None:
        """Count one step as done."""


class Bench:
    """Runs comparisons in an environment according to a plan."""

    def __init__(self, environment: Environment, plan: Plan, progress: ProgressListener) -> None:
        self.environment = environment
        self.plan = plan
        self.progress = progress

    async def compare(self, subjects: Sequence[Subject], load: Load) -> Comparison:
        """Measure the subjects in turn, for as many rounds as planned."""
        rounds = self.plan.rounds
        self.progress.expect(rounds * len(subjects))
        return await compare(self.environment, subjects, load, rounds, self.progress.advance)

    def write_load(self, in_flight: int) -> Load:
        """Return the load of a measurement that writes."""
        return Load(in_flight, self.plan.seconds, self.plan.warmup)

    def read_load(self, in_flight: int) -> Load:
        """Return the load of a measurement that reads."""
        return Load(in_flight, self.plan.read_seconds, self.plan.warmup)

    def append_bodies(
        self, sessions: Sequence[Session], load: Load, messages: int = 1
    ) -> workload.Bodies:
        """Return enough AppendMessages bodies for one measurement under this load."""
        return workload.append_bodies(sessions, body_count(load, messages), messages)

    async def new_sessions_in(
        self, database: str, sessions: int = SESSIONS, messages: int = 0
    ) -> list[Session]:
        """Create a database with sessions of that many messages each."""
        await self.environment.new_database(database)
        keys = workload.new_sessions(sessions)
        async with self.environment.connect(database) as connection:
            await workload.seed(connection, keys, messages)
        return keys

    async def check_rows(self, database: str, acknowledged: int) -> dict[str, Any]:
        """Compare the stored messages with the acknowledged ones and return both counts.

        Raises:
            BenchError: messages are missing or superfluous.
        """
        async with self.environment.connect(database) as connection:
            stored, is_gapless = await workload.count_rows(connection)
            [(updated, hot)] = await connection.fetch(
                "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables "
                "WHERE relname = 'chat_sessions'"
            )
        if stored != acknowledged or not is_gapless:
            gaps = "no session has a gap" if is_gapless else "some sessions have gaps"
            raise BenchError(
                f"database {database}: {acknowledged} messages were acknowledged and {stored} "
                f"are stored; {gaps}"
            )
        return {
            "acknowledged": acknowledged,
            "stored": stored,
            "session_updates": updated,
            "hot_updates": hot,
        }


def body_count(load: Load, messages: int = 1) -> int:
    """Return a number of request bodies that no server exhausts under this load."""
    calls_per_second = _MAX_CALLS_PER_SECOND / messages**0.4
    return int(calls_per_second * (load.seconds + load.warmup)) + load.in_flight
