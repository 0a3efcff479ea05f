"""What is measured on a GPU: what matters most comes first, because time may run out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from normwise.bench.cases import DTYPES, LAYOUTS, OPERATIONS, Case, Pass, Shape
from normwise.errors import StudyError

LENGTHS = tuple(2**n for n in range(10, 19))  # of rows: 1k to 256k
BYTES = 2**28  # of a tensor of rows
IMAGES: tuple[Shape, ...] = ((256, 64, 56, 56), (256, 256, 14, 14), (64, 256, 56, 56))

_COMPILED = (2**12, 2**15, 2**18)  # lengths that torch.compile, which takes seconds a case, is asked for
_ROWS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
_LEARN, _TRAIN, _EVALUATE = Pass("training", backward=True), Pass("training"), Pass("evaluation")


def cases(names: Sequence[str] | None = None) -> list[Case]:
    """All cases, or those of some operations.

    Raises:
        StudyError: there is no such operation.

    >>> print(cases(["rms_norm"])[0])
    rms_norm 131072x1024 bfloat16 evaluation forward
    """
    for name in names or ():
        if name not in OPERATIONS:
            raise StudyError(f"op {name!r}: there are {', '.join(OPERATIONS)}")
    return [case for case in _all() if names is None or case.operation in names]


def rows(length: int, dtype: str = "bfloat16") -> Shape:
    """So many rows of a length that a tensor has 2^28 bytes."""
    return BYTES // DTYPES[dtype].itemsize // length, length


def _all() -> Iterator[Case]:
    for shape, layout, what in product(IMAGES, LAYOUTS, (_TRAIN, _LEARN)):
        yield Case("batch_norm", shape, "bfloat16", layout, what, compiled=True)
    for length, name, what in product(LENGTHS, _ROWS, (_EVALUATE, _LEARN)):
        yield Case(name, rows(length), "bfloat16", "contiguous", what, compiled=length in _COMPILED)
    for name, layout, what in product(("layer_norm_2d", "group_norm", "instance_norm"), LAYOUTS, (_EVALUATE, _LEARN)):
        yield Case(name, IMAGES[2], "bfloat16", layout, what, compiled=layout == "contiguous")
    for length, what in product(_COMPILED[:2], (_EVALUATE, _LEARN)):
        yield Case("gated_rms_norm", rows(length), "bfloat16", "contiguous", what, compiled=True)
    for layout, what in product(LAYOUTS, (_TRAIN, _LEARN)):
        yield Case("batch_norm_relu", IMAGES[0], "bfloat16", layout, what, compiled=True)
    for shape, layout in product(IMAGES, LAYOUTS):
        yield Case("batch_norm", shape, "bfloat16", layout, _EVALUATE)
    for layout, what in product(LAYOUTS, (_TRAIN, _LEARN)):
        yield Case("batch_norm", IMAGES[0], "float16", layout, what)  # which every cuDNN takes
    for name, length, what in product(_ROWS[:2], (2**12, 2**15), (_EVALUATE, _LEARN)):
        yield Case(name, rows(length, "float32"), "float32", "contiguous", what)
