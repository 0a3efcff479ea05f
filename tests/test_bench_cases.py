"""The cases as data: their bytes by hand, what a choice selects, and what is refused, word for word."""

from __future__ import annotations

import re

import pytest

from normwise.bench.cases import MODELS, OPERATIONS, Case, ModelCase, Pass, Wanted, cases
from normwise.errors import StudyError

FORWARD, LEARN = Pass("evaluation"), Pass("training", backward=True)


@pytest.mark.parametrize(
    ("operation", "what", "dtype", "expected"),
    [
        ("layer_norm", FORWARD, "float32", 2 * 24),  # read x, write y: 2 x 3 numbers of 4 bytes
        ("layer_norm", FORWARD, "bfloat16", 2 * 12),
        ("layer_norm", LEARN, "float32", 5 * 24),  # and read x, dy, write dx
        ("add_layer_norm", FORWARD, "float32", 4 * 24),  # read x, r, write y, s
        ("add_rms_norm", LEARN, "bfloat16", 8 * 12),  # and read s, dy, ds, write one gradient
        ("gated_rms_norm", FORWARD, "float32", 3 * 24),  # read x, g, write y
        ("gated_rms_norm", LEARN, "float32", 8 * 24),  # and read x, g, dy, write dx, dg
    ],
)
def test_bytes_by_hand(operation: str, what: Pass, dtype: str, expected: int) -> None:
    assert Case(operation, (2, 3), dtype, "contiguous", what).bytes == expected


def test_the_default_is_models_first_and_everything_else_once() -> None:
    found = cases(Wanted())
    assert [case for case in found if isinstance(case, ModelCase)] == found[: 2 * len(MODELS)]
    assert len(set(map(str, found))) == len(found)
    operations = [case for case in found if isinstance(case, Case)]
    assert {case.operation for case in operations} == set(OPERATIONS)
    assert {case.dtype for case in operations} == {"float32", "bfloat16"}
    assert {case.shape for case in operations if case.layout == "channels_last"} == {
        (32, 64, 56, 56),
        (128, 256, 14, 14),
    }
    rows = {case.shape for case in operations if case.operation == "add_rms_norm"}
    assert rows == {(4096, 768), (8192, 4096), (1024, 16384)}
    assert (8192, 512) in {case.shape for case in operations if case.operation == "batch_norm"}


def test_by_default_the_compiler_sees_one_input_of_each_operation() -> None:
    compiled = [case for case in cases(Wanted()) if isinstance(case, Case) and case.compiled]
    assert {case.operation for case in compiled} == set(OPERATIONS)
    assert len({(case.operation, case.shape, case.dtype, case.layout) for case in compiled}) == len(OPERATIONS)
    assert not any(case.compiled for case in cases(Wanted(quick=True)) if isinstance(case, Case))
    chosen = cases(Wanted(names=("rms_norm",)))
    assert all(case.compiled for case in chosen if isinstance(case, Case))
    assert not any(case.compiled for case in cases(Wanted(names=("rms_norm",), compiled="none")))


def test_quick_is_a_part_of_the_default() -> None:
    quick, full = (list(map(str, cases(Wanted(quick=is_quick)))) for is_quick in (True, False))
    assert set(quick) < set(full)
    assert len(quick) < len(full) / 2
    assert not any("bfloat16" in name for name in quick)


def test_a_choice_of_ones_own() -> None:
    found = cases(Wanted(("instance_norm",), (2, 8, 5, 5), ("bfloat16", "float16"), ("channels_last",)))
    assert list(map(str, found)) == [
        "instance_norm 2x8x5x5 bfloat16 channels_last evaluation forward",
        "instance_norm 2x8x5x5 bfloat16 channels_last training forward+backward",
        "instance_norm 2x8x5x5 float16 channels_last evaluation forward",
        "instance_norm 2x8x5x5 float16 channels_last training forward+backward",
    ]
    assert not any(isinstance(case, ModelCase) for case in cases(Wanted(dtypes=("float32",))))
    assert cases(Wanted(names=("llama",))) == [ModelCase("llama", "training"), ModelCase("llama", "evaluation")]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            Wanted(names=("layernorm",)),
            "op 'layernorm': there are resnet, convnext, llama, rms_norm, layer_norm, add_rms_norm, add_layer_norm, "
            "gated_rms_norm, batch_norm, batch_norm_relu, instance_norm, layer_norm_2d, group_norm",
        ),
        (Wanted(dtypes=("int8",)), "dtype 'int8': there are float32, bfloat16, float16, float64"),
        (Wanted(layouts=("nhwc",)), "layout 'nhwc': there are contiguous, channels_last"),  # type: ignore[arg-type]
        (Wanted(compiled="yes"), "compile 'yes': there are all, some, none"),
        (
            Wanted(shape=(2, 3)),
            "shape needs op: say which operations the shape is for, as in --op layer_norm --shape 512,768",
        ),
        (Wanted(("layer_norm",), (0, 3)), "shape 0,3: every size is 1 or more"),
        (Wanted(("group_norm",), (2, 3)), "group_norm takes inputs of 4 dimensions, and 2,3 has 2"),
        (Wanted(("layer_norm",), (3,)), "layer_norm takes inputs of 2 to 5 dimensions, and 3 has 1"),
        (Wanted(("llama",), (2, 3)), "shape does nothing with the model 'llama': its inputs are fixed"),
        (Wanted(("llama",), dtypes=("float32",)), "dtype does nothing with the model 'llama': its inputs are fixed"),
        (
            Wanted(("layer_norm",), layouts=("channels_last",)),
            "no case is left: channels_last is for inputs of four dimensions",
        ),
    ],
)
def test_refusals(wanted: Wanted, message: str) -> None:
    with pytest.raises(StudyError, match=f"^{re.escape(message)}$"):
        cases(wanted)
