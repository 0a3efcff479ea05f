from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from normwise.errors import PatternError
from normwise.pattern import ELLIPSIS, Pattern, check_known, parse, parse_names

NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,3}", fullmatch=True)


@st.composite
def declarations(draw: st.DrawFn) -> tuple[str, list[list[tuple[str, bool]]]]:
    """A pattern's text, written with brackets around runs of axes and odd spacing, and what it means."""
    names = draw(st.lists(NAMES, min_size=1, max_size=8, unique=True))
    dims: list[list[tuple[str, bool]]] = []
    while names:
        take = draw(st.integers(1, min(3, len(names))))
        dims.append([(names.pop(), draw(st.booleans())) for _ in range(take)])
    if draw(st.booleans()):
        dims.insert(draw(st.integers(0, len(dims))), [(ELLIPSIS, draw(st.booleans()))])
    space = st.sampled_from([" ", "  ", "\t"])
    words = [[f"[{name}]" if reduced else name for name, reduced in dim] for dim in dims]
    text = draw(space).join(w[0] if len(w) == 1 else f"({draw(space).join(w)})" for w in words)
    return text, dims


@given(declarations())
def test_parse_reads_what_was_written(declaration: tuple[str, list[list[tuple[str, bool]]]]) -> None:
    text, dims = declaration
    pattern = parse(text)
    assert [[(axis.name, axis.reduced) for axis in dim] for dim in pattern.dims] == dims
    assert pattern.names == tuple(name for dim in dims for name, _ in dim)
    assert pattern.open_ended == (ELLIPSIS in pattern.names)
    for axis in pattern.axes:
        assert pattern.text[axis.at :].startswith(axis.name)
        assert pattern.axis(axis.name) is axis


@given(declarations())
def test_white_space_does_not_matter(declaration: tuple[str, list[list[tuple[str, bool]]]]) -> None:
    text, _ = declaration
    tidy = parse(" ".join(text.split()))
    assert parse(f"  {text}\n") == tidy
    assert hash(parse(text)) == hash(tidy)
    assert parse(tidy.text) == tidy


@given(st.text(alphabet="ab.[]() -1", max_size=12))
def test_any_text_is_read_or_refused_with_a_caret_inside_it(text: str) -> None:
    assume(text.strip())
    outcome = _read(text)
    if isinstance(outcome, PatternError):
        assert outcome.text is not None
        assert outcome.at is not None
        line, marks = str(outcome).splitlines()[-2:]
        assert line == f"  {outcome.text}"
        assert marks == " " * (2 + outcome.at) + "^"
        assert outcome.at < len(outcome.text)
    else:
        assert len(set(outcome.names)) == len(outcome.names) >= 1


def _read(text: str) -> Pattern | PatternError:
    try:
        return parse(text)
    except PatternError as error:
        return error


@pytest.mark.parametrize(
    ("text", "reduced"),
    [
        ("[n] c [...]", ["n", "..."]),
        ("n (g [k]) [...]", ["k", "..."]),
        ("n ([g k]) c", ["g", "k"]),
        ("n [(g k)] c", ["g", "k"]),
        ("[n c]", ["n", "c"]),
        ("... [d]", ["d"]),
        ("n c", []),
    ],
)
def test_brackets_mark_axes(text: str, reduced: list[str]) -> None:
    assert [axis.name for axis in parse(text).axes if axis.reduced] == reduced


@pytest.mark.parametrize(("text", "dims"), [("n [(g k)] c", 3), ("n ([g k]) c", 3), ("[h w]", 2), ("(a) b", 2)])
def test_parentheses_split_one_dimension(text: str, dims: int) -> None:
    assert len(parse(text).dims) == dims


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("... [d]", True),
        ("n [c] ...", True),
        ("n ... [d]", True),
        ("n t [d]", False),
        ("[n] c ...", False),
        ("n c [...]", False),
    ],
)
def test_over_features_only(text: str, expected: bool) -> None:
    assert parse(text).over_features_only is expected


def test_patterns_are_different_when_their_texts_are() -> None:
    assert parse("[n] c") != parse("n [c]")
    assert len({parse("[n] c"), parse(" [n]  c "), parse("n [c]")}) == 2


def test_names_of_a_parameter() -> None:
    assert parse_names("c") == (("c",),)
    assert parse_names("h w") == (("h",), ("w",))
    assert parse_names("(g k) w") == (("g", "k"), ("w",))


def test_known_names_pass() -> None:
    check_known(parse("n (g [k]) [...]"), ["g", "k", "n"], "a size")
