"""Every error of what a layer or a function is given, word for word: inputs, arguments, checkpoints."""

from __future__ import annotations

import pytest
import torch

import normwise as nw
from normwise import Affine, BatchNorm, GroupNorm, InstanceNorm, Moving, Norm, textbook
from normwise import functional as NF
from normwise.errors import ShapeError, TooFewSamplesError
from normwise.pattern import parse
from normwise.plan import make_plan
from tests.messages import Message
from tests.messages import check as _check
from tests.messages import lines as _lines

ONE, ZERO = torch.ones(3), torch.zeros(3)


def _textbook(x: torch.Tensor, gamma: torch.Tensor = ONE) -> object:
    return textbook.batch_norm(x, gamma, ZERO, ZERO, ONE, eps=1e-5, momentum=0.9, training=True)


INPUTS: dict[str, Message] = {
    "too few dimensions": (
        lambda: Norm("[n] c h w")(torch.randn(2, 3)),
        ShapeError,
        ("the pattern names 4 dimensions, the input has 2: shape (2, 3)", "  [n] c h w"),
    ),
    "too many dimensions": (
        lambda: Norm("[n]")(torch.randn(2, 3)),
        ShapeError,
        ("the pattern names 1 dimension, the input has 2: shape (2, 3)", "  [n]"),
    ),
    "too few for an ellipsis": (
        lambda: BatchNorm(3)(torch.randn(3)),
        ShapeError,
        ("the pattern names at least 2 dimensions, the input has 1: shape (3,)", "  [n] c [...]"),
    ),
    "another number of channels": (
        lambda: BatchNorm(36)(torch.randn(2, 2048, 36)),
        ShapeError,
        (
            "axis 'c' has size 36, but dimension 1 has 2048 "
            "(axis 2 has 36: if that is 'c', declare Norm('[n] [...] c', ...), or move it): shape (2, 2048, 36)",
            "  [n] c [...]",
            "      ^",
        ),
    ),
    "another number of channels in groups": (
        lambda: GroupNorm(2, 6)(torch.randn(2, 8, 4)),
        ShapeError,
        ("dimension 1 has 8, but g=2 x k=3 makes 6: shape (2, 8, 4)", "  n (g [k]) [...]", "     ^"),
    ),
    "a split without sizes": (
        lambda: Norm("n (g [k])")(torch.randn(2, 6)),
        ShapeError,
        (
            "dimension 1 cannot be split into (g k): give the size of one of them, for example g=2: shape (2, 6)",
            "  n (g [k])",
            "     ^",
        ),
    ),
    "a split of an odd dimension without sizes": (
        lambda: make_plan(parse("(a [b]) n"), (5, 2)),
        ShapeError,
        (
            "dimension 0 cannot be split into (a b): give the size of one of them, for example a=1: shape (5, 2)",
            "  (a [b]) n",
            "   ^",
        ),
    ),
    "a split with a remainder": (
        lambda: Norm("n (g [k])", g=4)(torch.randn(2, 6)),
        ShapeError,
        (
            "dimension 1 cannot be split into (g k): 6 is not a multiple of 4 (g=4): shape (2, 6)",
            "  n (g [k])",
            "     ^",
        ),
    ),
    "a size from nothing": (
        lambda: Norm("[n] c", recovery=Affine("c"))(torch.randn(4, 0)),
        ShapeError,
        ("the size of axis 'c' cannot be found from an empty input of shape (4, 0)",),
    ),
    "whole numbers": (
        lambda: BatchNorm(3)(torch.ones(4, 3, dtype=torch.int64)),
        TypeError,
        ("a normalization needs floating-point input, not torch.int64",),
    ),
    "complex numbers": (
        lambda: nw.LayerNorm(3)(torch.ones(4, 3, dtype=torch.complex64)),
        TypeError,
        ("a normalization needs floating-point input, not torch.complex64",),
    ),
    "a batch of one": (
        lambda: BatchNorm(3)(torch.randn(1, 3)),
        TooFewSamplesError,
        (
            "shape (1, 3) leaves 1 sample a column of '[n] c [...]' (over n, ...), "
            "and one sample has no variance: use a larger batch, evaluation mode, "
            "or degenerate='memory' for what evaluation would make of it",
        ),
    ),
    "a batch of one that nobody remembers": (
        lambda: Norm("[n] c")(torch.randn(1, 3)),
        TooFewSamplesError,
        (
            "shape (1, 3) leaves 1 sample a column of '[n] c' (over n), "
            "and one sample has no variance: use a larger batch",
        ),
    ),
    "an instance of one": (
        lambda: InstanceNorm(3)(torch.randn(2, 3, 1, 1)),
        TooFewSamplesError,
        (
            "shape (2, 3, 1, 1) leaves 1 sample a column of 'n c [...]' (over ...), "
            "and one sample has no variance: use larger maps",
        ),
    ),
    "an instance of one that is remembered": (
        lambda: InstanceNorm(3, track_running_stats=True)(torch.randn(2, 3, 1, 1)),
        TooFewSamplesError,
        (
            "shape (2, 3, 1, 1) leaves 1 sample a column of 'n c [...]' (over ...), "
            "and one sample has no variance: use larger maps, evaluation mode, "
            "or degenerate='memory' for what evaluation would make of it",
        ),
    ),
    "a group of one": (
        lambda: GroupNorm(12, 12)(torch.randn(2, 12)),
        TooFewSamplesError,
        (
            "shape (2, 12) leaves 1 sample a column of 'n (g [k]) [...]' (over k, ...), "
            "and one sample has no variance: use fewer groups, g = 1, 2, 3, 4, 6",
        ),
    ),
    "a group of one channel": (
        lambda: GroupNorm(1, 1)(torch.randn(2, 1)),
        TooFewSamplesError,
        (
            "shape (2, 1) leaves 1 sample a column of 'n (g [k]) [...]' (over k, ...), "
            "and one sample has no variance: use more channels",
        ),
    ),
}

