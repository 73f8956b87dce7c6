"""The `chat-history` command, as a person meets it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from chathistory.v1 import chat_history_service_pb2_grpc, user_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

import service
from service.embedded.data_dir import Postmaster, is_postgres, owner, running_url
from service.store import tables
from tests.cli.conftest import Command, Start
from tests.support.cluster import fetch

SECRET = "s3cret"
READY = "Ctrl-C"
IDLE_MEGABYTES = 130


def address(command: Command) -> str:
    found = re.search(r"gRPC +(\S+)", command.wait_for(READY))
    assert found
    return found[1]


def healthy(at: str) -> bool:
    with grpc.insecure_channel(at) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(  # type: ignore[attr-defined]
            health_pb2.HealthCheckRequest(service=""), timeout=5
        )
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def stub_call(at: str, email: str, *, create: bool) -> str:
    """Create a user or find it, and return its id."""
    with grpc.insecure_channel(at) as channel:
        stub = chat_history_service_pb2_grpc.ChatHistoryServiceStub(channel)
        if create:
            return stub.CreateUser(
                user_pb2.CreateUserRequest(user=user_pb2.User(email=email)), timeout=5
            ).user.id
        return stub.GetUser(user_pb2.GetUserRequest(email=email), timeout=5).user.id


def postmaster(folder: Path) -> Postmaster:
    found = Postmaster.read(folder / ".data" / "postgres")
    assert found is not None
    return found


def test_the_version_is_told(start: Start) -> None:
    command = start("--version")
    assert command.wait() == 0
    assert command.out.read_text() == f"chat-history {service.__version__}\n"


@pytest.mark.parametrize(
    ("command", "environment", "words"),
    [
        (
            "serve",
            {"CHAT_HISTORY_LISTEN": "nowhere"},
            ["CHAT_HISTORY_LISTEN: 'nowhere' is not an address of the form host:port"],
        ),
        (
            "migrate",
            {"CHAT_HISTORY_LISTEN": "0.0.0.0:50051"},
            ["CHAT_HISTORY_LISTEN=0.0.0.0:50051 is not a loopback address"],
        ),
        (
            "serve",
            {"CHAT_HISTORY_DB_POOL_SIZE": SECRET, "CHAT_HISTORY_AUTH": SECRET},
            ["CHAT_HISTORY_DB_POOL_SIZE: input", "CHAT_HISTORY_AUTH: input"],
        ),
        ("check", {"DATABASE_URL": f"mysql://u:{SECRET}@h/d"}, ["the database URL is for mysql"]),
        (
            "serve",
            {"NEON_DATABASE_URL": f"{SECRET}"},
            ["the database URL is not of the form postgresql://"],
        ),
    ],
)
def test_bad_configuration_is_told_before_anything_starts(
    start: Start, folder: Path, command: str, environment: dict[str, str], words: list[str]
) -> None:
    run = start(command, **environment)
    assert run.wait() == 2
    lines = run.said.splitlines()
    assert len(lines) == len(words)
    for line, expected in zip(lines, words, strict=True):
        assert line.startswith("chat-history: bad configuration: ")
        assert expected in line
    assert SECRET not in run.said
    assert run.out.read_text() == ""
    assert not (folder / ".data").exists()


async def test_migrate_says_from_where_to_where(start: Start, empty_database_url: str) -> None:
    def migrate() -> str:
        command = start("migrate", DATABASE_URL=empty_database_url)
        assert command.wait() == 0
        return command.said

    assert await asyncio.to_thread(migrate) == (
        f"chat-history: migrated the schema from nothing to revision {tables.BUILD:04d}\n"
    )
    assert await asyncio.to_thread(migrate) == (
        f"chat-history: nothing to do: the schema is at revision {tables.BUILD:04d}\n"
    )


async def test_migrate_fails_where_the_schema_needs_a_newer_build(
    start: Start, database_url: str
) -> None:
    await fetch(database_url, f"UPDATE schema_info SET min_build = {tables.BUILD + 1}")
    command = start("migrate", DATABASE_URL=database_url)
    assert await asyncio.to_thread(command.wait) == 1
    assert "deploy a newer one" in command.said


def test_migrate_without_configuration_leaves_nothing_running(start: Start, folder: Path) -> None:
    command = start("migrate")
    assert command.wait() == 0
    assert "from nothing to" in command.said
    assert running_url(folder / ".data") is None


async def checked(start: Start, url: str, **environment: str) -> tuple[int, str]:
    command = start("check", DATABASE_URL=url, **environment)
    code = await asyncio.to_thread(command.wait)
    assert command.said == ""
    said = command.out.read_text()
    assert SECRET not in said
    return code, said


async def test_check_tells_all_when_all_is_well(start: Start, database_url: str) -> None:
    code, said = await checked(start, database_url)
    assert code == 0, said
    for words in (
        "DATABASE_URL", "from the environment", "PostgreSQL", "direct", "not needed on this machine", "prepared",
        "round trip", "the index is up to date", f"revision {tables.BUILD:04d}", "up to 12 connections for each process",
        "8 kept open, most recently used first; checked before use after 30 s idle, replaced after 240 s; connect timeout 12 s", "No problems.",
    ):  # fmt: skip
        assert words in said
    assert "todo" not in said


async def test_check_tells_what_the_search_index_owes(start: Start, database_url: str) -> None:
    owed = (
        "INSERT INTO search_outbox (kind, user_id, entity_id, since, through, owed_at, due_at, detail) VALUES "
        "($1, gen_random_uuid(), '0192f3a4-0000-7000-8000-000000000000', 0, 1, now() - interval '5 minutes', $2, 'refused')"
    )
    await fetch(database_url, owed, 2, datetime.now(UTC))
    await fetch(database_url, owed, 1, datetime.now(UTC) + timedelta(days=1))
    await fetch(database_url, "UPDATE search_outbox SET due_at = 'infinity' WHERE kind = 1")
    code, said = await checked(start, database_url)
    assert code == 0, said
    flat = " ".join(said.split())
    assert re.search(
        r"note search 1 documents and sessions wait to be indexed, the oldest for 30\d s", flat
    ), said
    assert (
        "1 could not be indexed, for example 0192f3a4-0000-7000-8000-000000000000 (refused)" in flat
    )


async def test_check_says_what_to_do(start: Start, empty_database_url: str) -> None:
    code, said = await checked(
        start, empty_database_url, CHAT_HISTORY_DB_POOL_SIZE="200", CHAT_HISTORY_LISTN="x"
    )
    assert code == 1
    assert re.search(
        r"todo +schema +the schema is at revision 0000.*run `chat-history migrate`", said
    )
    assert re.search(r"todo +pool +.*lower CHAT_HISTORY_DB_POOL_SIZE", said)
    assert re.search(
        r"note +configuration +CHAT_HISTORY_LISTN .* did you mean CHAT_HISTORY_LISTEN", said
    )
    assert "To do: 2." in said


async def test_check_sees_a_pooler_and_what_durability_lacks(
    start: Start, database_url: str
) -> None:
    name = database_url.split("/")[3].split("?", maxsplit=1)[0]
    await fetch(database_url, f"ALTER DATABASE {name} SET synchronous_commit = off")
    code, said = await checked(start, f"{database_url}&pgbouncer=true&gssencmode=disable")
    assert code == 1
    assert "through a transaction pooler" in said
    assert "not prepared" in said
    assert re.search(r"todo +synchronous_commit +off: a crash may lose", said)
    assert re.search(r"note +database URL +gssencmode", said)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ((r"/test_\d+\?", "/nowhere?"), 'database "nowhere" does not exist'),
        ((r"postgres@", f"nobody:{SECRET}@"), 'role "nobody" does not exist'),
        ((r"host=.*", "host=/nowhere"), "connection refused at the socket in /nowhere"),
        ((r"@/(.*)\?.*", r"@127.0.0.1:1/\1"), "connection refused at 127.0.0.1:1/"),
        (
            (r"@/(.*)\?.*", r"@no-such-host.invalid/\1"),
            "the host name no-such-host.invalid does not resolve",
        ),
    ],
)
async def test_check_says_why_it_cannot_connect(
    start: Start, empty_database_url: str, change: tuple[str, str], words: str
) -> None:
    code, said = await checked(start, re.sub(*change, empty_database_url))
    assert code == 1
    assert words in said
    assert "Traceback" not in said


def test_check_of_the_embedded_database_that_does_not_run(start: Start, folder: Path) -> None:
    command = start("check")
    assert command.wait() == 1
    assert (
        "not running; start it with `make run` or `chat-history serve`" in command.out.read_text()
    )
    assert not (folder / ".data").exists()


@pytest.mark.timeout(300)
def test_serve_with_nothing_configured(start: Start, folder: Path) -> None:
    serving = start("serve")
    at = address(serving)
    assert healthy(at)
    said = serving.out.read_text()
    assert f"embedded PostgreSQL in {folder}/.data/postgres" in said
    assert "\x1b" not in said
    user = stub_call(at, "ada@example.com", create=True)
    if (status := Path(f"/proc/{serving.process.pid}/status")).exists():
        resident = re.search(r"VmRSS:\s+(\d+) kB", status.read_text())
        assert resident
        assert int(resident[1]) < IDLE_MEGABYTES * 1000

    # Another one on the same folder.
    second = start("migrate")
    assert second.wait() == 0  # On the running one.
    second = start("check")
    assert second.wait() == 0
    assert f"process {serving.process.pid}, listening on {at}" in second.out.read_text()
    second = start("serve", "--migrate")
    assert second.wait() == 2
    assert second.said == (
        f"chat-history: ChatHistory is already running (process {serving.process.pid}, listening on {at}) "
        f"on this data folder: {folder}/.data\n"
    )
    assert healthy(at)

    # Ctrl-C in a terminal goes to the whole process group.
    os.killpg(serving.process.pid, signal.SIGINT)
    assert serving.wait() == 0
    assert serving.said.endswith("chat-history: stopped\n")
    assert "Traceback" not in serving.said
    assert running_url(folder / ".data") is None
    assert owner(folder / ".data") is None

    again = start("serve")
    assert stub_call(address(again), "ada@example.com", create=False) == user


def test_a_killed_service_is_taken_over(start: Start, folder: Path) -> None:
    first = start("serve")
    user = stub_call(address(first), "ada@example.com", create=True)
    orphan = postmaster(folder)
    first.process.kill()
    first.wait()
    assert is_postgres(orphan.pid)
    report = start("check")
    assert report.wait() == 1
    assert "not running, but its database is" in report.out.read_text()
    again = start("serve")
    assert stub_call(address(again), "ada@example.com", create=False) == user
    assert not is_postgres(orphan.pid)
    again.process.terminate()
    assert again.wait() == 0
    assert running_url(folder / ".data") is None


def test_a_closed_terminal_stops_in_good_order(start: Start, folder: Path) -> None:
    # Where the tests run under nohup it is ignored, and what they start would inherit that.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    serving = start("serve")
    signal.signal(signal.SIGHUP, before)
    address(serving)
    serving.process.send_signal(signal.SIGHUP)
    assert serving.wait() == 0
    assert running_url(folder / ".data") is None


@pytest.mark.parametrize(
    ("number", "delay"),
    [(signal.SIGINT, 0.5), (signal.SIGTERM, 0.8), (signal.SIGINT, 1.1), (signal.SIGTERM, 1.4)],
)
def test_a_stop_while_starting_leaves_nothing(
    start: Start, folder: Path, number: signal.Signals, delay: float
) -> None:
    serving = start("serve")
    time.sleep(delay)
    serving.process.send_signal(number)
    # Before Python has come to our first line, the signal itself ends it; before `serve` has read its configuration, the command line
    # does, as any that Ctrl-C interrupts: where nothing catches that, Python ends itself by SIGINT, whichever signal it was.
    assert serving.wait() in (0, -number, -signal.SIGINT, 1, 128 + number)
    if (pid_file := folder / ".data" / "postgres" / "postmaster.pid").exists():
        assert not postmaster(folder).is_alive(), pid_file.read_text()
    assert start("migrate").wait() == 0


_TOLD_IN_A_CALLBACK = """
import signal, sys, weakref
from service.cli import main, serve

