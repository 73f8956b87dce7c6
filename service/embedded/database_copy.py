"""Copies every database of one PostgreSQL server to another by dump and restore, and compares."""

from __future__ import annotations

import re
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from service.embedded.data_dir import EmbeddedError
from service.embedded.os_account import Account, identity
from service.embedded.programs import environment
from service.embedded.server import Server

_MAINTENANCE_DATABASE = "postgres"
"""The database of the service. Every new server has it, so it is not created by the restore."""
_CREATE_SUPERUSER = "CREATE ROLE postgres;\n"
_DATABASE_SETTING = re.compile(
    r"^ALTER (?:DATABASE|ROLE .+ IN DATABASE) postgres SET .+;$", re.MULTILINE
)
_CLOSED_DATABASES = (
    "SELECT datname FROM pg_database WHERE NOT datallowconn AND NOT datistemplate ORDER BY datname"
)
_DATABASES = (
    "SELECT datname FROM pg_database WHERE datallowconn AND NOT datistemplate ORDER BY datname"
)
# The output has a line for each table: its name, the number of its rows, and a sum of their hashes,
# which does not depend on the order of the rows. psql runs each value of the result as a statement.
_CONTENTS = r"""
SELECT CASE relation.relkind
    WHEN 'S' THEN format(
        'SELECT %L, last_value, is_called FROM %s', relation.name, relation.name)
    ELSE format(
        'SELECT %L, count(*), coalesce(sum(hashtextextended(copied_row::text, 0)::numeric), 0)'
        ' FROM ONLY %s AS copied_row', relation.name, relation.name)
    END
FROM (
    SELECT pg_class.relkind, format('%I.%I', pg_namespace.nspname, pg_class.relname) AS name
    FROM pg_class JOIN pg_namespace ON pg_namespace.oid = pg_class.relnamespace
    WHERE pg_class.relkind IN ('r', 'S') AND pg_class.relpersistence <> 't'
        AND pg_namespace.nspname !~ '^pg_' AND pg_namespace.nspname <> 'information_schema'
) AS relation
ORDER BY relation.name
\gexec
"""
_IS_CALLED = ("t", "f")
"""The last value of a sequence's line, which no sum of hashes is."""
_ADDRESS_INDEX = "users_email_key"
# Lines with the ids of users whose addresses are equal in lower case.
_EQUAL_ADDRESSES = r"""
SELECT format(
    'SELECT string_agg(id::text, '' and '' ORDER BY id) FROM %I.users WHERE email IS NOT NULL'
    ' GROUP BY lower(email) HAVING count(*) > 1', pg_namespace.nspname)
FROM pg_class JOIN pg_namespace ON pg_namespace.oid = pg_class.relnamespace
WHERE pg_class.relname = 'users' AND pg_class.relkind = 'r'
    AND EXISTS (SELECT FROM pg_attribute WHERE attrelid = pg_class.oid AND attname = 'email')
\gexec
"""


