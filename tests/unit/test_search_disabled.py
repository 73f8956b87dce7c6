"""A service without search neither loads nor needs the libraries of the index."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from service.errors import FailedPrecondition
from service.search.disabled import SearchDisabled
from service.search.service import Search


def test_import_loads_no_search_library() -> None:
    program = (
        "import sys, service.rpc.servicer, service.search.disabled\n"
        "print(*{'numpy', 'openai', 'qdrant_client', 'wordllama'} & set(sys.modules))"
    )
    completed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert completed.stdout.split() == []


async def test_queries_raise_search_disabled() -> None:
    search = SearchDisabled()
    for query in (search.search_chunks, search.search_messages, search.rerank):
        with pytest.raises(FailedPrecondition) as caught:
            await query()
        assert caught.value.reason == "SEARCH_DISABLED"
    with pytest.raises(FailedPrecondition):
        search.rebuild()


def test_search_disabled_has_every_public_method_of_search() -> None:
    methods = {name for name, _ in inspect.getmembers(Search, callable) if not name.startswith("_")}
    assert methods <= set(dir(SearchDisabled))
