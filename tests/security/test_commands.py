"""The commands `token`, `export` and `import`, run as processes."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from chathistory.v1 import user_pb2

from tests.support import issuer
from tests.support.chat import Chat, new_messages
from tests.support.servers import ROOT, AsyncStub, connected, serving

IDENTITY: dict[str, str] = {
    "CHAT_HISTORY_AUTH": "jwt",
    "CHAT_HISTORY_JWT_KEY": issuer.SECRET,
    "CHAT_HISTORY_JWT_ISSUER": issuer.ISSUER,
    "CHAT_HISTORY_JWT_AUDIENCE": issuer.AUDIENCE,
}


class Ran(NamedTuple):
    code: int
    out: str
    err: str


async def command(
    folder: Path, *arguments: str, input_: bytes = b"", environment: dict[str, str] | None = None
) -> Ran:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("CHAT_HISTORY_")
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "service",
        *arguments,
        cwd=folder,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=inherited
        | {"PYTHONPATH": str(ROOT), "CHAT_HISTORY_SEARCH": "off"}
        | (environment or {}),
    )
    out, err = await process.communicate(input_)
    return Ran(process.returncode or 0, out.decode(), err.decode())


async def test_token(database_url: str, tmp_path: Path) -> None:
    completed = await command(tmp_path, "token", "backend", "--service", environment=IDENTITY)
    assert completed.code == 0, completed.err
    values: dict[str, Any] = {
        name.removeprefix("CHAT_HISTORY_").lower(): value for name, value in IDENTITY.items()
    }
    async with serving(database_url, **values) as server, connected(server.address) as stub:
        await stub.ListUsers(
            user_pb2.ListUsersRequest(), metadata=issuer.bearer_metadata(completed.out.strip())
        )
    without = await command(tmp_path, "token", "backend")
    assert without.code == 2
    assert "CHAT_HISTORY_JWT_KEY" in without.err
    public = tmp_path / "public.pem"
    public.write_text(issuer.public_pem(issuer.ec_key()))
    unable = await command(
        tmp_path, "token", "x", environment=IDENTITY | {"CHAT_HISTORY_JWT_KEY": str(public)}
    )
    assert (unable.code, "public key cannot sign" in unable.err) == (2, True)


async def test_export_and_import(chat: Chat, database_url: str, tmp_path: Path) -> None:
    session_id = await chat.start(new_messages(30))
    before = await chat.all(session_id)
    file = tmp_path / "user.jsonl"
    out = await command(
        tmp_path,
        "export",
        chat.user_id,
        "-o",
        str(file),
        environment={"DATABASE_URL": database_url},
    )
    assert out.code == 0, out.err
    assert "exported 1 users, 1 sessions, 30 messages" in out.err
    assert file.stat().st_mode & 0o077 == 0
    streamed = await command(
        tmp_path, "export", chat.user_id, environment={"DATABASE_URL": database_url}
    )
    assert streamed.out.encode() == file.read_bytes()
    await chat.stub.DeleteUser(user_pb2.DeleteUserRequest(user_id=chat.user_id))
    for new in (30, 0):
        done = await command(
            tmp_path, "import", str(file), environment={"DATABASE_URL": database_url}
        )
        assert done.code == 0, done.err
        assert f"{new} messages were new" in done.err
    assert await chat.all(session_id) == before
    other = "01999999-5b6c-7d8e-9f00-112233445566"
    piped = await command(
        tmp_path,
        "import",
        "-",
        "--user-id",
        other,
        input_=file.read_bytes(),
        environment={"DATABASE_URL": database_url},
    )
    assert piped.code == 0, piped.err
    assert await Chat(chat.stub, other).all(session_id) == before
    assert "audit" in piped.err


async def test_mistakes_are_reported_in_one_line(
    stub: AsyncStub, database_url: str, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text("nonsense\n")
    cases: list[tuple[Callable[[], Any], str]] = [
        (
            lambda: command(tmp_path, "export", "me", environment={"DATABASE_URL": database_url}),
            "'me' is not a user id",
        ),
        (
            lambda: command(
                tmp_path, "export", issuer_free_id(), environment={"DATABASE_URL": database_url}
            ),
            "user not found",
        ),
        (
            lambda: command(
                tmp_path, "import", "missing.jsonl", environment={"DATABASE_URL": database_url}
            ),
            "No such file",
        ),
        (
            lambda: command(
                tmp_path, "import", "bad.jsonl", environment={"DATABASE_URL": database_url}
            ),
            "line 1 is not valid JSON",
        ),
        (
            lambda: command(
                tmp_path,
                "export",
                issuer_free_id(),
                "-o",
                "no/folder",
                environment={"DATABASE_URL": database_url},
            ),
            "cannot be written",
        ),
    ]
    for run, words in cases:
        ran = await run()
        assert ran.code == 1
        assert words in ran.err
        assert "Traceback" not in ran.err


def issuer_free_id() -> str:
    return "01999999-0000-7000-8000-000000000000"