class DatabaseCopy:
    """The copy of all databases of a server, which is only read, to a new and empty server."""

    def __init__(
        self, source: Server, target: Server, account: Account | None, report: Callable[[str], None]
    ) -> None:
        """Prepare the copy between two servers that run.

        Args:
            source: The server to read.
            target: The server to write. Its programs are used for both, because they can read the
                servers of older versions.
            account: The account that runs the programs, if this process is root.
            report: Called with a line about each step.
        """
        self._source = source
        self._target = target
        self._account = account
        self._report = report
        self.table_count = 0
        self.row_count = 0

    @property
    def target_version(self) -> str:
        """The version of the new server, such as 18.4."""
        return self._query(self._target, "SHOW server_version").strip()

    def run(self) -> None:
        """Copy roles, databases and their settings.

        Raises:
            EmbeddedError: A part cannot be copied.
        """
        if closed := self._query(self._source, _CLOSED_DATABASES).splitlines():
            raise EmbeddedError(
                f"the database {closed[0]} accepts no connections, so it cannot be copied: run "
                "ALTER DATABASE … ALLOW_CONNECTIONS true, or drop the database"
            )
        roles = self._run("pg_dumpall", self._source, "--globals-only", "--no-tablespaces")
        self._query(self._target, roles.replace(_CREATE_SUPERUSER, ""))
        for database in self._databases():
            self._report(f"copying the database {database}")
            try:
                self._copy(database)
            except EmbeddedError as error:
                raise self._explain(error, database) from None
        script = self._run("pg_dump", self._source, "--create", "--schema-only")
        self._query(self._target, "\n".join(_DATABASE_SETTING.findall(script)))

    def verify(self) -> None:
        """Compare the rows of every table on both servers, and count them.

        Raises:
            EmbeddedError: A table or a sequence differs.
        """
        for database in self._databases():
            self._report(f"comparing the database {database}")
            original, copied = (
                self._query(server, _CONTENTS, database).splitlines()
                for server in (self._source, self._target)
            )
            if differences := sorted(set(original).symmetric_difference(copied)):
                name = differences[0].rsplit("|", 2)[0]
                raise EmbeddedError(f"the copy of {name} in the database {database} differs")
            for line in original:
                _, count, checksum = line.rsplit("|", 2)
                if checksum not in _IS_CALLED:
                    self.table_count += 1
                    self.row_count += int(count)

    def analyze(self) -> None:
        """Collect the planner's statistics, which are not copied."""
        for database in self._databases():
            self._query(self._target, "VACUUM (ANALYZE)", database)

    def _databases(self) -> list[str]:
        return self._query(self._source, _DATABASES).splitlines()

    def _copy(self, database: str) -> None:
        """Restore a dump while it is written, so that it needs no space on the disk."""
        create = () if database == _MAINTENANCE_DATABASE else ("--create",)
        options = ("--exit-on-error", "--no-tablespaces", *create)
        dump_command = self._command("pg_dump", self._source, database)
        with (
            tempfile.TemporaryFile() as dump_errors,
            subprocess.Popen(  # noqa: S603
                [*dump_command, "--format=custom", "--compress=0"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=dump_errors,
                cwd="/",
                env=environment(),
                **identity(self._account),
            ) as dump,
        ):
            try:
                restore = self._run_program(
                    [*self._command("pg_restore", self._target), *options], stdin=dump.stdout
                )
            except BaseException:
                dump.kill()
                dump.wait()
                raise
            # pg_dump receives SIGPIPE if pg_restore ends before it, once this end is closed, too.
            assert dump.stdout is not None  # noqa: S101
            dump.stdout.close()
            dump_code = dump.wait()
            dump_errors.seek(0)
            errors = dump_errors.read()
        if dump_code not in (0, -signal.SIGPIPE):
            raise _failure("pg_dump", errors)
        if restore.returncode != 0 or dump_code != 0:
            raise _failure("pg_restore", restore.stderr)

    def _explain(self, error: EmbeddedError, database: str) -> EmbeddedError:
        """Return the error with advice if the addresses of users are the cause."""
        if _ADDRESS_INDEX not in str(error):
            return error
        groups = self._query(self._target, _EQUAL_ADDRESSES, database).splitlines()
        if not groups:
            return error
        return EmbeddedError(
            "the addresses of some users differ only in the case of letters, which PostgreSQL "
            f"{self.target_version} does not distinguish outside of A to Z either: change one "
            f"address of each group by UpdateUser, and upgrade again: {'; '.join(groups)}"
        )

    def _query(self, server: Server, script: str, database: str = _MAINTENANCE_DATABASE) -> str:
        """Run SQL and return the rows as lines, with values separated by a bar."""
        options = ("--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1")
        return self._run("psql", server, *options, database=database, script=script)

    def _run(
        self,
        program: str,
        server: Server,
        *options: str,
        database: str = _MAINTENANCE_DATABASE,
        script: str = "",
    ) -> str:
        result = self._run_program(
            [*self._command(program, server, database), *options],
            data=script.encode(errors="surrogateescape"),
        )
        if result.returncode != 0:
            raise _failure(program, result.stderr)
        return result.stdout.decode(errors="surrogateescape")

    def _run_program(
        self, command: list[str | Path], *, stdin: IO[bytes] | None = None, data: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a program, and wait for its end also when this is interrupted.

        `subprocess.run` does not wait then for a program that takes longer than 0.25 s to end.
        """
        with subprocess.Popen(  # noqa: S603
            command,
            stdin=stdin or subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            env=environment(),
            **identity(self._account),
        ) as process:
            try:
                output, errors = process.communicate(None if stdin else data)
            except BaseException:
                process.kill()
                process.wait()
                raise
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def _command(
        self, program: str, server: Server, database: str = _MAINTENANCE_DATABASE
    ) -> list[str | Path]:
        values = {
            "host": str(server.socket_dir),
            "port": "5432",
            "user": "postgres",
            "dbname": database,
        }
        escaped = {name: re.sub(r"(['\\])", r"\\\1", value) for name, value in values.items()}
        connection = " ".join(f"{name}='{value}'" for name, value in escaped.items())
        return [self._target.bin_dir / program, "--no-password", f"--dbname={connection}"]


def _failure(program: str, stderr: bytes) -> EmbeddedError:
    """Return the error of a program, with its first message only: others may quote rows."""
    lines = stderr.decode(errors="replace").strip().splitlines()
    messages = [line for line in lines if "error:" in line.lower()] or lines[-1:]
    return EmbeddedError(f"{program} failed: {''.join(messages[:1]) or 'it reports no reason'}")
