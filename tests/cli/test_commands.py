"""The `chat-history` command, run as a process: output, exit codes and signals."""

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
from tests.support.statements import database_name

pytestmark = pytest.mark.faults  # Processes start and stop.

SECRET = "s3cret"
READY = "Ctrl-C"
MAX_IDLE_RESIDENT_KB = 130_000


def address_of(command: Command) -> str:
    """Wait until the server is ready, and return the address that it printed."""
    match = re.search(r"gRPC +(\S+)", command.wait_for(READY))
    assert match
    return match[1]


def is_serving(address: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(  # type: ignore[attr-defined]
            health_pb2.HealthCheckRequest(service=""), timeout=5
        )
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def create_user(address: str, email: str) -> str:
    """Create a user and return its id."""
    with grpc.insecure_channel(address) as channel:
        stub = chat_history_service_pb2_grpc.ChatHistoryServiceStub(channel)
        request = user_pb2.CreateUserRequest(user=user_pb2.User(email=email))
        return stub.CreateUser(request, timeout=5).user.id


def get_user(address: str, email: str) -> str:
    """Return the id of the user with this email."""
    with grpc.insecure_channel(address) as channel:
        stub = chat_history_service_pb2_grpc.ChatHistoryServiceStub(channel)
        return stub.GetUser(user_pb2.GetUserRequest(email=email), timeout=5).user.id


def postmaster_of(folder: Path) -> Postmaster:
    postmaster = Postmaster.read(folder / ".data" / "postgres")
    assert postmaster is not None
    return postmaster


def test_version_option_prints_the_version(start: Start) -> None:
    command = start("--version")
    assert command.wait() == 0
    assert command.stdout == f"chat-history {service.__version__}\n"


@pytest.mark.parametrize(
    ("name", "environment", "problems"),
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
            ["CHAT_HISTORY_DB_POOL_SIZE: must be", "CHAT_HISTORY_AUTH: input"],
        ),
        ("check", {"DATABASE_URL": f"mysql://u:{SECRET}@h/d"}, ["the database URL is for mysql"]),
        (
            "serve",
            {"NEON_DATABASE_URL": f"{SECRET}"},
            ["the database URL is not of the form postgresql://"],
        ),
        (
            "serve",
            {"DATABASE_URL_FILE": "missing"},
            ["DATABASE_URL_FILE: missing cannot be read: No such file or directory"],
        ),
        (
            "check",
            {"DATABASE_URL": "postgresql://u@h/d", "DATABASE_URL_FILE": "missing"},
            ["DATABASE_URL and DATABASE_URL_FILE (or NEON_…) exclude each other"],
        ),
        (
            "serve",
            {"DATABASE_READ_URL": f"{SECRET}"},
            ["DATABASE_READ_URL: the database URL is not of the form postgresql://"],
        ),
        (
            "serve",
            {"DATABASE_READ_URL": "postgresql://u@h/d"},
            ["DATABASE_READ_URL needs DATABASE_URL"],
        ),
    ],
)
def test_bad_configuration_is_reported_before_anything_starts(
    start: Start, folder: Path, name: str, environment: dict[str, str], problems: list[str]
) -> None:
    command = start(name, **environment)
    assert command.wait() == 2
    lines = command.stderr.splitlines()
    assert len(lines) == len(problems)
    for line, problem in zip(lines, problems, strict=True):
        assert line.startswith("chat-history: bad configuration: ")
        assert problem in line
    assert SECRET not in command.stderr
    assert command.stdout == ""
    assert not (folder / ".data").exists()


async def test_migrate_reports_the_revisions_before_and_after(
    start: Start, empty_database_url: str
) -> None:
    def migrate() -> str:
        command = start("migrate", DATABASE_URL=empty_database_url)
        assert command.wait() == 0
        return command.stderr

    assert await asyncio.to_thread(migrate) == (
        f"chat-history: migrated the schema from nothing to revision {tables.BUILD:04d}\n"
    )
    assert await asyncio.to_thread(migrate) == (
        f"chat-history: nothing to do: the schema is at revision {tables.BUILD:04d}\n"
    )


