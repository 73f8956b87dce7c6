"""The prose check: the words it rejects in each kind of file, and those it accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import prose

RULES = prose.read_rules(prose.WORDS.read_text())


def rejected(path: str, source: str) -> list[tuple[int, str]]:
    return sorted((finding.line, finding.word) for finding in prose.check(path, source, RULES))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("The index is built anew.", "anew"),
        ("Calls that are under\nway finish.", "under way"),
        ("It HANGS UP.", "HANGS UP"),
        ("so many at a time", "so many"),
        ("It restarts by itself.", "by itself"),
        ("pip install 'chat-history[search]'", "chat-history["),
        ("It waits. What comes later joins the next batch.", "What"),
    ],
)
def test_dialect_in_markdown_is_rejected(text: str, word: str) -> None:
    assert word in [finding for _, finding in rejected("docs/page.md", text)]


@pytest.mark.parametrize(
    "text",
    [
        "Besides, the telltale is a standstill: a way forward, see the table, ashore, now.",
        "Write `anew` and ``lies``\nas code.",
        "so `anew` many",
        "```sh\necho anew\n```\n\n~~~~\n```\nanew\n~~~~",
        "# What it is\n\nWhat is it? See: what a batch holds.",
        "The command is chat-history, the distribution chathistory-service[search].",
    ],
)
def test_plain_words_and_code_in_markdown_pass(text: str) -> None:
    assert rejected("docs/page.md", text) == []


def test_markdown_finding_has_the_line_of_its_word() -> None:
    assert rejected("docs/page.md", "# Title\n\n```\ncode\n```\n\nIt is\nanew.") == [(8, "anew")]


def test_python_comments_docstrings_and_strings_are_read() -> None:
    source = '''\
"""Module beside another."""

# A comment that runs over so
# many lines.
RETRY = f"tells {RETRY} anew"


def serve() -> None:
    """Serve.

    It lies here.
    """
'''
    assert rejected("service/module.py", source) == [
        (1, "beside"),
        (3, "so many"),
        (5, "anew"),
        (5, "tells"),
        (11, "lies"),
    ]


def test_string_literals_under_tests_are_data() -> None:
    source = '"""The docstring lies."""\n# A comment lies.\ntext = "A user lies."\n'
    assert rejected("tests/unit/test_x.py", source) == [(1, "lies"), (2, "lies")]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("for each in rows: pass", "each"),
        ("def f(*, owed): pass", "owed"),
        ("def hang_up(): pass", "hang up"),
        ("class NothingToldAnew: pass", "Told"),
        ("self._found = 1", "_found"),
        ("call(whose=1)", "whose"),
        ("import json as place", "place"),
        ("if (made := f()): pass", "made"),
        ("def on_doubt(): pass", "on_doubt"),
        ("lambda said: 0", "said"),
        ("try: f()\nexcept E as gone: pass", "gone"),
        ("match x:\n    case [*one]: pass", "one"),
        ("class Permits: pass", "Permits"),
    ],
)
def test_dialect_in_a_defined_name_is_rejected(source: str, name: str) -> None:
    assert name in [finding for _, finding in rejected("service/module.py", source)]


@pytest.mark.parametrize(
    "source",
    [
        "from hypothesis import given",
        "print(reply.found, library.told)",
        "not_found = is_found = placement = 1",
        "async def gather(): pass",
        '"A text with `anew` in a code span."',
        '"What is this?"',
    ],
)
def test_uses_of_foreign_names_and_similar_names_pass(source: str) -> None:
    assert rejected("service/module.py", source) == []


@pytest.mark.parametrize(
    "source", ['"""What the database says."""', "# Who waits for a lock\n# waits long."]
)
def test_text_that_begins_with_a_headless_clause_is_rejected(source: str) -> None:
    assert len(rejected("service/module.py", source)) == 1


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("protos/a.proto", "// It is\n// so\n// many.\nmessage Anew {}", [(2, "so many")]),
        ("page/a.css", "/* beside */ .away { color: red }", [(1, "beside")]),
        ("page/a.js", 'const url = "http://x/anew";\n// anew\n', [(1, "anew"), (2, "anew")]),
        ("page/a.ts", "for (const each of rows) `a ${anew}`;", [(1, "each")]),
        (
            "page/a.html",
            '<!-- anew -->\n<p class="away" title="beside">It\nlies</p><script>let made;</script>',
            [(1, "anew"), (2, "beside"), (3, "lies"), (3, "made")],
        ),
        ("Makefile", "run: ## run anew", [(1, "anew")]),
        ("service/store/permits.py", "", [(1, "store/permits")]),
        ("Makefile", f"# short\n# {'long ' * 20}", [(2, "# long long long lon…")]),
        ("docs/page.md", "long " * 21, []),
    ],
)
def test_other_files_are_read_by_their_kind(
    path: str, source: str, expected: list[tuple[int, str]]
) -> None:
    assert rejected(path, source) == expected


def test_files_skip_generated_code_and_other_projects(tmp_path: Path) -> None:
    paths = ["a.py", "a.txt", ".venv/b.py", "node_modules/c/c.js", "docs/d.md", ".github/e.yml"]
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    selected = [path.relative_to(tmp_path).as_posix() for path in prose.files([tmp_path])]
    assert selected == ["a.py", ".github/e.yml", "docs/d.md"]


def test_word_list_without_a_suggestion_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prose-words.txt:2"):
        prose.read_rules("[words]\nanew\n")
