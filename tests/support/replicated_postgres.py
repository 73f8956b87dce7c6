"""A primary and streaming standbys on the loopback interface, of the embedded PostgreSQL.

Each node can be stopped, killed, paused, started, promoted, and made a standby of another one.
"""

from __future__ import annotations

import signal
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

import psutil

from service.embedded.programs import environment, find_programs
from tests.support.account import give_ownership, unprivileged_folder, unprivileged_user
from tests.support.ports import free_port

USER, DATABASE = "postgres", "postgres"
# The data must survive a crash of the processes, and not one of the machine.
_SETTINGS = {
    "fsync": "off",
    "autovacuum": "off",
    "shared_buffers": "32MB",
    "wal_keep_size": "256MB",
    "wal_receiver_status_interval": "1",
    "wal_retrieve_retry_interval": "100ms",
    "unix_socket_directories": "",
    "listen_addresses": "127.0.0.1",
}
_OWN_SETTINGS = "chathistory.conf"
_READY_LINE = 7
"""Index of the line of `postmaster.pid` that holds the state."""


class Node:
    """One server. Its name is the application name of its replication."""

    def __init__(self, name: str, folder: Path, programs: Path) -> None:
        """Configure a node whose files are in `folder`; `programs` has PostgreSQL's programs."""
        self.name = name
        self.port = free_port()
        self.data = folder / name
        self.log = folder / f"{name}.log"
        self._programs = programs
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Its address, `host:port`."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """Connection string of this node alone."""
        return f"postgresql://{USER}@{self.address}/{DATABASE}?sslmode=disable"

    @property
    def pid(self) -> int:
        """The process id of the server."""
        assert self._process is not None, "not started"
        return self._process.pid

    def initialize(self) -> None:
        """Create the data of a new primary."""
        self._run(
            "initdb", f"--username={USER}", "--auth=trust", "--encoding=UTF8", "--locale=C",
            "--no-sync", "-D", str(self.data),
        )  # fmt: skip

    def clone(self, primary: Node) -> None:
        """Copy the data of a running primary, as its standby."""
        self._run(
            "pg_basebackup", "-D", str(self.data), "-X", "stream", "-c", "fast", "--no-sync",
            "-d", _conninfo(primary),
        )  # fmt: skip
        self.follow(primary)

    def follow(self, primary: Node) -> None:
        """Make this stopped node a standby of another one."""
        own = self.data / _OWN_SETTINGS
        conninfo = f"{_conninfo(primary)} application_name={self.name}"
        own.write_text(f"primary_conninfo = '{conninfo}'\nrecovery_target_timeline = 'latest'\n")
        signal_file = self.data / "standby.signal"
        signal_file.touch()
        main = self.data / "postgresql.conf"
        if _OWN_SETTINGS not in main.read_text():
            with main.open("a") as file:
                file.write(f"\ninclude_if_exists = '{_OWN_SETTINGS}'\n")
        for path in (own, signal_file, main):
            give_ownership(path)

    def start(self) -> None:
        """Start the node and wait until it accepts connections."""
        values = _SETTINGS | {"port": str(self.port)}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self._programs / "postgres",
                    "-D",
                    self.data,
                    *(f"--{name}={value}" for name, value in values.items()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=environment(),
                **unprivileged_user(),
            )
        deadline = time.monotonic() + 60
        while not self._accepts_connections():
            tail = self.log.read_text()[-2000:]
            assert self._process.poll() is None, f"{self.name} ended:\n{tail}"
            assert time.monotonic() < deadline, f"{self.name} does not start:\n{tail}"
            time.sleep(0.02)

    def _accepts_connections(self) -> bool:
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        if len(lines) <= _READY_LINE or lines[0] != str(self.pid):
            return False
        return lines[_READY_LINE].strip() == "ready"

    def stop(self) -> None:
        """Stop the node as an operator does: its sessions end with 57P01."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGINT)
        self._process.wait(60)
        self._process = None

    def kill(self) -> None:
        """Kill the node and its sessions, as a crash of its machine would."""
        if self._process is None:
            return
        sessions: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            sessions = psutil.Process(self.pid).children(recursive=True)
        self._process.kill()
        for session in sessions:
            with suppress(psutil.NoSuchProcess):
                session.kill()
        self._process.wait(30)
        # The node cannot start again while one of them is attached to its shared memory.
        psutil.wait_procs(sessions, timeout=30)
        self._process = None

    def pause(self) -> None:
        """Stop all of its processes from running: the node seems to be silent."""
        self._signal_all(signal.SIGSTOP)

    def resume(self) -> None:
        """Let its processes run again."""
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: signal.Signals) -> None:
        postmaster = psutil.Process(self.pid)
        for process in (*postmaster.children(recursive=True), postmaster):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def promote(self) -> None:
        """Make a standby the primary, and wait until it accepts writes."""
        self._run("pg_ctl", "promote", "-w", "-D", str(self.data))

    def wait_until_received(self, standby: Node) -> None:
        """Wait until a standby has everything that this primary has written so far.

        Only then does a stop of the primary wait for it. That it streams is not enough: it may
        still receive the end of the timeline before.
        """
        written = self._query("SELECT pg_current_wal_lsn()")
        received = (
            f"SELECT count(*) FROM pg_stat_replication WHERE flush_lsn >= '{written}' "
            f"AND application_name = '{standby.name}'"
        )
        deadline = time.monotonic() + 60
        while self._query(received) != "1":
            assert time.monotonic() < deadline, f"{standby.name} does not stream"
            time.sleep(0.02)

    def _query(self, sql: str) -> str:
        return self._run("psql", "-AtX", "-c", sql, f"{_conninfo(self)} dbname={DATABASE}")

    def _run(self, program: str, *arguments: str) -> str:
        completed = subprocess.run(
            [self._programs / program, *arguments],
            check=False,
            capture_output=True,
            text=True,
            cwd="/",
            env=environment(),
            **unprivileged_user(),
        )
        assert completed.returncode == 0, f"{program}: {completed.stdout}{completed.stderr}"
        return str(completed.stdout).strip()


def _conninfo(node: Node) -> str:
    return f"host=127.0.0.1 port={node.port} user={USER} sslmode=disable"


class ReplicatedPostgres:
    """Nodes `s0` (the primary at first), `s1`, …, as a context manager.

    Under root the embedded PostgreSQL must have been started once, which creates the account.
    """

    def __init__(self, standby_count: int = 1) -> None:
        """Configure a primary and its standbys."""
        self._node_count = standby_count + 1
        self._exit = ExitStack()
        self.nodes: list[Node] = []

    def __enter__(self) -> Self:
        folder = self._exit.enter_context(unprivileged_folder("replicas"))
        programs = find_programs()
        newest = programs[max(programs)]
        self.nodes = [Node(f"s{number}", folder, newest) for number in range(self._node_count)]
        try:
            primary, *standbys = self.nodes
            primary.initialize()
            primary.start()
            for node in standbys:
                node.clone(primary)
                node.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.kill()
        self._exit.close()

    def url(self, **query: str) -> str:
        """Connection string that names every node, in order."""
        values = {"sslmode": "disable"} | query
        options = "&".join(f"{name}={value}" for name, value in values.items())
        hosts = ",".join(node.address for node in self.nodes)
        return f"postgresql://{USER}@{hosts}/{DATABASE}?{options}"

    def switch_over(self, old: Node, new: Node) -> None:
        """Stop the primary, promote a standby, and start the old primary as its standby."""
        old.wait_until_received(new)
        old.stop()
        new.promote()
        old.follow(new)
        old.start()