async def test_migrate_fails_when_the_schema_requires_a_newer_build(
    start: Start, database_url: str
) -> None:
    await fetch(database_url, f"UPDATE schema_info SET min_build = {tables.BUILD + 1}")
    command = start("migrate", DATABASE_URL=database_url)
    assert await asyncio.to_thread(command.wait) == 1
    assert "deploy a newer one" in command.stderr


def test_migrate_without_configuration_leaves_no_postgres_running(
    start: Start, folder: Path
) -> None:
    command = start("migrate")
    assert command.wait() == 0
    assert "from nothing to" in command.stderr
    assert running_url(folder / ".data") is None


async def run_check(start: Start, url: str, **environment: str) -> tuple[int, str]:
    """Run `check` on a database; return its exit code and its report."""
    command = start("check", DATABASE_URL=url, **environment)
    code = await asyncio.to_thread(command.wait)
    assert command.stderr == ""
    assert SECRET not in command.stdout
    return code, command.stdout


@pytest.mark.usefixtures("durable_server")
async def test_check_of_a_healthy_database_reports_every_property(
    start: Start, database_url: str
) -> None:
    code, report = await run_check(start, database_url)
    assert code == 0, report
    for words in (
        "DATABASE_URL",
        "from the environment",
        "PostgreSQL",
        "direct",
        "not needed on this machine",
        "prepared",
        "round trip",
        "the index is up to date",
        f"revision {tables.BUILD:04d}",
        "up to 12 connections for each process",
        "8 kept open, most recently used first; checked before use after 30 s idle",
        "replaced after 240 s; connect timeout 12 s",
        "No problems.",
    ):
        assert words in report
    assert "todo" not in report


@pytest.mark.usefixtures("durable_server")
async def test_check_reports_pending_and_failed_index_changes(
    start: Start, database_url: str
) -> None:
    insert = (
        "INSERT INTO search_outbox "
        "(kind, user_id, entity_id, since, through, owed_at, due_at, detail) VALUES "
        "($1, gen_random_uuid(), '0192f3a4-0000-7000-8000-000000000000', 0, 1, "
        "now() - interval '5 minutes', $2, 'refused')"
    )
    await fetch(database_url, insert, 2, datetime.now(UTC))
    await fetch(database_url, insert, 1, datetime.now(UTC) + timedelta(days=1))
    await fetch(database_url, "UPDATE search_outbox SET due_at = 'infinity' WHERE kind = 1")
    code, report = await run_check(start, database_url)
    assert code == 0, report
    unwrapped = " ".join(report.split())
    assert re.search(
        r"note search 1 documents and sessions wait to be indexed, the oldest for 30\d s", unwrapped
    ), report
    example = "0192f3a4-0000-7000-8000-000000000000 (refused)"
    assert f"1 could not be indexed, for example {example}" in unwrapped


@pytest.mark.case(n=510)
@pytest.mark.usefixtures("durable_server")
async def test_check_after_a_clock_step_shows_no_negative_age(
    start: Start, database_url: str
) -> None:
    insert = (
        "INSERT INTO search_outbox "
        "(kind, user_id, entity_id, since, through, owed_at, due_at) VALUES "
        "(2, gen_random_uuid(), gen_random_uuid(), 0, 1, "
        "now() + interval '1 hour', now() + interval '1 hour')"
    )
    await fetch(database_url, insert)
    code, report = await run_check(start, database_url)
    assert code == 0, report
    unwrapped = " ".join(report.split())
    assert "1 documents and sessions wait to be indexed, the oldest for 0 s" in unwrapped
    assert "1 of them are dated ahead, as after PostgreSQL's clock was set back" in unwrapped


@pytest.mark.usefixtures("durable_server")
async def test_check_of_an_unmigrated_database_advises_what_to_do(
    start: Start, empty_database_url: str
) -> None:
    code, report = await run_check(
        start, empty_database_url, CHAT_HISTORY_DB_POOL_SIZE="200", CHAT_HISTORY_LISTN="x"
    )
    assert code == 1
    assert re.search(
        r"todo +schema +the schema is at revision 0000.*run `chat-history migrate`", report
    )
    assert re.search(r"todo +pool +.*lower CHAT_HISTORY_DB_POOL_SIZE", report)
    assert re.search(
        r"note +configuration +CHAT_HISTORY_LISTN .* did you mean CHAT_HISTORY_LISTEN", report
    )
    assert "To do: 2." in report