migrate, number = serve.migrate_schema, int(sys.argv.pop())

class Thing:
    pass

def interrupted(*args, **options):
    migrate(*args, **options)
    thing = Thing()
    held = weakref.ref(thing, lambda _: signal.raise_signal(number))
    del thing

serve.migrate_schema = interrupted
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_not_lost_in_a_callback(
    start: Start, folder: Path, number: signal.Signals
) -> None:
    serving = start("serve", str(int(number)), program=("-c", _TOLD_IN_A_CALLBACK))
    assert serving.wait() == 0
    assert "Exception ignored" in serving.said
    assert "is running" not in serving.out.read_text()
    assert running_url(folder / ".data") is None


def test_an_address_in_use_is_told(start: Start, folder: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        command = start("serve", CHAT_HISTORY_LISTEN=taken)
        assert command.wait() == 1
    assert (
        f"chat-history: {taken} is in use: stop the process that uses it, or set CHAT_HISTORY_LISTEN to another address"
        in command.said.splitlines()
    )
    assert "Traceback" not in command.said
    assert running_url(folder / ".data") is None


async def test_serve_on_a_configured_database(
    start: Start, folder: Path, empty_database_url: str
) -> None:
    serving = start("serve", "--migrate", DATABASE_URL=empty_database_url)
    assert await asyncio.to_thread(lambda: healthy(address(serving)))
    assert "data    PostgreSQL at " in serving.out.read_text()
    assert "migrated the schema from nothing" in serving.said
    serving.process.terminate()
    assert await asyncio.to_thread(serving.wait) == 0
    assert not (folder / ".data" / "postgres").exists()


def test_serve_says_why_it_cannot_migrate(start: Start) -> None:
    command = start(
        "serve", "--migrate", DATABASE_URL=f"postgresql://u:{SECRET}@no-such-host.invalid/d"
    )
    assert command.wait() == 1
    assert command.said == (
        "chat-history: the host name no-such-host.invalid does not resolve: check DATABASE_URL and this machine's DNS\n"
    )
