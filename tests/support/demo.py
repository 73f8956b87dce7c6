"""`make demo`, in a test's folder and on free ports."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Demo:
    """The process that `make demo` runs."""

    def __init__(self, folder: Path, ports: tuple[int, int]) -> None:
        folder.mkdir(exist_ok=True)
        self.log = folder / "demo.log"
        self._ready = self.log.read_text().count("the chatbot is at") if self.log.exists() else 0
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("OPENAI_", "CHATBOT_"))
        }
        environment = kept | {
            "CHAT_HISTORY_DATA_DIR": str(folder),
            "CHAT_HISTORY_LISTEN": f"127.0.0.1:{ports[0]}",
            "CHATBOT_LISTEN": f"127.0.0.1:{ports[1]}",
            "PYTHONUNBUFFERED": "1",
        }
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "examples.chatbot.demo"],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=output,
            )

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return self.log.read_text().count("the chatbot is at") > self._ready


@asynccontextmanager
async def running_demo(folder: Path, ports: tuple[int, int]) -> AsyncGenerator[str]:
    """Run the demo, provide the chatbot's address, and end the demo as Ctrl-C does."""
    demo = Demo(folder, ports)
    try:
        async with asyncio.timeout(60):
            while not demo.is_ready():
                await asyncio.sleep(0.1)
        yield f"http://127.0.0.1:{ports[1]}"
    finally:
        demo.process.send_signal(signal.SIGINT)
        code = await asyncio.to_thread(demo.process.wait, 40)
    assert code == 0, demo.log.read_text()
