"""What the documents promise, tried."""

import asyncio
import re
import sys
from pathlib import Path

from chathistory.v1 import chat_history_service_pb2

from service.server import Server

ROOT = Path(__file__).parents[2]


async def test_the_readme_snippet_works_as_printed(server: Server) -> None:
    readme = (ROOT / "README.md").read_text()
    found = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert found
    snippet = found[1].replace("127.0.0.1:50051", server.address)
    assert server.address in snippet
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-W",
        "error",
        "-c",
        snippet,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert out.decode().strip() == "[(1, 'Hello!')] 2"


def test_the_readme_names_every_rpc() -> None:
    readme = (ROOT / "README.md").read_text()
    service = chat_history_service_pb2.DESCRIPTOR.services_by_name["ChatHistoryService"]
    missing = [method.name for method in service.methods if f"`{method.name}`" not in readme]
    assert not missing