FUNCTIONS: dict[str, Message] = {
    "evaluation without memory": (
        lambda: NF.batch_norm(torch.randn(4, 3), None, None),
        ValueError,
        ("running_mean is None: remembered statistics are running_mean and running_var, both",),
    ),
    "instances without memory": (
        lambda: NF.instance_norm(torch.randn(4, 3, 5), use_input_stats=False),
        ValueError,
        ("running_mean is None: remembered statistics are running_mean and running_var, both",),
    ),
    "a batch of one": (
        lambda: NF.batch_norm(torch.randn(1, 3), ZERO, ONE, training=True),
        TooFewSamplesError,
        (
            "shape (1, 3) leaves 1 sample a column of '[n] c [...]' (over n, ...), "
            "and one sample has no variance: use a larger batch, evaluation mode, "
            "or degenerate='memory' for what evaluation would make of it",
        ),
    ),
    "no dimensions": (
        lambda: NF.layer_norm(torch.randn(4, 3), ()),
        ShapeError,
        ("normalized_shape has 1 to 8 dimensions, not 0: ()",),
    ),
    "another last dimension": (
        lambda: NF.rms_norm(torch.randn(4, 3), (5,)),
        ShapeError,
        ("axis 'd0' has size 5, but dimension 1 has 3: shape (4, 3)", "  ... [d0]", "       ^"),
    ),
    "groups that do not divide": (
        lambda: NF.group_norm(torch.randn(2, 6, 4), 4),
        ShapeError,
        (
            "dimension 1 cannot be split into (g k): 6 is not a multiple of 4 (g=4): shape (2, 6, 4)",
            "  n (g [k]) [...]",
            "     ^",
        ),
    ),
    "the lecture's ranks": (
        lambda: _textbook(torch.randn(2, 3, 4)),
        ShapeError,
        ("X is (n, p) or (n, c, h, w), not of 3 dimensions: shape (2, 3, 4)",),
    ),
    "the lecture's gamma": (
        lambda: _textbook(torch.randn(2, 3), gamma=torch.ones(4)),
        ShapeError,
        ("gamma has 4 elements, X has 3 columns: shape (2, 3)",),
    ),
    "the lecture's batch of one": (
        lambda: _textbook(torch.randn(1, 3)),
        TooFewSamplesError,
        ("one sample has no variance: X of shape (1, 3) in training",),
    ),
    "no examples": (
        lambda: textbook.layer_norm(torch.randn(3), ONE, ZERO, 1e-5),
        ShapeError,
        ("X has the examples first and at least one more dimension: shape (3,)",),
    ),
    "a beta that does not fit an example": (
        lambda: textbook.layer_norm(torch.randn(5, 3), ONE, torch.zeros(4), 1e-5),
        ShapeError,
        ("beta of shape (4,) does not fit an example of shape (3,): give 3 elements, or what broadcasts",),
    ),
}

CHECKPOINTS: dict[str, tuple[Norm, dict[str, torch.Tensor], str]] = {
    "groups": (
        Norm("n (g [k])", recovery=Affine("(g k)")),
        {"weight": torch.ones(12), "bias": torch.zeros(12)},
        "Norm: a checkpoint of 12 cannot be split into (g k): give the size of g or k",
    ),
    "a remainder": (
        Norm("n (g [k])", recovery=Affine("(g k)"), g=5),
        {"weight": torch.ones(12), "bias": torch.zeros(12)},
        "Norm: a checkpoint of 12 does not fit g=5",
    ),
    "dimensions": (
        Norm("n [c]", recovery=Affine("c")),
        {"weight": torch.ones(3, 4), "bias": torch.zeros(3, 4)},
        "Norm: expected a shape over c, got (3, 4)",
    ),
    "a size that contradicts": (
        Norm("[n] t c", recovery=Affine("c"), memory=Moving("t", decay=0.9), c=3),
        {"weight": torch.ones(4), "bias": torch.zeros(4)},
        "Norm: a checkpoint of 4 does not fit c=3",
    ),
    "a flat axis of two": (
        Norm("n c [h w]", recovery=Affine("(h w) c")),
        {"weight": torch.ones(12, 3), "bias": torch.zeros(12, 3)},
        "Norm: a checkpoint of 12 cannot be split into (h w): give the size of h or w",
    ),
}


@pytest.mark.parametrize("message", INPUTS.values(), ids=INPUTS)
def test_inputs(message: Message) -> None:
    _check(message)


@pytest.mark.parametrize("message", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions(message: Message) -> None:
    _check(message)


@pytest.mark.parametrize("case", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_checkpoints(case: tuple[Norm, dict[str, torch.Tensor], str]) -> None:
    layer, checkpoint, line = case
    with pytest.raises(RuntimeError) as caught:
        layer.load_state_dict(checkpoint)
    assert str(caught.value) == _lines("Error(s) in loading state_dict for Norm:", f"\t{line}")
    model = torch.nn.ModuleDict({"block": torch.nn.Sequential(layer)})
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict({f"block.0.{name}": value for name, value in checkpoint.items()})
    assert f"\tblock.0: {line.removeprefix('Norm: ')}" in str(caught.value)  # the path, where there is one
