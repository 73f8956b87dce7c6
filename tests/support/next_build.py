"""A simulated next build of the service, which requires one more migration."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from service.store import tables
from service.store.schema import migrations
from tests.support.servers import ROOT

_PROGRAM = """
import sys
from collections.abc import Callable
from pathlib import Path
from service.store import tables
from service.store.schema import migrations
migrations.SCRIPTS_DIR = Path(sys.argv.pop(1))
tables.BUILD = tables.REQUIRED_REVISION = tables.BUILD + 1
from {module} import main
main()
"""
_MIGRATION = '''
"""Migrate to the schema of the next build."""

from alembic import op

revision = "{next:04d}"
down_revision = "{now:04d}"


def upgrade() -> None:
    for sql in {statements!r}:
        op.execute(sql)
'''


class NextBuild:
    """The next build: the code of this build with an additional migration, in a test's folder."""

    def __init__(self, folder: Path, *statements: str) -> None:
        """Write the migration, which runs `statements`."""
        self.revision = tables.BUILD + 1
        self._folder = folder
        self._scripts = folder / "alembic"
        shutil.copytree(
            migrations.SCRIPTS_DIR, self._scripts, ignore=shutil.ignore_patterns("__pycache__")
        )
        text = _MIGRATION.format(now=tables.BUILD, next=self.revision, statements=statements)
        (self._scripts / "versions" / "next.py").write_text(text)

    @property
    def server_command(self) -> tuple[str, ...]:
        """The interpreter's arguments that start a server of this build (see `ServerProcess`)."""
        return "-c", _PROGRAM.format(module="tests.support.serve"), str(self._scripts)

    async def migrate(
        self, database_url: str, on_line: Callable[[str], None] = lambda _line: None
    ) -> None:
        """Run `chat-history migrate` of this build; call `on_line` with each line of output."""
        variables = {
            "DATABASE_URL": database_url,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "200",
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            _PROGRAM.format(module="service.cli"),
            str(self._scripts),
            "migrate",
            cwd=self._folder,
            env=os.environ | variables,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        assert process.stdout is not None
        output: list[str] = []
        async for line in process.stdout:
            output.append(line.decode())
            on_line(output[-1])
        assert await process.wait() == 0, output
