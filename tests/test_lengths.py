"""How a mask is told: lengths, axes in any order, other libraries' masks, and what is refused, word for word."""

from __future__ import annotations

import pytest
import torch
from torch.nn.parameter import is_lazy

from normwise import Affine, Average, Norm, PatternError, ShapeError
from tests.tolerances import VALUES, check


def test_lengths_are_the_mask_they_stand_for() -> None:
    x, lengths = torch.randn(4, 6, 3), torch.tensor([6, 0, 3, 1])
    mask = torch.arange(6) < lengths.unsqueeze(1)
    for norm in (Norm("[n t] c"), Norm("[n] t c"), Norm("n [t] c"), Norm("n t [c]")):
        expected = norm(x, valid=mask)
        for given_as in (lengths, lengths.tolist(), lengths.int(), lengths.to(torch.uint8)):
            assert torch.equal(norm(x, lengths={"t": given_as}), expected)
        assert torch.equal(norm(x, lengths={}), norm(x))


def test_lengths_along_several_axes_and_a_mask_all_must_hold() -> None:
    x, valid = torch.randn(4, 3, 6, 5), torch.rand(4, 3) < 0.7
    heights, widths = torch.tensor([6, 2, 0, 4]), torch.randint(0, 6, (4, 3))
    both = (torch.arange(6).reshape(6, 1) < heights.reshape(4, 1, 1, 1)) & (
        torch.arange(5) < widths.reshape(4, 3, 1, 1)
    )
    norm = Norm("[n] c [h w]")
    assert torch.equal(norm(x, lengths={"h": heights, "w": widths}), norm(x, valid=both))
    expected = norm(x, valid=both & valid.reshape(4, 3, 1, 1))
    assert torch.equal(norm(x, valid=valid, lengths={"h": heights, "w": widths}), expected)
    named = norm(x, valid=valid.T, valid_axes="c n", lengths={"w": widths, "h": heights})
    assert torch.equal(named, expected)


def test_one_length_for_all_examples() -> None:
    x = torch.randn(4, 6, 3)
    check(Norm("[n t] c")(x, lengths={"t": torch.tensor(2)})[:, :2], Norm("[n t] c")(x[:, :2]), VALUES)


def test_axes_of_a_mask_in_any_order_and_split() -> None:
    x, mask = torch.randn(4, 6, 5), torch.rand(4, 6, 5) < 0.6
    norm = Norm("n (g [k]) [t]", recovery=Affine("(g k)"), g=2)
    expected = norm(x, valid=mask)
    assert torch.equal(norm(x, valid=mask.permute(2, 0, 1), valid_axes="t n (g k)"), expected)
    split = mask.reshape(4, 2, 3, 5)
    assert torch.equal(norm(x, valid=split, valid_axes="n g k t"), expected)
    assert torch.equal(norm(x, valid=split.permute(3, 1, 0, 2), valid_axes="t g n k"), expected)
    groups = mask[0, :2, 0]
    whole = groups.reshape(1, 2, 1, 1).expand(4, 2, 3, 5)
    assert torch.equal(norm(x, valid=groups, valid_axes="g"), norm(x, valid=whole, valid_axes="n g k t"))


def test_masks_of_others() -> None:
    attention_mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    key_padding_mask = attention_mask.eq(0)
    x, norm = torch.randn(3, 4, 5), Norm("[n t] c")
    tokens = x[attention_mask.bool()]
    y = norm(x, valid=attention_mask.bool())
    check(y[attention_mask.bool()], Norm("[n] c")(tokens), VALUES)
    assert torch.equal(norm(x, valid=~key_padding_mask), y)
    assert torch.equal(norm(x, lengths={"t": attention_mask.sum(1)}), y)


