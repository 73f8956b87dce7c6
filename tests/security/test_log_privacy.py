"""The service's own log holds no content, whatever component fails or reports."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.quick

SECRET = "xyzzy-7f3a9c-plugh"


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program that must fail."""
    result = subprocess.run(
        [sys.executable, *arguments], check=False, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    return result


def run_failing_program(log_format: str, loop: str = "uvloop") -> str:
    """Return what the program writes to both of its outputs."""
    result = run_python("-m", "tests.support.failing", SECRET, log_format, loop)
    return result.stdout + result.stderr


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("log_format", ["json", "console"])
def test_reports_of_libraries_and_the_interpreter_hold_no_content(
    log_format: str, loop: str
) -> None:
    output = run_failing_program(log_format, loop)
    assert "start of the test" in output
    lines = [line for line in output.splitlines() if SECRET in line]
    assert not lines, "\n".join(lines[:3])


def test_reports_name_the_exception_and_its_location() -> None:
    """The report must be enough to find the fault."""
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in run_failing_program("json").splitlines()
    ]
    by_event: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_event.setdefault(line["event"], []).append(line)
    for event in ("with a traceback", "with a traceback, too", "with an exception"):
        (line,) = by_event[event]
        assert line["error"] == "ValueError"
        assert line["where"][0].endswith(" main")
        assert line["where"][1].startswith("failing.py:")
        assert "caused by KeyError" in line["where"]
    reports = by_event["message of a library"]
    first = reports[0]
    assert first["logger"] == "grpc._cython.cygrpc"
    assert first["template"] == "Unexpected [%s] raised by servicer method [%s]"
    assert first["at"].endswith(" fail_in_library_logs")
    assert (first["error"], first["severity"]) == ("ValueError", "error")
    assert {report["logger"] for report in reports} >= {"grpc._cython.cygrpc", "asyncio"}
    sources = [line["source"] for line in by_event["unhandled exception"]]
    assert sources == ["thread", "finalizer", "main"]
    assert all(line["error"] == "ValueError" for line in by_event["unhandled exception"])
    (warning,) = by_event["warning of a library"]
    assert warning["category"] == "RuntimeWarning"
    assert warning["at"].startswith("failing.py:")


def test_unexpected_error_of_a_command_is_shown_without_its_text() -> None:
    """The output of a command is a log where an orchestrator runs it."""
    program = (
        "import sys\n"
        "from service import cli\n"
        "def fail(): raise ValueError(secret)\n"
        "secret = sys.argv.pop()\n"
        "cli.app.command('fail')(fail)\n"
        "cli.main()\n"
    )
    result = run_python("-c", program, "fail", SECRET)
    assert "unexpected ValueError" in result.stderr
    assert "<string>:3 fail" in result.stderr
    assert SECRET not in result.stdout + result.stderr


def test_failure_of_the_search_process_is_logged_without_its_text() -> None:
    program = (
        "import sys, socket\n"
        "from service.search.worker import child\n"
        "async def fail(_): raise ValueError(secret)\n"
        "secret, child.serve = sys.argv.pop(), fail\n"
        "ends = socket.socketpair()\n"
        "sys.argv.append(str(ends[0].detach()))\n"
        "child.main()\n"
    )
    result = run_python("-c", program, SECRET)
    assert "unhandled exception" in result.stderr
    assert "<string>:3 fail" in result.stderr
    assert SECRET not in result.stdout + result.stderr
