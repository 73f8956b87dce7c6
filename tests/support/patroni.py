"""Three PostgreSQL nodes under Debian's Patroni and etcd, on the loopback interface.

Everything runs on free ports in a folder of its own, as an unprivileged user, and is ended by its
process id. The services that Debian's packages may have started are not touched.
"""

from __future__ import annotations

import platform
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import httpx
import psutil

from tests.support.account import give_ownership, unprivileged_folder, unprivileged_user
from tests.support.ports import free_port
from tests.support.tls_postgres import find_programs
from tests.support.tools import require_program

USER, DATABASE = "chat", "chat"
START_TIMEOUT_S = 90.0
SWITCHOVER_TIMEOUT_S = 60.0
# The shortest times with which Patroni 3.0 works: loop_wait + 2 * retry_timeout <= ttl. From 3.2 on
# it raises ttl to 20 and retry_timeout to 3, and the primary of a killed node is replaced later.
TTL_S, LOOP_WAIT_S, RETRY_TIMEOUT_S = 8, 1, 3
_PRIMARY_ROLES = ("master", "primary")
"""Names of the role in Patroni 3 and in later versions."""

_CONFIGURATION = """\
scope: chat
namespace: /service/
name: {name}
restapi:
  listen: 127.0.0.1:{rest_port}
  connect_address: 127.0.0.1:{rest_port}
etcd3:
  host: 127.0.0.1:{etcd_port}
log:
  level: INFO
bootstrap:
  dcs:
    ttl: {ttl}
    loop_wait: {loop_wait}
    retry_timeout: {retry_timeout}
    maximum_lag_on_failover: 16777216
    primary_start_timeout: 0
    synchronous_mode: {synchronous}
    postgresql:
      use_pg_rewind: true
      use_slots: true
      parameters:
        synchronous_commit: 'on'
        wal_level: replica
        hot_standby: 'on'
        wal_log_hints: 'on'
        max_wal_senders: 10
        max_replication_slots: 10
        max_connections: 60
        wal_keep_size: 128MB
        shared_buffers: 32MB
        autovacuum: 'off'
  initdb:
  - encoding: UTF8
  - locale: C.UTF-8
  - data-checksums
postgresql:
  listen: 127.0.0.1:{port}
  connect_address: 127.0.0.1:{port}
  data_dir: {folder}/data
  bin_dir: {bin_dir}
  pgpass: {folder}/pgpass
  use_unix_socket: true
  remove_data_directory_on_rewind_failure: true
  remove_data_directory_on_diverged_timelines: true
  authentication:
    superuser:
      username: postgres
      password: unused
    replication:
      username: replicator
      password: unused
  parameters:
    unix_socket_directories: {folder}
    wal_retrieve_retry_interval: 100ms
    wal_receiver_status_interval: 1
    wal_receiver_timeout: 5s
    wal_sender_timeout: 5s
  pg_hba:
  - local all all trust
  - host all all 127.0.0.1/32 trust
  - host replication all 127.0.0.1/32 trust
watchdog:
  mode: 'off'
"""


def _environment(folder: Path) -> dict[str, str]:
    """Return an environment without the settings of this process: Patroni uses Debian's Python."""
    return {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(folder),  # libpq looks for certificates there; root's is closed to others.
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
    }


