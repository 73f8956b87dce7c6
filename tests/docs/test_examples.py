"""Every fenced example of the documentation does what its page says."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from typer.testing import CliRunner

from benchmarks import cli
from tests.docs import configurations
from tests.docs.fences import Fence, fences_of
from tests.docs.scenario import Scenario
from tests.support.cluster import Cluster
from tests.support.servers import ROOT
from tests.support.tools import require_program

PAGES = sorted(
    {
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/*/README.md"),
        *(
            ROOT / name
            for name in (
                "README.md",
                "CONTRIBUTING.md",
                "SECURITY.md",
                "client/README.md",
                "generated/README.md",
            )
            if (ROOT / name).exists()
        ),
    }
)

_INSTALL = "tests/docs/test_install.py::test_the_documented_commands_install_and_serve"
_CLIENT_INSTALL = (
    "tests/client/test_package.py"
    "::test_client_wheel_installs_with_its_own_dependencies_only_and_works"
)
_TARGETS = "tests/docs/test_examples.py::test_the_targets_of_make_that_pages_name_exist"
_NEON_CHECK = (
    "ok    database      "
    "ep-cool-sun-a1b2c3d4-pooler.eu-central-1.aws.neon.tech/neondb as chat_history"
)
_BENCHMARKS = "docs/explanation/performance.md"
_PROFILED_BENCHMARK = (
    ".venv/bin/python -m benchmarks append --in-flight 64 --rounds 20   "
    "# prints process ids for py-spy"
)
NOT_RUN: dict[tuple[str, str], str] = {
    (
        "CONTRIBUTING.md",
        "make install                # create .venv with the pinned dependencies",
    ): (_TARGETS),
    (
        "CONTRIBUTING.md",
        "pipx run pre-commit install                               # check each commit",
    ): ("tests/docs/test_examples.py::test_the_settings_for_a_clone_name_existing_files"),
    (_BENCHMARKS, _PROFILED_BENCHMARK): (
        "tests/docs/test_examples.py::test_the_commands_of_the_benchmarks_have_these_options"
    ),
    (
        "docs/explanation/stability.md",
        "make soak                          # five minutes of load and a minute idle",
    ): ("tests/soak/test_soak.py::test_mixed_load_under_faults_of_every_kind_has_no_problems"),
    (
        "docs/explanation/stability.md",
        "make hostile                                # 300 attacks, about 20 minutes",
    ): ("tests/docs/test_examples.py::test_the_command_of_hostile_attacks_has_these_options"),
    ("README.md", "make test"): _TARGETS,
    ("README.md", "pip install 'chathistory-service[auth,embedded,search]'"): _INSTALL,
    ("docs/how-to/fastapi.md", "pip install chathistory-client"): _CLIENT_INSTALL,
    ("docs/how-to/identity.md", "pip install 'chathistory-service[auth]'"): _INSTALL,
    ("docs/how-to/neon.md", _NEON_CHECK): (
        "tests/faults/test_neon.py::test_connection_strings_of_the_console_work_unchanged"
    ),
    ("docs/how-to/search.md", "pip install 'chathistory-service[search]'"): _INSTALL,
    (
        "docs/how-to/upgrade.md",
        "pip install --upgrade 'chathistory-service[auth,embedded,search]'",
    ): _INSTALL,
    ("README.md", "pip wheel --no-deps --wheel-dir wheels . ./client ./generated"): _INSTALL,
}
"""Tests that cover the examples that cannot run as part of their page, by page and first line."""

FENCES = [fence for page in PAGES for fence in fences_of(page, ROOT)]
_NODE = ("js", "javascript", "ts", "typescript")


def _scenarios() -> list[object]:
    """Return a parameter for each page with examples, and for each of its tabs."""
    parameters: list[object] = []
    for page in dict.fromkeys(fence.page for fence in FENCES):
        fences = [fence for fence in FENCES if fence.page == page and fence.key not in NOT_RUN]
        titles = list(dict.fromkeys(fence.tab for fence in fences if fence.tab)) or [""]
        for title in titles:
            own = [fence for fence in fences if fence.tab in ("", title)]
            if own:
                needs_node = any(fence.language in _NODE for fence in own)
                marks = [pytest.mark.network] if needs_node else []
                name = f"{page}[{title}]" if title else page
                parameters.append(pytest.param(own, id=name, marks=marks))
    return parameters


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("durable_server")
@pytest.mark.parametrize("fences", _scenarios())
async def test_examples_do_what_the_page_says(
    fences: list[Fence], folder: Path, cluster: Cluster
) -> None:
    if any(fence.language in _NODE for fence in fences):
        require_program("node")
        require_program("npm")
    async with Scenario(fences, folder, cluster) as scenario:
        await scenario.follow()


def test_every_example_is_run_or_names_the_test_that_covers_it() -> None:
    run = {fence.location for values in _scenarios() for fence in values.values[0]}  # type: ignore[attr-defined]
    left = [
        fence.location for fence in FENCES if fence.location not in run and fence.key not in NOT_RUN
    ]
    assert not left


def test_every_exception_is_of_an_existing_example_and_test() -> None:
    keys = {fence.key for fence in FENCES}
    assert [key for key in NOT_RUN if key not in keys] == []
    for covering in NOT_RUN.values():
        file, _, function = covering.partition("::")
        assert re.search(rf"def {function}\b", (ROOT / file).read_text()), covering


def test_the_targets_of_make_that_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    command = r"(?:^|`)(?:[A-Z_]+=\S+ )*make ([a-z-]+)\b"
    named = {
        target for page in PAGES for target in re.findall(command, page.read_text(), re.MULTILINE)
    }
    assert named - targets == set()


def test_the_settings_for_a_clone_name_existing_files() -> None:
    assert (ROOT / ".git-blame-ignore-revs").exists()
    assert yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]


def test_the_commands_of_the_benchmarks_have_these_options() -> None:
    commands = [
        line.partition("#")[0].split()[3:]
        for fence in FENCES
        if fence.page == _BENCHMARKS and "-m benchmarks" in fence.code
        for line in fence.code.splitlines()
    ]
    for command in commands:
        # `--help` shows its text only if it knows every option.
        result = CliRunner().invoke(cli.app, [*command, "--help"])
        assert result.exit_code == 0, result.output
    assert commands


def test_the_command_of_hostile_attacks_has_these_options() -> None:
    dry_run = subprocess.run(
        ["make", "-n", "hostile", "SEED=2", "ATTACKS=60", "SOAK=1800"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    options = dry_run.replace("\\\n", " ").partition("-m benchmarks")[2].split()
    assert {"2", "60", "1800"} <= set(options)
    for arguments in (options, ["hostile", "--only", "resets"]):
        result = CliRunner().invoke(cli.app, [*arguments, "--help"])
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_settings_that_a_page_names_exist(page: Path) -> None:
    assert configurations.unknown_settings(page.read_text()) == set()
