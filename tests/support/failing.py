"""Program that fails in every way in which a library or the interpreter reports an exception.

Every text, local variable and argument at hand holds the secret, which is the program's argument.
Then it ends with an unhandled exception.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Literal, cast

import structlog
import uvloop

from service.telemetry.logs import configure_logging

_log = structlog.get_logger("service.example")


class FailsAtEnd:
    """An object whose finalizer raises."""

    def __init__(self, secret: str) -> None:
        self.secret = secret

    def __repr__(self) -> str:
        return self.secret

    def __del__(self) -> None:
        raise ValueError(self.secret)


def fail(secret: str) -> None:
    try:
        raise KeyError(secret)  # noqa: TRY301
    except KeyError as error:
        raise ValueError(f"about {secret}") from error


def fail_in_library_logs(secret: str) -> None:
    """Log as grpc, asyncio and SQLAlchemy do."""
    logger = logging.getLogger("grpc._cython.cygrpc")
    try:
        fail(secret)
    except ValueError as error:
        logger.exception("Unexpected [%s] raised by servicer method [%s]", error, "/m")  # noqa: TRY401
        logger.exception(f"Unexpected [{error}] raised")  # noqa: G004, TRY401
        logger.warning("%r is strange", secret)
        logger.warning({"text": secret})
        logger.error(secret, stack_info=True)  # noqa: TRY400
        logging.getLogger("httpx").warning(f"about {secret}: %s", 1)  # noqa: G004


async def fail_in_loop(secret: str) -> None:
    loop = asyncio.get_running_loop()

    async def work() -> None:
        fail(secret)

    task = loop.create_task(work(), name=secret)
    loop.call_soon(fail, secret)
    await asyncio.sleep(0.01)
    del task
    gc.collect()
    await asyncio.sleep(0.01)


def main(secret: str, log_format: str, loop: str) -> None:
    configure_logging("debug", cast("Literal['console', 'json']", log_format))
    _log.warning("start of the test")
    try:
        fail(secret)
    except ValueError as error:
        _log.error("with a traceback", exc_info=True)
        _log.exception("with a traceback, too")
        _log.error("with an exception", exc_info=error)
    fail_in_library_logs(secret)
    run: Callable[..., None] = uvloop.run if loop == "uvloop" else asyncio.run
    run(fail_in_loop(secret))
    thread = threading.Thread(target=fail, args=(secret,), name=secret)
    thread.start()
    thread.join()
    FailsAtEnd(secret)
    gc.collect()
    warnings.warn(secret, RuntimeWarning, stacklevel=1)
    fail(secret)


if __name__ == "__main__":
    main(*sys.argv[1:])
