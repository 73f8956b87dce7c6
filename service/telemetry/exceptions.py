"""Describes exceptions without their text, which may hold content, secrets or connection strings.

A leaf: imports nothing of ours, and only the standard library.
"""

from __future__ import annotations

MAX_FRAMES = 30
"""Innermost code locations that are listed of each exception."""
MAX_EXCEPTIONS = 5
"""Exceptions that are listed of a chain."""


def locations(error: BaseException) -> list[str]:
    """Return the code locations of an exception and its causes, outermost call first."""
    lines = _frames(error)
    for _ in range(MAX_EXCEPTIONS - 1):
        cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if cause is None:
            break
        lines += [f"caused by {type(cause).__name__}", *_frames(cause)]
        error = cause
    return lines


def _frames(error: BaseException) -> list[str]:
    frames: list[str] = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append(location(code.co_filename, trace.tb_lineno, code.co_name))
        trace = trace.tb_next
    return frames[-MAX_FRAMES:]


def location(path: str, line_number: int, function: str) -> str:
    """Return a code location as text."""
    return f"{path.rsplit('/', 1)[-1]}:{line_number} {function}".rstrip()
