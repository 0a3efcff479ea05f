from __future__ import annotations

import json

import pytest
import torch

import normwise as nw
from normwise import Affine, Moving, Norm

GROUPS = """\
'n (g [k]) [...]' on (8, 6, 4, 4), float32
1 reshape    X' is 48 x 16: rows k=3 ...=4 ...=4, columns n=8 g=2
2 normalize  (x - mean) / sqrt(var + 1e-05), biased variance; 16 columns, each of 48 samples
             remembers nothing: evaluation uses the batch's statistics, as training does
3 recover    weight * x + bias; weight (6,), bias (6,)
4 output     (8, 6, 4, 4), float32, in the input's memory format
memory word  KR (K kept, R normalized over, outermost in memory first)
kernel       reference: plain torch operations, differentiated in closed form; torch.compile fuses them
traffic      at least 6.1 kB: the input read once, the output written once"""

BATCH = """\
'[n] c [...]' on (64, 32, 56, 56), float16
1 reshape    X' is 200704 x 32: rows n=64 ...=56 ...=56, columns c=32
2 normalize  (x - mean) / sqrt(var + 1e-05), biased variance; 32 columns, each of 200704 samples
             remembers mean (32,), var (32,): moving = 0.9 * moving + 0.1 * batch, unbiased variance
3 recover    weight * x + bias; weight (32,), bias (32,)
4 output     (64, 32, 56, 56), float16, in the input's memory format
memory word  RK (K kept, R normalized over, outermost in memory first)
kernel       reference: plain torch operations, differentiated in closed form; torch.compile fuses them
traffic      at least 25.7 MB: the input read once, the output written once"""


def test_a_shape_in_words() -> None:
    assert str(nw.GroupNorm(2, 6).explain((8, 6, 4, 4))) == GROUPS


def test_a_tensor_in_words() -> None:
    x = torch.empty(64, 32, 56, 56, dtype=torch.float16, device="meta").contiguous(memory_format=torch.channels_last)
    assert str(nw.BatchNorm(32).explain(x)) == BATCH


def test_the_same_as_data() -> None:
    norm = Norm("[n] t c", recovery=Affine("c"), memory=Moving("t c", decay=0.9))
    data = norm.explain((16, 5, 3)).to_dict()
    assert (data["rows"], data["columns"]) == (16, 15)
    assert data["row_axes"] == (("n", 16),)
    assert data["column_axes"] == (("t", 5), ("c", 3))
    assert data["remembered"] == {"mean": (5, 3), "var": (5, 3)}
    assert data["parameters"] == {"weight": (3,), "bias": (3,)}
    assert (data["word"], data["kernel"], data["bytes_moved"]) == ("RK", "reference", 2 * 16 * 5 * 3 * 4)
    assert json.loads(json.dumps(data))["pattern"] == "[n] t c"


def test_explaining_gives_a_lazy_layer_no_sizes() -> None:
    norm = Norm("[n] c", recovery=Affine("c"))
    norm.explain((4, 3))
    assert norm.spec.unknown == ("c",)
    assert norm(torch.randn(4, 5)).shape == (4, 5)


@pytest.mark.parametrize(
    ("norm", "shape", "line"),
    [
        (Norm("[n]"), (5,), "1 reshape    X' is 5 x 1: rows n=5, columns (one)"),
        (Norm("[n] c"), (5, 3), "3 recover    nothing"),
        (
            Norm("... [d]"),
            (7, 1),
            "2 normalize  (x - mean) / sqrt(var + 1e-05), biased variance; 7 columns, of one sample",
        ),
        (Norm("[n]"), (1,), "memory word  a single element (K kept, R normalized over, outermost in memory first)"),
        (Norm("[n]"), (5,), "traffic      at least 40 bytes: the input read once, the output written once"),
        (Norm("[n] c"), (10**6, 10**3), "traffic      at least 8.0 GB: the input read once, the output written once"),
        (nw.RMSNorm(8), (2, 8), "2 normalize  x / sqrt(mean(x^2) + machine epsilon); 2 columns, each of 8 samples"),
        (nw.RMSNorm(8), (2, 8), "3 recover    weight * x; weight (8,)"),
    ],
)
def test_lines(norm: Norm, shape: tuple[int, ...], line: str) -> None:
    assert line in str(norm.explain(shape)).splitlines()


def test_a_shape_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(nw.ShapeError, match="axis 'c' has size 3, but dimension 1 has 4"):
        nw.BatchNorm(3).explain((2, 4))
