"""Replaces the package `wordllama` in the search process: marked texts crash or delay it.

A test puts this folder on PYTHONPATH before it starts the search process. Each computed text is
appended to the file FAULT_MODEL_LOG, as a line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CRASH, HANG, SLOW = "crashes-the-model", "hangs-the-model", "slows-the-model"
"""Marks within texts. Single words are not checked: reranking calls the model with those."""
SLOW_S = 0.03


class _Encoded(NamedTuple):
    ids: list[int]


class _Tokenizer:
    def no_padding(self) -> None:
        """Do nothing."""

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> list[_Encoded]:
        return [_encode(text) for text in texts]


class _Model:
    def __init__(self) -> None:
        self.tokenizer = _Tokenizer()
        self.embedding: Any = np.random.default_rng(1).standard_normal((256, 256), np.float32)


class WordLlama:
    """The entry point of the package."""

    @staticmethod
    def load(cache_dir: Path, disable_download: bool) -> _Model:  # noqa: ARG004 - as above
        return _Model()


def _encode(text: str) -> _Encoded:
    if " " in text:
        with Path(os.environ["FAULT_MODEL_LOG"]).open("a") as log:
            log.write(json.dumps(text[:80]) + "\n")
        if CRASH in text:
            os.kill(os.getpid(), signal.SIGKILL)
        if HANG in text:
            time.sleep(600)
        if SLOW in text:
            time.sleep(SLOW_S)
    return _Encoded(list(hashlib.sha256(text.encode()).digest()[:4]))