@pytest.mark.case(n=508)
async def test_check_names_each_setting_that_is_weaker_than_promised(
    start: Start, database_url: str
) -> None:
    """The tests' own server runs with `fsync` and `full_page_writes` off."""
    name = database_name(database_url)
    for setting in (
        "synchronous_commit = local",
        "client_min_messages = error",
        "default_transaction_isolation = serializable",
    ):
        await fetch(database_url, f"ALTER DATABASE {name} SET {setting}")
    code, report = await run_check(start, database_url)
    assert code == 1
    for words in (
        "todo +fsync +off: a crash of the machine may destroy the database",
        "todo +full_page_writes +off: a crash of the machine may destroy pages",
        "note +synchronous_commit +local: a failover to a synchronous standby may lose",
        "note +client_min_messages +error: hides the warning",
        "note +default_transaction_isolation +serializable: concurrent writes",
    ):
        assert re.search(words, report), report
    assert "To do: 2." in report


async def test_check_reports_a_pooler_and_unsafe_settings(start: Start, database_url: str) -> None:
    name = database_url.split("/")[3].split("?", maxsplit=1)[0]
    await fetch(database_url, f"ALTER DATABASE {name} SET synchronous_commit = off")
    code, report = await run_check(start, f"{database_url}&pgbouncer=true&gssencmode=disable")
    assert code == 1
    assert "through a transaction pooler" in report
    assert "not prepared" in report
    assert re.search(r"todo +synchronous_commit +off: a crash may lose", report)
    assert re.search(r"note +database URL +gssencmode", report)


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
async def test_check_explains_why_it_cannot_connect(
    start: Start, empty_database_url: str, change: tuple[str, str], words: str
) -> None:
    code, report = await run_check(start, re.sub(*change, empty_database_url))
    assert code == 1
    assert words in report
    assert "Traceback" not in report


def test_check_when_the_embedded_database_is_stopped_advises_to_start_it(
    start: Start, folder: Path
) -> None:
    command = start("check")
    assert command.wait() == 1
    assert "not running; start it with `make run` or `chat-history serve`" in command.stdout
    assert not (folder / ".data").exists()


@pytest.mark.timeout(300)
def test_serve_without_configuration_owns_its_folder_and_keeps_its_data(
    start: Start, folder: Path
) -> None:
    serving = start("serve")
    address = address_of(serving)
    assert is_serving(address)
    assert f"embedded PostgreSQL in {folder}/.data/postgres" in serving.stdout
    assert "\x1b" not in serving.stdout
    user = create_user(address, "ada@example.com")
    if (status := Path(f"/proc/{serving.process.pid}/status")).exists():
        match = re.search(r"VmRSS:\s+(\d+) kB", status.read_text())
        assert match
        assert int(match[1]) < MAX_IDLE_RESIDENT_KB

    # Other commands use the running database; a second server is refused.
    assert start("migrate").wait() == 0
    owner_description = f"process {serving.process.pid}, listening on {address}"
    check = start("check")
    assert check.wait() == 0
    assert owner_description in check.stdout
    second = start("serve", "--migrate")
    assert second.wait() == 2
    assert second.stderr == (
        f"chat-history: ChatHistory is already running ({owner_description}) "
        f"on this data folder: {folder}/.data\n"
    )
    assert is_serving(address)

    # Ctrl-C in a terminal goes to the whole process group.
    os.killpg(serving.process.pid, signal.SIGINT)
    assert serving.wait() == 0
    assert serving.stderr.endswith("chat-history: stopped\n")
    assert "Traceback" not in serving.stderr
    assert running_url(folder / ".data") is None
    assert owner(folder / ".data") is None

    restarted = start("serve")
    assert get_user(address_of(restarted), "ada@example.com") == user


def test_serve_after_a_killed_service_replaces_its_postgres(start: Start, folder: Path) -> None:
    first = start("serve")
    user = create_user(address_of(first), "ada@example.com")
    orphan = postmaster_of(folder)
    first.process.kill()
    first.wait()
    assert is_postgres(orphan.pid)
    check = start("check")
    assert check.wait() == 1
    assert "not running, but its database is" in check.stdout
    restarted = start("serve")
    assert get_user(address_of(restarted), "ada@example.com") == user
    assert not is_postgres(orphan.pid)
    restarted.process.terminate()
    assert restarted.wait() == 0
    assert running_url(folder / ".data") is None


