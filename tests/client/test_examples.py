"""The examples in the client's docstrings produce the documented output."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import io
import pkgutil
import sys
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

import chathistory_client
from chathistory_client import ChatHistoryClient
from service.server import Server

_PARSER = doctest.DocTestParser()
_CHECKER = doctest.OutputChecker()


def _documented() -> Iterator[tuple[str, str]]:
    """Yield every docstring of the client with the name of its module, class or function."""
    names = [
        module.name
        for module in pkgutil.iter_modules(chathistory_client.__path__, "chathistory_client.")
    ]
    for name in ["chathistory_client", *names]:
        module = importlib.import_module(name)
        yield name, module.__doc__ or ""
        members = [
            (key, value)
            for key, value in vars(module).items()
            if getattr(value, "__module__", "") == name
        ]
        for key, value in members:
            yield f"{name}.{key}", inspect.getdoc(value) or ""
            if inspect.isclass(value):
                for method, function in vars(value).items():
                    if inspect.isfunction(function):
                        yield f"{name}.{key}.{method}", function.__doc__ or ""


EXAMPLES = {name: text for name, text in _documented() if ">>>" in text}


async def _run(source: str, namespace: dict[str, Any]) -> str:
    """Run one example, which may use `await`, as the REPL would, and return its output."""
    printed = io.StringIO()  # Standard output also holds the log of the server under test.

    def show(value: object) -> None:
        if value is not None:
            print(repr(value), file=printed)

    code = compile(
        source, "<example>", "single", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True
    )
    namespace["print"] = partial(print, file=printed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "displayhook", show)
        result = eval(code, namespace)
        if inspect.iscoroutine(result):
            await result
    return printed.getvalue()


@pytest.mark.parametrize("name", EXAMPLES)
async def test_example_prints_the_documented_output(
    name: str, client: ChatHistoryClient, owner: str, server: Server
) -> None:
    namespace: dict[str, Any] = {
        key: getattr(chathistory_client, key) for key in chathistory_client.__all__
    }
    namespace |= {"client": client, "user_id": owner, "address": server.address, "uuid": uuid}
    for example in _PARSER.get_examples(EXAMPLES[name]):
        printed = await _run(example.source, namespace)
        assert _CHECKER.check_output(example.want, printed, 0), (
            f"{example.source}: expected {example.want!r}, got {printed!r}"
        )


def test_examples_are_found() -> None:
    assert len(EXAMPLES) >= 15
