from __future__ import annotations

import json

import pytest
import torch

import normwise as nw
from normwise import Affine, Moving, Norm
from normwise.kernels import closed_form
from tests.compiled import needs_kernels

GROUPS = """\
'n (g [k]) [...]' on (8, 6, 4, 4), float32
1 reshape    X' is 48 x 16: rows k=3 ...=4 ...=4, columns n=8 g=2
2 normalize  (x - mean) / sqrt(var + 1e-05), biased variance; 16 columns, each of 48 samples
             remembers nothing: evaluation uses the batch's statistics, as training does
3 recover    weight * x + bias; weight (6,), bias (6,)
4 output     (8, 6, 4, 4), float32, in the input's memory format
memory word  KR (K kept, R normalized over, outermost in memory first)
kernel       cpu: C++ for KR, columns of 192 bytes in 3 runs: measured, then normalized from the cache if they fit
             under torch.compile plain torch operations, fused with those before and after
traffic      at least 6.1 kB: the input read once, the output written once"""

BATCH = """\
'[n] c [...]' on (64, 32, 56, 56), float16
1 reshape    X' is 200704 x 32: rows n=64 ...=56 ...=56, columns c=32
2 normalize  (x - mean) / sqrt(var + 1e-05), biased variance; 32 columns, each of 200704 samples
             remembers mean (32,), var (32,): moving = 0.9 * moving + 0.1 * batch, unbiased variance
3 recover    weight * x + bias; weight (32,), bias (32,)
4 output     (64, 32, 56, 56), float16, in the input's memory format
memory word  RK (K kept, R normalized over, outermost in memory first)
kernel       cpu: C++ for RK, 32 columns of 401.4 kB side by side: measured, then normalized from the cache if they fit
             in evaluation cpu: C++ for RK, 32 columns of 401.4 kB side by side: normalized by what is remembered
             under torch.compile the same, as one operator
             under torch.compile, in evaluation plain torch operations, fused with those before and after
traffic      at least 25.7 MB: the input read once, the output written once"""


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are there, and no environment variable asks for anything else."""
    monkeypatch.setattr("normwise.explain.compiled", lambda: {"cpu": "cpu"})
    monkeypatch.setattr("normwise.explain.requested", lambda: "auto")


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
    assert (data["word"], data["kernel"], data["bytes_moved"]) == ("RK", "cpu", 2 * 16 * 5 * 3 * 4)
    assert data["reason"] == (
        "C++ for RK, 15 columns of 64 bytes side by side: measured, then normalized from the cache if they fit"
    )
    assert data["evaluation_kernel"] == "cpu"
    assert data["evaluation_reason"] == (
        "C++ for RK, 15 columns of 64 bytes side by side: normalized by what is remembered"
    )
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


@pytest.mark.parametrize(
    ("norm", "x", "line"),
    [
        (
            nw.LayerNorm(8),
            torch.empty(2, 8, 5, 6, device="meta").permute(0, 2, 3, 1),
            "4 output     (2, 5, 6, 8), float32, contiguous, because the last axes lie apart in the input's memory",
        ),
        (
            nw.LayerNorm(8),
            torch.empty(5, 2, 8, device="meta").transpose(0, 1),
            "4 output     (2, 5, 8), float32, in the input's memory format",
        ),
        (
            nw.InstanceNorm(8),
            torch.empty(2, 5, 8, device="meta").mT,
            "4 output     (2, 8, 5), float32, in the input's memory format",
        ),
    ],
)
def test_the_order_of_the_output(norm: Norm, x: torch.Tensor, line: str) -> None:
    found = norm.explain(x)
    assert line in str(found).splitlines()
    assert found.to_dict()["becomes_contiguous"] is ("contiguous" in line)


def test_a_shape_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(nw.ShapeError, match="axis 'c' has size 3, but dimension 1 has 4"):
        nw.BatchNorm(3).explain((2, 4))


PLAIN = "plain torch operations, because "
RENORM = Norm("[n] c", memory=Moving("c", decay=0.9, renorm=nw.Renorm()))
PER_STEP = Norm("[n] t c", memory=Moving("t c", decay=0.9, degenerate="memory"))


class Subclass(torch.Tensor):
    """A tensor of another class."""


class Own(nw.Standardize):
    """A normalizer that no kernel knows."""


@pytest.mark.parametrize(
    ("norm", "x", "kernel", "reason"),
    [
        (
            nw.BatchNorm(4),
            torch.empty(8, 4, 5, 20),
            "cpu",
            "C++ for RKR, columns of 3.2 kB in 8 runs: measured, then normalized from the cache if they fit",
        ),
        (
            nw.LayerNorm(8),
            torch.empty(2, 8, 5).mT,
            "cpu",
            "C++ for KR of a contiguous copy, columns of 32 bytes in one run: measured, then normalized from the cache "
            "if they fit",
        ),
        (
            nw.LayerNorm(8),
            torch.empty(2, 16)[:, ::2],
            "cpu",
            "C++ for KR of a copy without gaps, columns of 32 bytes in one run: measured, then normalized from the "
            "cache if they fit",
        ),
        (
            Norm("[n]"),
            torch.empty(1),
            "cpu",
            "C++ for one element, columns of 4 bytes in one run: measured, then normalized from the cache if they fit",
        ),
        (nw.LayerNorm(8), torch.empty(2, 8).double(), "reference", PLAIN + "no kernel computes in float64"),
        (nw.LayerNorm(8), torch.empty(0, 8), "reference", PLAIN + "there is nothing to compute"),
        (
            nw.LayerNorm(8),
            torch.empty(2, 8).as_subclass(Subclass),
            "reference",
            PLAIN + "no kernel knows the tensor class Subclass",
        ),
        (Norm("... [d]", Own()), torch.empty(2, 8), "reference", PLAIN + "no kernel knows the normalizer Own"),
        (
            RENORM,
            torch.empty(4, 3),
            "reference",
            PLAIN + "batch renormalization corrects the batch's statistics by what is remembered",
        ),
        (
            PER_STEP,
            torch.empty(1, 3, 5),
            "cpu",
            "C++ for K, 15 columns of 4 bytes side by side: normalized by what is remembered",
        ),
        (
            Norm("[n] c", memory=nw.Frozen("c")),
            torch.empty(2, 3),
            "cpu",
            "C++ for RK, 3 columns of 8 bytes side by side: normalized by what is remembered",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_the_kernel_and_why(norm: Norm, x: torch.Tensor, kernel: str, reason: str) -> None:
    explained = norm.explain(x)
    assert (explained.kernel, explained.reason) == (kernel, reason)


def test_training_and_evaluation_may_run_different_kernels() -> None:
    lines = str(RENORM.explain((4, 3))).splitlines()
    evaluation = "C++ for RK, 3 columns of 16 bytes side by side: normalized by what is remembered"
    assert lines[lines.index(f"             in evaluation cpu: {evaluation}") - 1].startswith(
        "kernel       reference: "
    )
    assert not any(
        line.startswith("             in evaluation") for line in str(PER_STEP.explain((1, 3, 5))).splitlines()
    )


def test_without_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normwise.explain.compiled", dict)
    reason = PLAIN + "the compiled kernels are not there: `normwise backends` says why"
    assert nw.LayerNorm(8).explain((2, 8)).reason == reason
    monkeypatch.setattr("normwise.explain.requested", lambda: "reference")
    assert nw.LayerNorm(8).explain((2, 8)).reason == PLAIN + "NORMWISE_BACKEND=reference asks for them"


@needs_kernels
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_explained_is_what_runs(
    dtype: torch.dtype, training: bool, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    definition = closed_form.run
    monkeypatch.setattr(closed_form, "run", lambda *given: ran.append("reference") or definition(*given))
    for norm in (nw.BatchNorm(4), nw.GroupNorm(2, 4), nw.InstanceNorm(4), nw.LayerNorm2d(4), Norm("[n] c ...", Own())):
        x = torch.randn(8, 4, 5, 6, dtype=dtype).contiguous(memory_format=layout)
        norm.train(training)(x)
        explained = norm.explain(x)
        assert (ran or ["cpu"]) == [explained.kernel if training else explained.evaluation_kernel]
        ran.clear()


def test_ghost_batches_are_calls_of_their_own() -> None:
    x = torch.empty(4096, 64, 32, device="meta")
    layers = [Norm("[n] c [t]", memory=Moving("c", decay=0.9, ghost=ghost)) for ghost in (32, 2048, None)]
    assert [layer.explain(x).compiled for layer in layers] == [False, True, True]


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_what_a_call_refuses_is_not_explained(dtype: torch.dtype) -> None:
    x = torch.zeros(4, 6, dtype=dtype)
    message = f"^a normalization needs floating-point input, not {dtype}$"
    for refuses in (nw.LayerNorm(6), nw.LayerNorm(6).explain):
        with pytest.raises(TypeError, match=message):
            refuses(x)


def test_a_backend_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normwise.explain.requested", lambda: "cpu")
    explained = nw.LayerNorm(6).explain(torch.zeros(4, 6, dtype=torch.float64))
    assert explained.kernel == "none"
    assert explained.reason == (
        "NORMWISE_BACKEND=cpu asks for its kernels, and none takes this call, because no kernel computes in float64"
    )
    assert not explained.compiled
