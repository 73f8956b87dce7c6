"""Every example in the client's docstrings does what it says."""

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
    """Yield every docstring of the client that has examples, with the name of what it stands at."""
    names = [
        module.name
        for module in pkgutil.iter_modules(chathistory_client.__path__, "chathistory_client.")
    ]
    for name in ["chathistory_client", *names]:
        module = importlib.import_module(name)
        yield name, module.__doc__ or ""
        own = [(k, v) for k, v in vars(module).items() if getattr(v, "__module__", "") == name]
        for key, value in own:
            yield f"{name}.{key}", inspect.getdoc(value) or ""
            if inspect.isclass(value):
                for method, function in vars(value).items():
                    if inspect.isfunction(function):
                        yield f"{name}.{key}.{method}", function.__doc__ or ""


EXAMPLES = {name: text for name, text in _documented() if ">>>" in text}


async def _run(source: str, namespace: dict[str, Any]) -> str:
    """Run one example, which may await, as the interactive interpreter would, and return what it prints."""
    printed = io.StringIO()  # And not standard output, where the server of the test writes its log.

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
async def test_example(name: str, client: ChatHistoryClient, owner: str, server: Server) -> None:
    namespace: dict[str, Any] = {
        key: getattr(chathistory_client, key) for key in chathistory_client.__all__
    }
    namespace |= {"client": client, "user_id": owner, "address": server.address, "uuid": uuid}
    for example in _PARSER.get_examples(EXAMPLES[name]):
        printed = await _run(example.source, namespace)
        assert _CHECKER.check_output(example.want, printed, 0), (
            f"{example.source}wants {example.want!r}, got {printed!r}"
        )


def test_what_matters_has_examples() -> None:
    assert len(EXAMPLES) >= 15