class PatroniNode:
    """A Patroni and its PostgreSQL."""

    def __init__(self, name: str, folder: Path) -> None:
        """Choose the ports of a node, whose files are in a folder of its own in `folder`."""
        self.name = name
        self.folder = folder / name
        self.port, self.rest_port = free_port(), free_port()
        self.log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """The address of its PostgreSQL, `host:port`."""
        return f"127.0.0.1:{self.port}"

    def url(self, database: str = DATABASE) -> str:
        """Return the connection string of this node alone, for the tests' own statements."""
        return f"postgresql://postgres@{self.address}/{database}?sslmode=disable"

    def configure(self, **values: object) -> None:
        """Write Patroni's configuration."""
        self.folder.mkdir(mode=0o700)
        give_ownership(self.folder)
        path = self.folder / "patroni.yml"
        text = _CONFIGURATION.format(
            name=self.name, folder=self.folder, port=self.port, rest_port=self.rest_port, **values
        )
        path.touch(mode=0o600)
        path.write_text(text)
        give_ownership(path)

    def start(self) -> None:
        """Start Patroni, which starts PostgreSQL in the role that the cluster needs."""
        program = require_program("patroni")
        self._process = _launch(
            [program, str(self.folder / "patroni.yml")], self.log, _environment(self.folder)
        )

    @property
    def is_running(self) -> bool:
        """Whether its Patroni runs."""
        return self._process is not None and self._process.poll() is None

    def kill_postgres(self) -> None:
        """Kill PostgreSQL only. Its Patroni notices that, and releases the leader's key."""
        _kill(self._postmaster())

    def kill(self) -> None:
        """Kill Patroni and PostgreSQL, as a crash of the machine would: the key expires."""
        if self._process is not None:
            # First, since it would start PostgreSQL again.
            _kill(psutil.Process(self._process.pid) if self.is_running else None)
            self._process.wait(30)
            self._process = None
        _kill(self._postmaster())

    def _postmaster(self) -> psutil.Process | None:
        """Return the main process of its PostgreSQL, which runs on without its Patroni."""
        with suppress(FileNotFoundError, ValueError, IndexError, psutil.NoSuchProcess):
            pid = int((self.folder / "data" / "postmaster.pid").read_text().splitlines()[0])
            process = psutil.Process(pid)
            # The file of a killed server names a process that may be another one by now.
            if str(self.folder / "data") in process.cmdline():
                return process
        return None

    def status(self) -> dict[str, Any]:
        """Return what Patroni reports about itself; empty if it does not answer."""
        with suppress(httpx.HTTPError, ValueError):
            return dict(_get(f"http://127.0.0.1:{self.rest_port}/patroni"))
        return {}


def _get(url: str) -> Any:
    with httpx.Client(trust_env=False, timeout=2) as client:
        return client.get(url).json()


def _launch(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd="/",
            env=environment,
            start_new_session=True,
            **unprivileged_user(),
        )


def _kill(process: psutil.Process | None) -> None:
    """Kill a process and its children, the parent first, so that it restarts none of them."""
    if process is None:
        return
    with suppress(psutil.NoSuchProcess):
        children = process.children(recursive=True)
        process.kill()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs([process, *children], timeout=30)


