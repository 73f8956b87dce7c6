"""Reads the files of a connection string again, so that a changed secret needs no restart.

They are read for each new connection, which costs little compared with connecting. Open connections
keep working until the server ends them or the pool replaces them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import structlog

from service.store.db.dsn import Target

_log = structlog.get_logger(__name__)

Stamp = tuple[int, int, int]


class TextFile(NamedTuple):
    """A file that holds the value of a setting."""

    setting: str
    path: Path

    def read(self) -> str:
        """Return the content without the newlines at its end.

        Raises:
            ValueError: there is none, or it cannot be read. The message names the setting and the
                path, and quotes no content.
        """
        try:
            text = self.path.read_text(encoding="utf-8").rstrip("\r\n")
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ValueError(f"{self.setting}: {self.path} cannot be read: {reason}") from None
        except UnicodeDecodeError:
            raise ValueError(f"{self.setting}: {self.path} is not UTF-8 text") from None
        if not text.strip():
            raise ValueError(f"{self.setting}: {self.path} is empty")
        return text


class TargetFiles:
    """A target some parts of which are in files: the string, the password, keys for TLS."""

    def __init__(
        self,
        parse_text: Callable[[str], Target],
        string: str | TextFile,
        password_file: TextFile | None = None,
    ) -> None:
        """Take the string or its file.

        Args:
            parse_text: Parses the string.
            string: The connection string, or the file that holds it.
            password_file: Holds the password, which replaces that of the string.
        """
        self._parse_text = parse_text
        self._string = string
        self._password_file = password_file
        self._texts: tuple[str, str | None] | None = None
        self._stamps: list[Stamp | None] = []
        self._target: Target | None = None
        self._logged_problem = ""

    def load(self) -> Target:
        """Return the target as the files have it now.

        Raises:
            ValueError: a file cannot be read, or its content is malformed. The message contains no
                secret.
        """
        texts = self._read_texts()
        if (
            self._target is not None
            and texts == self._texts
            and self._stamps == [_stamp(path) for path in self._target.files]
        ):
            return self._target
        target = self._parse_text(texts[0])
        if texts[1] is not None:
            target = replace(target, url=target.url.set(password=texts[1]))
        self._target = replace(target, read_again=self.current)
        self._texts, self._stamps = texts, [_stamp(path) for path in target.files]
        return self._target

    def current(self) -> Target:
        """Return the target as the files have it now, or the last one that was well-formed."""
        last = self._target
        try:
            target = self.load()
        except ValueError as error:
            if last is None:
                raise
            if str(error) != self._logged_problem:
                self._logged_problem = str(error)
                _log.warning(
                    "database secrets cannot be read; the last ones stay", problem=str(error)
                )
            return last
        self._logged_problem = ""
        if last is not None and target is not last:
            _log.info("database secrets reloaded")
        return target

    def _read_texts(self) -> tuple[str, str | None]:
        """Return the string and the password of the files."""
        string = self._string.read() if isinstance(self._string, TextFile) else self._string
        return string, self._password_file.read() if self._password_file else None


def _stamp(path: str) -> Stamp | None:
    """Return what changes with a file, also when a symbolic link leads to another one."""
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
