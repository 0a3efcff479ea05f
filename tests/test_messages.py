"""Every error of a declaration, word for word: what a user reads is part of the interface."""

from __future__ import annotations

import pytest

from normwise import Affine, Average, BatchNorm, Frozen, GroupNorm, Moving, Norm, Scale
from normwise.errors import MissingExtraError, NormwiseError, PatternError, ShapeError, StudyError, TooFewSamplesError
from normwise.pattern import parse, parse_names
from tests.messages import Message
from tests.messages import check as _check
from tests.messages import lines as _lines

PATTERNS = {
    "n # c": ("unknown character '#'", "  n # c", "    ^"),
    "[n] 1c": ("unknown character '1'", "  [n] 1c", "      ^"),
    "[n] .. c": ("unknown character '.'", "  [n] .. c", "      ^"),
    "[n] c d]": ("']' was never opened", "  [n] c d]", "         ^"),
    "n c)": ("')' was never opened", "  n c)", "     ^"),
    "[n c": ("'[' is never closed", "  [n c", "  ^"),
    "[n] (g k": ("'(' is never closed", "  [n] (g k", "      ^"),
    "[n (g] k)": ("'(' is never closed", "  [n (g] k)", "     ^"),
    "n (g [k)]": ("'[' is never closed", "  n (g [k)]", "       ^"),
    "[n] c [n]": ("axis 'n' is named twice", "  [n] c [n]", "         ^"),
    "[...] c ...": ("'...' stands twice", "  [...] c ...", "          ^"),
    "[] c": ("nothing stands in the brackets", "  [] c", "  ^"),
    "n ( ) c": ("nothing stands in the parentheses", "  n ( ) c", "    ^"),
    "[n [c]]": ("brackets cannot stand in brackets", "  [n [c]]", "     ^"),
    "n (g (k))": ("parentheses cannot stand in parentheses", "  n (g (k))", "       ^"),
    "n (g ...)": ("'...' cannot stand in parentheses: it is whole dimensions", "  n (g ...)", "       ^"),
}


@pytest.mark.parametrize("text", PATTERNS)
def test_patterns(text: str) -> None:
    with pytest.raises(PatternError) as caught:
        parse(text)
    assert str(caught.value) == _lines(*PATTERNS[text])
    with pytest.raises(PatternError) as caught:
        Norm(text)
    assert str(caught.value) == _lines(*PATTERNS[text])


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_the_empty_pattern(text: str) -> None:
    with pytest.raises(PatternError) as caught:
        parse(text)
    assert str(caught.value) == "the pattern is empty: name the input's dimensions, for example '[n] c [...]'"


