"""What every test stands on: a real PostgreSQL, a fresh database, a server, a stub; and what must hold after every test.

- `cluster`: one PostgreSQL per test process. `database_url`: a fresh, migrated database in it.
- `server`: the whole service in this process, on that database. `stub`: a stub on a real channel to it.
- `user_id`: a user in it; `chat`: the service as that user's; `session`: a session of it. `start_process`: servers in processes
  of their own.

After every test no task is left, the server has let go of all it took, and every statement that PostgreSQL was sent, by whatever
process, passes the sentinel (tests/support/sentinel.py). Warnings are errors.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import shutil
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from chathistory.v1 import session_pb2
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from service import server as server_module
from service.embedded.data_dir import Postmaster, stop_server
from service.server import Server
from tests.support import sentinel as checks
from tests.support.chat import Chat
from tests.support.cluster import Cluster, all_new_statements, remove_abandoned_clusters
from tests.support.route import ROUTES, use_route
from tests.support.servers import AsyncStub, ServerProcess, connected, serving

pytest.register_assert_rewrite("tests.support.failures")

# The database decides how long an example takes, and a shared machine decides that; examples share one database on purpose.
hypothesis_settings.register_profile(
    "tests",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
hypothesis_settings.load_profile("tests")

StartProcess = Callable[..., Awaitable[ServerProcess]]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a run choose how services get to their databases."""
    parser.addoption(
        "--through", choices=ROUTES, help="what stands between services and PostgreSQL"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Keep what a developer's shell has set away from the tests."""
    for name in list(os.environ):
        if name.startswith("CHAT_HISTORY_") or name in ("DATABASE_URL", "NEON_DATABASE_URL"):
            del os.environ[name]
    if not hasattr(config, "workerinput"):  # Once, and not in each of xdist's workers.
        remove_abandoned_clusters()


LONG = ("chatbot", "faults", "security")
"""Folders whose tests `make test-faults` runs, as `make test` is to end within five minutes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the long folders, but for those that take no time and that no change may get past."""
    for item in items:
        if item.path.parent.name in LONG and not item.get_closest_marker("quick"):
            item.add_marker(pytest.mark.faults)


@pytest.fixture(autouse=True)
def sentinel() -> Generator[None]:
    """Fail the test during which a statement was sent that could touch another user's things."""
    yield
    if found := checks.complaints(all_new_statements()):
        pytest.fail("\n\n".join(found), pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def _collector() -> Generator[None]:
    """Let the garbage collector look at what the tests make, and not again and again at what was imported before them."""
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        # A server sets up the collector of a process of its own; in this one there are many, one after the other.
        patch.setattr(
            server_module,
            "gc",
            SimpleNamespace(collect=lambda: 0, freeze=lambda: None, unfreeze=lambda: None),
        )
        yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def tidy(request: pytest.FixtureRequest, sentinel: None) -> None:
    """Look after an asynchronous test, when all it used has ended, at what it has left."""
    if inspect.iscoroutinefunction(getattr(request, "function", None)):
        request.getfixturevalue("_no_leftovers")


@pytest.fixture
async def _no_leftovers() -> AsyncGenerator[None]:
    yield
    gc.collect()  # What was left open without an owner says so now, as a warning, and not in some later test.
    for _ in range(3):
        await asyncio.sleep(0)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks are left: {left}"


@pytest.fixture(scope="session")
def cluster() -> Generator[Cluster]:
    """Give the PostgreSQL of this test process."""
    with Cluster() as started:
        asyncio.run(started.prepare())
        yield started


@pytest.fixture(scope="session", autouse=True)
def _route(request: pytest.FixtureRequest) -> Generator[None]:
    with use_route(request.config.getoption("--through")):
        yield


@pytest.fixture
async def database_url(cluster: Cluster) -> AsyncGenerator[str]:
    """Give the connection string of a fresh, migrated database."""
    name = await cluster.create_database()
    yield cluster.url(name)
    await cluster.drop_database(name)


@pytest.fixture
async def empty_database_url(cluster: Cluster) -> AsyncGenerator[str]:
    """Give the connection string of a database without a schema."""
    name = await cluster.create_database(empty=True)
    yield cluster.url(name)
    await cluster.drop_database(name)


@pytest.fixture
async def server(database_url: str) -> AsyncGenerator[Server]:
    """Give the service, ready, in this process."""
    async with serving(database_url) as started:
        yield started


@pytest.fixture
async def stub(server: Server) -> AsyncGenerator[AsyncStub]:
    """Give a stub on a real channel to the server; every caller is a service."""
    async with connected(server.address) as opened:
        yield opened


@pytest.fixture
async def chat(stub: AsyncStub) -> Chat:
    """Give the service as a fresh user's."""
    return await Chat.of_new_user(stub)


@pytest.fixture
async def other(stub: AsyncStub, chat: Chat) -> Chat:
    """Give the service as another user's."""
    return await Chat.of_new_user(stub)


@pytest.fixture
def user_id(chat: Chat) -> str:
    """Give a user's id."""
    return chat.user_id


@pytest.fixture
async def session(chat: Chat) -> session_pb2.Session:
    """Give an empty session of the user."""
    return await chat.create_session(title="a session")


@pytest.fixture
async def start_process(database_url: str, tmp_path: Path) -> AsyncGenerator[StartProcess]:
    """Give a way to start servers in processes of their own on the test's database; they are stopped at the end."""
    async with AsyncExitStack() as started:
        count = 0

        async def start(
            *, ready: bool = True, url: str = database_url, **environment: str
        ) -> ServerProcess:
            nonlocal count
            count += 1
            process = ServerProcess(url, tmp_path / f"server-{count}", **environment)
            started.push_async_callback(process.stop)
            return await process.start(ready=ready)

        yield start


@pytest.fixture
def folder() -> Generator[Path]:
    """Give a working folder for an embedded PostgreSQL; what still runs on data in it is ended.

    Under root PostgreSQL runs as another user, to whom pytest's own folders are closed; and every start of pytest closes them again.
    """
    made = Path(tempfile.mkdtemp(prefix="chat-history-folder-")).resolve()
    made.chmod(0o711)
    yield made
    for file in made.rglob("postmaster.pid"):
        server = Postmaster.read(file.parent)
        if server is not None and server.is_alive():
            with suppress(ProcessLookupError):
                stop_server(server.pid)
    shutil.rmtree(made)
