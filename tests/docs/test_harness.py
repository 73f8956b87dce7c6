"""The harness finds every fence, and notices when an example does not do what its page says."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.docs import configurations
from tests.docs.fences import Fence, fences_of
from tests.docs.scenario import ExampleFailed, Scenario
from tests.support.cluster import Cluster


def parse(folder: Path, text: str) -> list[Fence]:
    page = folder / "page.md"
    page.write_text(textwrap.dedent(text))
    return fences_of(page, folder)


def test_fences_in_tabs_and_lists_are_found_with_their_directives(tmp_path: Path) -> None:
    fences = parse(
        tmp_path,
        """\
        Text.

        <!-- example: file=a.py input='you> ' -->

        ```python
        print(1)
        ```

        === "Python"

            Text in a tab.

            ```sh
            true
            ```

            !!! note "A note in the tab"

                ```json
                {}
                ```

        === "TypeScript"

            <!-- example: output -->

            ```ts title="chatbot.ts"
            let x = 1;
            ```

        - An item:

            ~~~yaml
            a: 1
            ~~~
        """,
    )
    assert [(fence.line, fence.language, fence.tab, fence.directives) for fence in fences] == [
        (5, "python", "", {"file": "a.py", "input": "you> "}),
        (13, "sh", "Python", {}),
        (19, "json", "Python", {}),
        (27, "ts", "TypeScript", {"output": ""}),
        (33, "yaml", "", {}),
    ]


def test_a_directive_belongs_to_the_fence_directly_after_it(tmp_path: Path) -> None:
    [fence] = parse(tmp_path, "<!-- example: output -->\n\nText.\n\n```sh\ntrue\n```\n")
    assert fence.directives == {}


def test_code_that_is_indented_and_not_fenced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"page\.md:3: indented code"):
        parse(tmp_path, "Text.\n\n    make run\n")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```sh\nfalse\necho unreached\n```", "exit code 1"),
        ("```sh\ntrue | false\n```", "exit code 1"),
        ("```python\nimport missing_module\n```", "ModuleNotFoundError"),
        ("```python\nimport warnings\nwarnings.warn('old')\n```", "UserWarning"),
        ("```sh\necho 1\n```\n\n<!-- example: output -->\n\n```text\n2\n```", "it printed\n1"),
        ("```console\n$ echo 1\n2\n```", "it printed\n1"),
        ("```sql\nSELECT missing;\n```", 'column "missing" does not exist'),
        ("```cobol\nSTOP RUN.\n```", "cannot run 'cobol'"),
    ],
)
async def test_an_example_that_fails_is_reported(
    text: str, problem: str, folder: Path, tmp_path: Path, cluster: Cluster
) -> None:
    with pytest.raises(ExampleFailed, match=r"page\.md:\d+") as failure:
        async with Scenario(parse(tmp_path, text), folder, cluster) as scenario:
            await scenario.follow()
    assert problem in str(failure.value)


async def test_shell_examples_share_variables_and_the_working_folder(
    folder: Path, tmp_path: Path, cluster: Cluster
) -> None:
    text = """\
        ```sh
        mkdir inner
        cd inner
        export GREETING='two words'
        ```

        ```console
        $ basename "$PWD"
        inner
        $ echo "$GREETING"
        two words
        ```
    """
    async with Scenario(parse(tmp_path, text), folder, cluster) as scenario:
        await scenario.follow()


@pytest.mark.parametrize(
    ("language", "code", "problem"),
    [
        ("yaml", "env:\n  - name: A\n    value: 5", "must be a string"),
        ("yaml", "env:\n  - name: A", "needs one of value and valueFrom"),
        ("yaml", "kind: Robot\nmetadata: {name: a}", "does not know the kind"),
        ("yaml", "kind: Pod\napiVersion: v1\nmetadata: {}", "no metadata.name"),
        (
            "yaml",
            "kind: Pod\napiVersion: v1\nmetadata: {name: a}\nspec: {containers: [{name: a}]}",
            "lacks its image",
        ),
        ("env", "CHAT_HISTORY_LISTEN", "has no value"),
    ],
)
def test_a_malformed_configuration_is_reported(language: str, code: str, problem: str) -> None:
    with pytest.raises(AssertionError, match=problem):
        configurations.CHECKS[language](code, "page.md:1")


def test_a_setting_that_does_not_exist_is_reported() -> None:
    text = "`CHAT_HISTORY_LISTEN` and `CHAT_HISTORY_LISTENS`, `QDRANT_URI`"
    assert configurations.unknown_settings(text) == {"CHAT_HISTORY_LISTENS", "QDRANT_URI"}
