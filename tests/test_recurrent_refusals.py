"""What the recurrent nets refuse, word for word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import normwise as nw
from normwise import Affine, Moving, Norm, Renorm
from normwise.recurrent import GRU, LSTM
from tests.recurrent_nets import (
    LAYER,
    SHARED,
)

REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no norm": (lambda: LSTM(3, 5, norm="layer"), TypeError, "norm is 'layer', which is not an nw.Norm"),
    "projection": (
        lambda: LSTM(3, 5, proj_size=2, norm=LAYER),
        nw.NormwiseError,
        "an LSTM with proj_size=2 cannot be normalized: leave out proj_size or norm",
    ),
    "another name for time": (
        lambda: GRU(3, 5, norm=Norm("[n] s c")),
        nw.PatternError,
        "norm normalizes features alone, as '... [c]', or its three axes are batch, time and features, and time is "
        "called 't', as in '[n] t c'\n  [n] s c",
    ),
    "over time": (
        lambda: GRU(3, 5, norm=Norm("[n t] c")),
        nw.PatternError,
        "a step cannot be normalized with the steps after it: one memory for all steps is '[n] t c' with "
        "Moving('c', ...)\n  [n t] c\n     ^",
    ),
    "another order": (
        lambda: GRU(3, 5, norm=Norm("t [n] c")),
        nw.PatternError,
        "norm's three axes are batch, time and features, as in '[n] t c'\n  t [n] c\n  ^",
    ),
    "sized": (
        lambda: GRU(3, 5, norm=Norm("... [c]", c=5)),
        nw.ShapeError,
        "norm is made for places of different widths, so leave out c=5",
    ),
    "parameters of steps": (
        lambda: GRU(3, 5, norm=Norm("[n] t c", recovery=Affine("t c"), t=6)),
        nw.PatternError,
        "norm has the same parameters at every step, so none over 't'\n  [n] t c\n      ^",
    ),
    "ghost batches": (
        lambda: GRU(3, 5, norm=Norm("[n] t c", memory=Moving("c", decay=0.9, ghost=4))),
        nw.NormwiseError,
        "norm is computed step by step, which ghost= cannot be: leave it out of Moving('c', update_rate=0.1, ghost=4)",
    ),
    "batch renormalization": (
        lambda: GRU(3, 5, norm=Norm("[n] t c", memory=Moving("c", decay=0.9, renorm=Renorm()))),
        nw.NormwiseError,
        "norm is computed step by step, which renorm= cannot be: leave it out of ",
    ),
    "a memory of examples": (
        lambda: GRU(3, 5, norm=Norm("n t [c]", memory=Moving("n", decay=0.9))),
        nw.PatternError,
        "norm remembers time steps and features, and not 'n'\n  n t [c]\n  ^",
    ),
    "no length": (
        lambda: GRU(3, 5, norm=Norm("[n] t c", memory=Moving("t c", decay=0.9))),
        nw.PatternError,
        "a memory for each time step says how many there are, t=50, or what is beyond the last, "
        "beyond={'t': 'last'}\n  [n] t c\n      ^",
    ),
    "lengths beside packed": (
        lambda: GRU(3, 5)(pack_padded_sequence(torch.zeros(6, 1, 3), torch.tensor([6])), lengths=torch.tensor([6])),
        nw.ShapeError,
        "a packed input brings its lengths: leave out lengths=",
    ),
    "lengths of one sequence": (
        lambda: GRU(3, 5)(torch.zeros(6, 3), lengths=torch.tensor([6])),
        nw.ShapeError,
        "lengths are for a batch of sequences, and the input has shape (6, 3)",
    ),
    "too few lengths": (
        lambda: GRU(3, 5)(torch.zeros(6, 4, 3), lengths=torch.tensor([6])),
        nw.ShapeError,
        "lengths has shape (1,), and there are 4 sequences",
    ),
    "a length too long": (
        lambda: GRU(3, 5)(torch.zeros(6, 2, 3), lengths=torch.tensor([6, 7])),
        nw.ShapeError,
        "a length of 7: lengths are from 1 to the input's 6 steps",
    ),
    "no step at all": (
        lambda: GRU(3, 5, norm=LAYER)(torch.zeros(6, 2, 3), lengths=torch.tensor([6, 0])),
        nw.ShapeError,
        "a length of 0: lengths are from 1 to the input's 6 steps",
    ),
    "lengths that are no whole numbers": (
        lambda: GRU(3, 5)(torch.zeros(6, 1, 3), lengths=torch.tensor([6.0])),
        TypeError,
        "lengths is a tensor of whole numbers, not tensor([6.])",
    ),
    "another rank": (
        lambda: GRU(3, 5, norm=LAYER)(torch.zeros(6, 2, 3, 1)),
        nw.ShapeError,
        "the input has 2 or 3 dimensions, not 4: shape (6, 2, 3, 1)",
    ),
    "one sequence has no variance": (
        lambda: nn.Sequential(GRU(3, 5, norm=SHARED))(torch.zeros(6, 1, 3)),
        nw.TooFewSamplesError,
        "0.norms.ih_l0: shape (1, 6, 15) leaves 1 sample a column of '[n] t c' (over n), and one sample has no "
        "variance: use a larger batch, evaluation mode",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value).startswith(message)
