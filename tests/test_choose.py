"""Which kernel is chosen: a pure function of what is declared, the shape, the strides and the dtype."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import normwise as nw
from normwise import L2, RMS, Affine, OffsetScale, Scale, Standardize
from normwise.kernels.choose import DTYPES, Choice, choose
from normwise.kernels.reference import Use
from normwise.normalizers import Normalizer
from normwise.pattern import parse, parse_names
from normwise.plan import make_plan
from normwise.recoveries import Recovery


class Own(Standardize):
    """A normalizer of someone's own."""


@dataclass(frozen=True)
class OwnScale(Scale):
    """A recovery of someone's own."""


def chosen(
    text: str = "n [d]",
    shape: tuple[int, ...] = (4, 100),
    strides: tuple[int, ...] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    normalizer: Normalizer = Standardize(),  # noqa: B008 - frozen
    recovery: Recovery | None = None,
    use: Use | None = None,
    **options: object,
) -> Choice:
    strides = torch.empty(shape, device="meta").stride() if strides is None else strides
    over = () if recovery is None else parse_names(recovery.over)
    plan = make_plan(parse(text), shape)
    return choose(plan, strides, dtype, device, normalizer, recovery, over, use, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalizer", [Standardize(), RMS(), L2()], ids=repr)
@pytest.mark.parametrize("recovery", [None, Scale("d"), Affine("d"), OffsetScale("d")], ids=repr)
@pytest.mark.parametrize("text", ["n [d]", "[n] d", "n [c] d", "[n] c [d]", "n [h] d [k]"])
def test_what_is_compiled(text: str, recovery: Recovery | None, normalizer: Normalizer, dtype: torch.dtype) -> None:
    shape = (4, 6, 5, 7)[: len(text.split())]
    found = chosen(text, shape, dtype=dtype, normalizer=normalizer, recovery=recovery)
    assert found.kernel == "cpu"
    assert found.geometry is not None
    assert found.reason.startswith("C++ for ")
    assert chosen(text, shape, dtype=dtype, normalizer=normalizer, recovery=recovery, use="instead").kernel == "cpu"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device": "mps"}, "there is no kernel for mps yet"),
        ({"device": "cuda"}, "the kernels in Triton run when NORMWISE_BACKEND=triton asks for them"),
        ({"device": "meta"}, "there is no kernel for meta yet"),
        ({"dtype": torch.float64}, "no kernel computes in float64"),
        ({"dtype": torch.float8_e5m2}, "no kernel computes in float8_e5m2"),
        ({"compiled": {}}, "the compiled kernels are not there: `normwise backends` says why"),
        ({"text": "[a] b [c] d", "shape": (2, 3, 4, 5)}, "its axes lie in an order that no kernel knows"),
        ({"text": "a [b] c [d] e", "shape": (2, 3, 4, 5, 6)}, "its axes lie in an order that no kernel knows"),
        (
            {"text": "[n] t c", "shape": (2, 3, 4), "recovery": Affine("t")},
            "its parameters do not lie in the order of its elements",
        ),
    ],
    ids=str,
)
def test_what_is_left_to_torchs_operators(options: dict[str, object], reason: str) -> None:
    found = chosen(**options)  # type: ignore[arg-type]
    assert found == Choice("reference", f"plain torch operations, because {reason}", refusal=reason)


@pytest.mark.parametrize("part", [{"normalizer": Own()}, {"recovery": OwnScale("d")}], ids=repr)
def test_parts_of_ones_own_are_left_to_torchs_operators(part: dict[str, object]) -> None:
    found = chosen(**part)  # type: ignore[arg-type]
    assert found.kernel == "reference"
    assert type(next(iter(part.values()))).__name__ in found.reason


@pytest.mark.parametrize("use", ["fallback", "correct"])
def test_mixed_statistics_are_left_to_torchs_operators(use: Use) -> None:
    assert chosen(use=use).kernel == "reference"


def test_a_request_by_name_is_kept() -> None:
    assert chosen(request="reference").kernel == "reference"
    assert "NORMWISE_BACKEND" in chosen(request="reference").reason
    assert chosen(request="cpu") == chosen(request="auto")


def test_an_input_with_gaps_is_chosen_for_as_its_copy_is() -> None:
    for strides, dense in (((200, 2), (100, 1)), ((0, 1), (100, 1)), ((1, 8), (1, 4)), ((2, 8), (1, 4))):
        assert chosen(strides=strides).geometry == chosen(strides=dense).geometry


@given(
    st.sampled_from(["n [d]", "[n] c", "n c [l]", "[n] c [l]", "n [c] l", "n [h] g [k]"]),
    st.integers(1, 5),
    st.sampled_from([1, 3, 63, 64, 200]),
    st.lists(st.integers(2, 70000), min_size=2, max_size=2),
)
def test_the_number_of_columns_decides_nothing(text: str, rows: int, length: int, counts: list[int]) -> None:
    names = text.split()
    found = []
    for count in counts:
        inner = [length if name == names[-1] else rows for name in names]
        shape = tuple(size if "[" in name else count for name, size in zip(names, inner, strict=True))
        choice = chosen(text, shape, recovery=Affine(names[-1].strip("[]")))
        geometry = choice.geometry
        known = None if geometry is None else (geometry.by_runs, geometry.groups, geometry.sizes[1], geometry.sizes[3])
        found.append((choice.kernel, known))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("layer", "shape", "done"),
    [
        (nw.LayerNorm(4096), (8, 4096), "columns of 16.4 kB in one run: held by one program, read once"),
        (
            nw.LayerNorm(8192),
            (8, 8192),
            "columns of 32.8 kB in one run: held by one program, read once, in the backward in 2 parts",
        ),
        (nw.LayerNorm(64), (8, 64), "columns of 256 bytes in one run: held 16 at a time by one program, read once"),
        (
            nw.BatchNorm(64),
            (256, 64, 56, 56),
            "columns of 3.2 MB in 256 runs: measured in 128 parts, then normalized from the cache",
        ),
    ],
)
def test_what_is_done_on_a_gpu(
    layer: nw.Norm, shape: tuple[int, ...], done: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("normwise.explain.compiled", lambda: {"cpu": "triton"})
    monkeypatch.setattr("normwise.explain.requested", lambda: "triton")
    found = layer.explain(shape)
    assert found.kernel == "triton"
    assert found.reason.endswith(done)