DECLARATIONS: dict[str, Message] = {
    "nothing in brackets": (
        lambda: Norm("n c"),
        PatternError,
        ("nothing is normalized over: put an axis in brackets", "  n c"),
    ),
    "a recovery's axis": (
        lambda: Norm("[n] c", recovery=Affine("d")),
        PatternError,
        ("Affine names axis 'd', which is not in the pattern (it has n, c)", "  [n] c"),
    ),
    "another recovery's axis": (
        lambda: Norm("[n] c ...", recovery=Scale("c d")),
        PatternError,
        ("Scale names axis 'd', which is not in the pattern (it has n, c)", "  [n] c ..."),
    ),
    "a memory's axis": (
        lambda: Norm("[n] c", memory=Moving("d", decay=0.9)),
        PatternError,
        ("Moving names axis 'd', which is not in the pattern (it has n, c)", "  [n] c"),
    ),
    "a size's axis": (
        lambda: Norm("[n] c", g=8),
        PatternError,
        ("a size names axis 'g', which is not in the pattern (it has n, c)", "  [n] c"),
    ),
    "a memory of what is gone": (
        lambda: Norm("[n] c", memory=Average("n")),
        PatternError,
        ("Average remembers axis 'n', which is normalized over and so is gone", "  [n] c", "   ^"),
    ),
    "brackets in a recovery": (
        lambda: Norm("[n] c", recovery=Affine("[c]")),
        PatternError,
        ("brackets mark what is normalized over; here they mean nothing", "  [c]", "   ^"),
    ),
    "an ellipsis in a memory": (
        lambda: Norm("[n] c ...", memory=Frozen("c ...")),
        PatternError,
        ("name the axes one by one: '...' has no fixed size", "  c ...", "    ^"),
    ),
    "an axis called like an option": (
        lambda: Norm("[n] memory"),
        PatternError,
        ("an axis cannot be called 'memory': that is an option of Norm", "  [n] memory", "      ^"),
    ),
    "a misspelt option": (
        lambda: Norm("[n] c", recover=Affine("c")),
        PatternError,
        (
            "recover=Affine(over='c') is neither an option of Norm "
            "(pattern, normalizer, recovery, memory, activation, gate, sizes, device, dtype) nor the size of an axis",
        ),
    ),
    "a size given twice": (
        lambda: Norm("[n] c", sizes={"c": 3}, c=4),
        ShapeError,
        ("axis 'c' is given two sizes: 3 and 4",),
    ),
    "a size below 1": (
        lambda: Norm("[n] c", c=0),
        ShapeError,
        ("the size of axis 'c' is a whole number from 1 on, not 0",),
    ),
    "a size that is true": (
        lambda: Norm("[n] c", sizes={"c": True}),
        ShapeError,
        ("the size of axis 'c' is a whole number from 1 on, not True",),
    ),
    "a size that is no whole number": (
        lambda: BatchNorm(2.5),  # type: ignore[arg-type]
        ShapeError,
        ("the size of axis 'c' is a whole number from 1 on, not 2.5",),
    ),
    "a part in another's place": (
        lambda: Norm("[n] c", Affine("c")),
        TypeError,
        ("normalizer is Affine(over='c'), which is not a normalizer",),
    ),
    "a memory as recovery": (
        lambda: Norm("[n] c", recovery=Moving("c", decay=0.5)),
        TypeError,
        ("recovery is Moving('c', update_rate=0.5), which is not a recovery",),
    ),
    "a recovery as memory": (
        lambda: Norm("[n] c", memory=Scale("c")),
        TypeError,
        ("memory is Scale(over='c'), which is not a memory",),
    ),
    "both momenta": (
        lambda: Moving("c", decay=0.9, update_rate=0.1),
        ValueError,
        (
            "give decay= (the weight of the old value) or update_rate= (of the new one), and not both: "
            "decay=0.9, update_rate=0.1",
        ),
    ),
    "no momentum": (
        lambda: Moving("c"),
        ValueError,
        (
            "give decay= (the weight of the old value) or update_rate= (of the new one), and not both: "
            "decay=None, update_rate=None",
        ),
    ),
    "a decay above 1": (
        lambda: Moving("c", decay=1.5),
        ValueError,
        ("decay is a weight between 0 and 1, not 1.5",),
    ),
    "an update rate below 0": (
        lambda: Moving("c", update_rate=-0.1),
        ValueError,
        ("update_rate is a weight between 0 and 1, not -0.1",),
    ),
    "a momentum that is not a number": (
        lambda: BatchNorm(3, momentum=float("nan")),
        ValueError,
        ("momentum is the weight of the new batch, between 0 and 1, or None, not nan",),
    ),
    "groups that do not divide": (
        lambda: GroupNorm(4, 6),
        ShapeError,
        ("6 channels cannot be split into 4 groups; group counts that work: 1, 2, 3, 6",),
    ),
    "no groups": (
        lambda: GroupNorm(0, 4),
        ShapeError,
        ("4 channels cannot be split into 0 groups; group counts that work: 1, 2, 4",),
    ),
}


@pytest.mark.parametrize("message", DECLARATIONS.values(), ids=DECLARATIONS)
def test_declarations(message: Message) -> None:
    _check(message)


def test_names_of_parameters_point_into_their_own_text() -> None:
    with pytest.raises(PatternError) as caught:
        parse_names("h (w")
    assert str(caught.value) == _lines("'(' is never closed", "  h (w", "    ^")


def test_a_missing_extra_names_the_command() -> None:
    error = MissingExtraError("normwise.tune", "tune")
    assert str(error) == "normwise.tune needs packages that are not installed: pip install 'normwise[tune]'"


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (PatternError, ValueError),
        (ShapeError, ValueError),
        (TooFewSamplesError, ValueError),
        (StudyError, ValueError),
        (MissingExtraError, ImportError),
    ],
)
def test_the_error_tree(error: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(error, NormwiseError)
    assert issubclass(error, builtin)