X = torch.zeros(4, 3, 5)
REFUSED: dict[str, tuple[Norm, dict[str, object], type[Exception], str]] = {
    "numbers": (
        Norm("[n t] c"),
        {"valid": torch.ones(4, 3)},
        TypeError,
        "valid is torch.float32, and a mask of what counts is a bool tensor: "
        "attention_mask.bool(), or ~key_padding_mask",
    ),
    "another shape": (
        Norm("[n t] c"),
        {"valid": torch.ones(4, 5, dtype=torch.bool)},
        ShapeError,
        "valid: shape (4, 5), but the input begins with (4, 3): (4, 3, 5); "
        "valid_axes= names the axes that a mask covers, of 'n t c'",
    ),
    "another order": (
        Norm("[n t] c"),
        {"valid": torch.ones(4, 3, dtype=torch.bool), "valid_axes": "t n"},
        ShapeError,
        "valid has shape (4, 3), but axes 't n' have (3, 4): (4, 3, 5)",
    ),
    "an unknown axis": (
        Norm("[n t] c"),
        {"valid": torch.ones(4, 3, dtype=torch.bool), "valid_axes": "n x"},
        PatternError,
        "valid_axes names axis 'x', which is not in the pattern (it has n, t, c)\n  [n t] c",
    ),
    "axes of nothing": (
        Norm("[n t] c"),
        {"lengths": {"t": [1, 2, 3, 0]}, "valid_axes": "n"},
        PatternError,
        "valid_axes='n' says which axes `valid` covers, and there is no `valid`",
    ),
    "lengths of an unknown axis": (
        Norm("[n t] c"),
        {"lengths": {"x": [1, 2, 3, 0]}},
        PatternError,
        "lengths names axis 'x', which is not in the pattern (it has n, t, c)\n  [n t] c",
    ),
    "lengths of many axes": (
        Norm("[n] ..."),
        {"lengths": {"...": [1, 2, 3, 0]}},
        PatternError,
        "lengths names '...', which is 2 dimensions here\n  [n] ...",
    ),
    "too long": (
        Norm("[n t] c"),
        {"lengths": {"t": [1, 4, 3, 0]}},
        ShapeError,
        "a length of 4 along axis 't', which has 3: shape (4, 3, 5)",
    ),
    "negative": (
        Norm("[n t] c"),
        {"lengths": {"t": [1, -2, 3, 0]}},
        ShapeError,
        "a length of -2 along axis 't', which has 3: shape (4, 3, 5)",
    ),
    "halves": (
        Norm("[n t] c"),
        {"lengths": {"t": [1.5, 2, 3, 0]}},
        TypeError,
        "lengths of axis 't' are torch.float32, and lengths are whole numbers",
    ),
    "a mask as lengths": (
        Norm("[n t] c"),
        {"lengths": {"t": [True, True, False, True]}},
        TypeError,
        "lengths of axis 't' are torch.bool, and lengths are whole numbers",
    ),
    "another number of lengths": (
        Norm("[n t] c"),
        {"lengths": {"t": [1, 2, 3]}},
        ShapeError,
        "lengths of axis 't': shape (3,), but the input has (4,) beside it: (4, 3, 5)",
    ),
    "lengths along themselves": (
        Norm("[n t] c"),
        {"lengths": {"t": torch.ones(4, 3, dtype=torch.long)}},
        ShapeError,
        "lengths of axis 't': shape (4, 3), but the input has (4, 5) beside it: (4, 3, 5)",
    ),
    "an average in part": (
        Norm("[n] t c", memory=Average("t c")),
        {"lengths": {"t": [1, 2, 3, 0]}},
        PatternError,
        "a mask along 't' lets a batch enter some of its places only, and Average('t c') counts "
        "batches for all of them together: use Moving\n  [n] t c",
    ),
}


@pytest.mark.parametrize(("norm", "options", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_word_for_word(norm: Norm, options: dict[str, object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        norm(X, **options)
    assert str(caught.value) == message
    assert norm.running_mean is None or is_lazy(norm.running_mean)  # what is refused leaves no sizes behind
