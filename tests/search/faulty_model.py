"""Starts search processes whose model crashes or hangs on marked texts, and reads what it did."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.search.fault_model.wordllama import CRASH, HANG, SLOW

__all__ = ["CRASH", "HANG", "SLOW", "FaultyModel"]


class FaultyModel:
    """The stand-in model of all search processes that start while `monkeypatch` is in force."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._log = folder / "computed-texts"
        path = os.pathsep.join([str(Path(__file__).parent / "fault_model"), *_python_path()])
        monkeypatch.setenv("PYTHONPATH", path)
        monkeypatch.setenv("FAULT_MODEL_LOG", str(self._log))

    def computed(self, mark: str = "") -> list[str]:
        """Return the beginnings of all computed texts with a mark, in order."""
        if not self._log.exists():
            return []
        texts = [json.loads(line) for line in self._log.read_text().splitlines()]
        return [text for text in texts if mark in text]


def _python_path() -> list[str]:
    # The search process must find the service wherever the tests run.
    return [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