class PatroniCluster:
    """Three nodes and one etcd, as a context manager.

    Under root the embedded PostgreSQL must have been started once, which creates the account.
    """

    def __init__(self, *, is_synchronous: bool) -> None:
        """Choose whether commits wait for a standby, which Patroni chooses."""
        self.is_synchronous = is_synchronous
        self._exit = ExitStack()
        self._etcd: subprocess.Popen[bytes] | None = None
        self._etcd_log = Path()
        self.nodes: list[PatroniNode] = []

    def __enter__(self) -> Self:
        programs = find_programs()
        assert programs is not None, "Debian's postgresql is not installed"
        folder = self._exit.enter_context(unprivileged_folder("patroni"))
        try:
            etcd_port = self._start_etcd(folder)
            self.nodes = [PatroniNode(f"n{number}", folder) for number in (1, 2, 3)]
            for node in self.nodes:
                node.configure(
                    etcd_port=etcd_port,
                    bin_dir=programs,
                    ttl=TTL_S,
                    loop_wait=LOOP_WAIT_S,
                    retry_timeout=RETRY_TIMEOUT_S,
                    synchronous=str(self.is_synchronous).lower(),
                )
            # Alone, so that the first node initialises the cluster.
            self.nodes[0].start()
            self.wait_healthy(node_count=1)
            for node in self.nodes[1:]:
                node.start()
            self.wait_healthy()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.kill()
        if self._etcd is not None:
            self._etcd.kill()
            self._etcd.wait(30)
        self._exit.close()

    def _start_etcd(self, folder: Path) -> int:
        """Start etcd and return the port for its clients."""
        client_port, peer_port = free_port(), free_port()
        client, peer = (f"http://127.0.0.1:{port}" for port in (client_port, peer_port))
        data = folder / "etcd"
        data.mkdir(mode=0o700)
        give_ownership(data)
        environment = _environment(folder)
        if platform.machine() == "aarch64":
            environment["ETCD_UNSUPPORTED_ARCH"] = "arm64"
        self._etcd_log = folder / "etcd.log"
        self._etcd = _launch(
            [
                require_program("etcd"),
                "--name=e1",
                f"--data-dir={data}",
                f"--listen-client-urls={client}",
                f"--advertise-client-urls={client}",
                f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster=e1={peer}",
                "--initial-cluster-state=new",
            ],
            self._etcd_log,
            environment,
        )
        deadline = time.monotonic() + 30
        while not self._is_etcd_healthy(client):
            tail = self._etcd_log.read_text()[-2000:]
            assert self._etcd.poll() is None, f"etcd ended:\n{tail}"
            assert time.monotonic() < deadline, f"etcd does not start:\n{tail}"
            time.sleep(0.1)
        return client_port

    @staticmethod
    def _is_etcd_healthy(client: str) -> bool:
        with suppress(httpx.HTTPError, ValueError):
            return bool(_get(f"{client}/health").get("health") == "true")
        return False

    def url(self, **query: str) -> str:
        """Return the connection string of the service, which names all nodes."""
        options = {"sslmode": "disable", "target_session_attrs": "read-write"} | query
        hosts = ",".join(node.address for node in self.nodes)
        text = "&".join(f"{name}={value}" for name, value in options.items())
        return f"postgresql://{USER}@{hosts}/{DATABASE}?{text}"

    def wait_healthy(self, node_count: int = 3, timeout_s: float = START_TIMEOUT_S) -> PatroniNode:
        """Wait until this many nodes run: a primary, and standbys that stream from it.

        In synchronous mode the cluster must have chosen a synchronous standby, too. Otherwise the
        next fault could not be followed by a failover.

        Returns:
            The node of the primary.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            states = {node.name: node.status() for node in self.nodes}
            leader = self._healthy_leader(states, node_count)
            if leader is not None:
                return leader
            assert time.monotonic() < deadline, f"{states}\n{self.tail()}"
            time.sleep(0.2)

    def _healthy_leader(
        self, states: dict[str, dict[str, Any]], node_count: int
    ) -> PatroniNode | None:
        running = {name: state for name, state in states.items() if state.get("state") == "running"}
        leaders = [
            node
            for node in self.nodes
            if running.get(node.name, {}).get("role") in _PRIMARY_ROLES
            and "cluster_unlocked" not in running[node.name]
        ]
        if len(leaders) != 1 or len(running) < node_count:
            return None
        standbys = running[leaders[0].name].get("replication") or ()
        streaming = {
            standby["application_name"]: standby["sync_state"]
            for standby in standbys
            if standby["state"] == "streaming"
        }
        if len(streaming) < node_count - 1:
            return None
        # The leader's key names the synchronous standby after PostgreSQL waits for it.
        may_fail_over = any(
            streaming[name] in ("sync", "quorum") and state.get("sync_standby")
            for name, state in running.items()
            if name in streaming
        )
        needs_standby = self.is_synchronous and node_count > 1
        return leaders[0] if may_fail_over or not needs_standby else None

    def switch_over(self, leader: PatroniNode) -> None:
        """Ask the leader to hand over to any node that may replace it."""
        with httpx.Client(trust_env=False, timeout=SWITCHOVER_TIMEOUT_S) as client:
            reply = client.post(
                f"http://127.0.0.1:{leader.rest_port}/switchover", json={"leader": leader.name}
            )
        assert reply.status_code == 200, f"{reply.text}\n{self.tail()}"

    def tail(self) -> str:
        """Return the end of each node's log."""
        return "\n".join(
            f"--- {node.name}\n{node.log.read_text(errors='replace')[-1500:]}"
            for node in self.nodes
            if node.log.exists()
        )
