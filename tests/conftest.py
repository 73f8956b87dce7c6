"""Fixtures for all tests, and the checks that run after every test.

- `cluster`: one PostgreSQL per test process. `database_url`: a fresh, migrated database in it.
- `server`: the whole service in this process, on that database. `stub`: a stub on a real channel
  to it. `start_process`: starts servers in processes of their own.
- `chat`: the service as a new user calls it. `user_id`: that user's id. `session`: a session of
  that user. `other`: the service as a second user calls it.

After every test no asyncio task may be left, the server must have released all its resources, and
every statement that any process sent to PostgreSQL must pass the sentinel
(tests/support/sentinel.py). Warnings are errors.
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

# No deadline: the time of an example depends on the database and on the load of the machine.
# Function-scoped fixtures are allowed because examples share one database on purpose.
hypothesis_settings.register_profile(
    "tests",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
hypothesis_settings.load_profile("tests")

StartProcess = Callable[..., Awaitable[ServerProcess]]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that selects how services connect to their databases."""
    parser.addoption("--through", choices=ROUTES, help="the pooler that services connect through")


def pytest_configure(config: pytest.Config) -> None:
    """Remove the settings of a developer's shell, so that no test depends on them."""
    for name in list(os.environ):
        if name.startswith("CHAT_HISTORY_") or name in ("DATABASE_URL", "NEON_DATABASE_URL"):
            del os.environ[name]
    if not hasattr(config, "workerinput"):  # Once, and not in every worker of xdist.
        remove_abandoned_clusters()


SUITES = {
    "chatbot": pytest.mark.examples,
    "docs": pytest.mark.examples,
    "faults": pytest.mark.faults,
    "node": pytest.mark.examples,
    "security": pytest.mark.faults,
}
"""Folders that targets of their own run, so that `make test` ends within five minutes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of these folders, except the quick ones that must check every change."""
    for item in items:
        mark = SUITES.get(item.path.parent.name)
        if mark is not None and not item.get_closest_marker("quick"):
            item.add_marker(mark)


@pytest.fixture(autouse=True)
def sentinel() -> Generator[None]:
    """Fail a test during which a statement was sent that could touch another user's rows."""
    yield
    if complaints := checks.complaints(all_new_statements()):
        pytest.fail("\n\n".join(complaints), pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def _frozen_imports() -> Generator[None]:
    """Exclude imported modules from garbage collection, which runs after every test."""
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        # A server freezes and unfreezes the collector of its process. Many servers run in this
        # process, and they must not undo the freeze above.
        patch.setattr(
            server_module,
            "gc",
            SimpleNamespace(
                collect=lambda: 0,
                freeze=lambda: None,
                unfreeze=lambda: None,
                get_threshold=gc.get_threshold,
                set_threshold=lambda *_thresholds: None,
            ),
        )
        yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def leftover_check(request: pytest.FixtureRequest, sentinel: None) -> None:
    """Fail an asynchronous test that leaves tasks behind once its other fixtures have ended."""
    if inspect.iscoroutinefunction(getattr(request, "function", None)):
        request.getfixturevalue("_no_leftovers")


@pytest.fixture
async def _no_leftovers() -> AsyncGenerator[None]:
    yield
    # Objects that were not closed warn when they are collected: now, and not in a later test.
    gc.collect()
    for _ in range(3):
        await asyncio.sleep(0)
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    assert not tasks, f"tasks are left: {tasks}"


@pytest.fixture(scope="session")
def cluster() -> Generator[Cluster]:
    """Provide the PostgreSQL of this test process."""
    with Cluster() as cluster:
        asyncio.run(cluster.prepare())
        yield cluster


@pytest.fixture
async def durable_server(cluster: Cluster) -> AsyncGenerator[None]:
    """Make the tests' server as durable as an operator's, for tests of `chat-history check`."""
    await cluster.set_durable(is_durable=True)
    yield
    await cluster.set_durable(is_durable=False)


@pytest.fixture(scope="session", autouse=True)
def _route(request: pytest.FixtureRequest) -> Generator[None]:
    with use_route(request.config.getoption("--through")):
        yield


@pytest.fixture
async def database_url(cluster: Cluster) -> AsyncGenerator[str]:
    """Provide the connection string of a fresh, migrated database."""
    name = await cluster.create_database()
    yield cluster.url(name)
    await cluster.drop_database(name)


@pytest.fixture
async def empty_database_url(cluster: Cluster) -> AsyncGenerator[str]:
    """Provide the connection string of a database without a schema."""
    name = await cluster.create_database(empty=True)
    yield cluster.url(name)
    await cluster.drop_database(name)


@pytest.fixture
async def server(database_url: str) -> AsyncGenerator[Server]:
    """Provide a server in this process that is ready."""
    async with serving(database_url) as server:
        yield server


@pytest.fixture
async def stub(server: Server) -> AsyncGenerator[AsyncStub]:
    """Provide a stub on a real channel to the server; without tokens every caller is a service."""
    async with connected(server.address) as stub:
        yield stub


@pytest.fixture
async def chat(stub: AsyncStub) -> Chat:
    """Provide the service as a new user calls it."""
    return await Chat.of_new_user(stub)


@pytest.fixture
async def other(stub: AsyncStub, chat: Chat) -> Chat:
    """Provide the service as a second user calls it."""
    return await Chat.of_new_user(stub)


@pytest.fixture
def user_id(chat: Chat) -> str:
    """Provide the id of the user of `chat`."""
    return chat.user_id


@pytest.fixture
async def session(chat: Chat) -> session_pb2.Session:
    """Provide an empty session of the user of `chat`."""
    return await chat.create_session(title="a session")


@pytest.fixture
async def start_process(database_url: str, tmp_path: Path) -> AsyncGenerator[StartProcess]:
    """Provide a function that starts servers in processes of their own, on the test's database.

    The servers are stopped at the end of the test.
    """
    async with AsyncExitStack() as processes:
        count = 0

        async def start(
            *, ready: bool = True, url: str = database_url, **environment: str
        ) -> ServerProcess:
            nonlocal count
            count += 1
            process = ServerProcess(url, tmp_path / f"server-{count}", **environment)
            processes.push_async_callback(process.stop)
            return await process.start(ready=ready)

        yield start


@pytest.fixture
def folder() -> Generator[Path]:
    """Provide a working folder for an embedded PostgreSQL; a server on data in it is stopped.

    `tmp_path` does not serve: under root PostgreSQL runs as another user, who has no access to
    the folders of pytest, and every start of pytest removes that access again.
    """
    folder = Path(tempfile.mkdtemp(prefix="chat-history-folder-")).resolve()
    folder.chmod(0o711)
    yield folder
    for file in folder.rglob("postmaster.pid"):
        server = Postmaster.read(file.parent)
        if server is not None and server.is_alive():
            with suppress(ProcessLookupError):
                stop_server(server.pid)
    shutil.rmtree(folder)
