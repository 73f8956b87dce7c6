"""tsquery: the tree of a full-text query, and the words that it implies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.store import tsquery
from service.store.tsquery import And, Node, Not, Or, Phrase, RequiredWords, Term

A, B, C = Term("a"), Term("b"), Term("c")

terms = st.builds(Term, st.text("ab' \\&|!()<->é\u3042", min_size=1, max_size=6))


def operands(nodes: st.SearchStrategy[Node]) -> st.SearchStrategy[tuple[Node, ...]]:
    return st.lists(nodes, min_size=2, max_size=4).map(tuple)


def phrases(nodes: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    distances = st.sampled_from(["-", "2", "17"])
    return operands(nodes).flatmap(
        lambda kept: st.builds(Phrase, st.just(kept), st.tuples(*[distances] * (len(kept) - 1)))
    )


def inner_nodes(nodes: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    return st.one_of(
        nodes.filter(lambda node: not isinstance(node, Not)).map(Not),
        operands(nodes).map(And),
        operands(nodes).map(Or),
        phrases(nodes),
    )


nodes = st.recursive(terms, inner_nodes, max_leaves=20)


@given(nodes)
def test_rendered_query_is_parsed_to_the_same_tree(node: Node) -> None:
    assert tsquery.parse(tsquery.render(node)) == node


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("", None),
        ("'a'", A),
        ("'it''s' & 'b\\\\c'", And((Term("it's"), Term("b\\c")))),
        ("!'a' | 'b'", Or((Not(A), B))),
        ("'a' | 'b' & 'c'", Or((A, And((B, C))))),
        ("'a' & !( 'b' <-> 'c' )", And((A, Not(Phrase((B, C), ("-",)))))),
        ("'a' <2> 'b' <-> 'c'", Phrase((A, B, C), ("2", "-"))),
        ("!!'a'", A),
        ("!" * 10_001 + "'a'", Not(A)),
    ],
)
def test_text_of_postgresql_is_parsed_by_its_precedence(text: str, node: Node | None) -> None:
    assert tsquery.parse(text) == node


@pytest.mark.parametrize("text", ["a", "'a' 'b'", "'a' &", "('a'", "'a')", "'a", "'a':*", "<->"])
def test_text_that_postgresql_does_not_write_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match=r"the query|a bracket|a word"):
        tsquery.parse(text)


@given(nodes, st.integers(min_value=1, max_value=20))
def test_query_is_cut_after_its_first_words(node: Node, limit: int) -> None:
    cut = tsquery.first_terms(node, limit)
    assert tsquery.count_terms(cut) == min(limit, tsquery.count_terms(node))
    if tsquery.count_terms(node) <= limit:
        assert cut == node
    assert tsquery.words(node)[: len(tsquery.words(cut))] == tsquery.words(cut)


@pytest.mark.parametrize(
    ("node", "wanted"),
    [
        (Not(A), None),
        (And((A, Not(B))), A),
        (Or((Not(A), B, C)), Or((B, C))),
        (And((Not(A), Not(B))), None),
        (And((Or((Not(A), B)), C)), And((B, C))),
        (Phrase((A, B), ("-",)), Phrase((A, B), ("-",))),
    ],
)
def test_exclusions_are_removed(node: Node, wanted: Node | None) -> None:
    assert tsquery.without_exclusions(node) == wanted


@pytest.mark.parametrize(
    ("node", "required"),
    [
        (A, (("a",), ())),
        (Not(A), ((), ())),
        (And((A, Not(B))), (("a",), ())),
        (Or((A, Not(B))), ((), ())),
        (Or((A, B)), ((), ("a", "b"))),
        (And((Or((A, B)), C)), (("c",), ("a", "b"))),
        (Or((And((A, Term("long"))), B)), ((), ("b", "long"))),
        (Phrase((Term("foo-bar"), Term("foo"), A), ("-", "-")), (("foo-bar",), ())),
        (Or((Phrase((A, B), ("-",)), A)), (("a",), ())),
    ],
)
def test_required_words_are_those_that_a_match_implies(
    node: Node, required: tuple[tuple[str, ...], tuple[str, ...]]
) -> None:
    assert tsquery.required_words(node, 8) == RequiredWords(*required)


def test_longest_required_words_are_kept() -> None:
    node = And(tuple(Term(letter * length) for length, letter in enumerate("abcdefghijkl", 1)))
    assert tsquery.required_words(node, 2).all == ("l" * 12, "k" * 11)


def matches(node: Node, present: set[str]) -> bool:
    """Return whether a text with these words, in an order that suits the phrases, may match."""
    match node:
        case Term(word):
            return word in present
        case Not(excluded):
            return not matches(excluded, present)
        case And(operands) | Phrase(operands):
            return all(matches(operand, present) for operand in operands)
        case Or(operands):
            return any(matches(operand, present) for operand in operands)


@given(nodes, st.data())
def test_every_match_contains_the_required_words(node: Node, data: st.DataObject) -> None:
    present = data.draw(st.sets(st.sampled_from(tsquery.words(node))))
    required = tsquery.required_words(node, 8)
    text = " ".join(present)
    if matches(node, present):
        assert all(word in text for word in required.all)
        assert not required.any or any(word in text for word in required.any)