def test_serve_when_the_terminal_closes_stops_cleanly(start: Start, folder: Path) -> None:
    # Under nohup the tests ignore SIGHUP, and the processes that they start inherit that.
    handler = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    serving = start("serve")
    signal.signal(signal.SIGHUP, handler)
    address_of(serving)
    serving.process.send_signal(signal.SIGHUP)
    assert serving.wait() == 0
    assert running_url(folder / ".data") is None


@pytest.mark.parametrize(
    ("stop_signal", "delay_s"),
    [(signal.SIGINT, 0.5), (signal.SIGTERM, 0.8), (signal.SIGINT, 1.1), (signal.SIGTERM, 1.4)],
)
def test_serve_stopped_during_its_start_leaves_no_postgres_running(
    start: Start, folder: Path, stop_signal: signal.Signals, delay_s: float
) -> None:
    serving = start("serve")
    time.sleep(delay_s)
    serving.process.send_signal(stop_signal)
    # The exit code depends on the progress of the start. Until `serve` installs its handlers, the
    # signal ends the process, or typer exits for the KeyboardInterrupt. A KeyboardInterrupt that
    # no code catches ends Python by SIGINT, whichever signal caused it. With the handlers it is 0.
    assert serving.wait() in (0, -stop_signal, -signal.SIGINT, 1, 128 + stop_signal)
    if (pid_file := folder / ".data" / "postgres" / "postmaster.pid").exists():
        assert not postmaster_of(folder).is_alive(), pid_file.read_text()
    assert start("migrate").wait() == 0


_SIGNAL_IN_A_CALLBACK = """
import signal, sys, weakref
from service.cli import main, serve

migrate, stop_signal = serve.migrate_schema, int(sys.argv.pop())

class Referent:
    pass

def migrate_and_signal(*args, **options):
    migrate(*args, **options)
    referent = Referent()
    reference = weakref.ref(referent, lambda _: signal.raise_signal(stop_signal))
    del referent

serve.migrate_schema = migrate_and_signal
main()
"""


@pytest.mark.parametrize("stop_signal", [signal.SIGINT, signal.SIGTERM])
def test_signal_in_a_weak_reference_callback_still_stops_serve(
    start: Start, folder: Path, stop_signal: signal.Signals
) -> None:
    serving = start("serve", str(int(stop_signal)), program=("-c", _SIGNAL_IN_A_CALLBACK))
    assert serving.wait() == 0
    assert "Exception ignored" in serving.stderr
    assert "is running" not in serving.stdout
    assert running_url(folder / ".data") is None


@pytest.mark.case(n=522)
@pytest.mark.parametrize("name", ["LISTEN", "HEALTH_LISTEN", "METRICS_LISTEN"])
def test_serve_on_an_address_in_use_reports_it(name: str, start: Start, folder: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        command = start(
            "serve",
            **{"CHAT_HISTORY_LISTEN": "127.0.0.1:0", f"CHAT_HISTORY_{name}": address},
        )
        assert command.wait() == 1
    assert (
        f"chat-history: {address} is in use: stop the process that uses it, "
        f"or set CHAT_HISTORY_{name} to another address"
    ) in command.stderr.splitlines()
    assert "Traceback" not in command.stderr
    assert running_url(folder / ".data") is None


async def test_serve_on_a_configured_database_starts_no_embedded_postgres(
    start: Start, folder: Path, empty_database_url: str
) -> None:
    serving = start("serve", "--migrate", DATABASE_URL=empty_database_url)
    assert await asyncio.to_thread(lambda: is_serving(address_of(serving)))
    assert "data    PostgreSQL at " in serving.stdout
    assert "migrated the schema from nothing" in serving.stderr
    serving.process.terminate()
    assert await asyncio.to_thread(serving.wait) == 0
    assert not (folder / ".data" / "postgres").exists()


def test_serve_that_cannot_migrate_explains_why(start: Start) -> None:
    command = start(
        "serve", "--migrate", DATABASE_URL=f"postgresql://u:{SECRET}@no-such-host.invalid/d"
    )
    assert command.wait() == 1
    assert command.stderr == (
        "chat-history: the host name no-such-host.invalid does not resolve: "
        "check DATABASE_URL and this machine's DNS\n"
    )
