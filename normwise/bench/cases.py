"""What is measured, as data: operations, their shapes, dtypes and layouts, and the bytes that each must move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, TypeAlias, get_args

import torch

from normwise.errors import StudyError

Shape: TypeAlias = tuple[int, ...]
Layout: TypeAlias = Literal["contiguous", "channels_last"]
Mode: TypeAlias = Literal["training", "evaluation"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

_ROWS: tuple[Shape, ...] = ((4096, 768), (8192, 4096), (1024, 16384))
_IMAGES: tuple[Shape, ...] = ((32, 64, 56, 56), (128, 256, 14, 14))
_TABLE: tuple[Shape, ...] = ((8192, 512),)
_SMALL: tuple[Shape, ...] = ((8, 64),)  # where the call costs, and not the bytes


@dataclass(frozen=True)
class Pass:
    """What is run of a layer: in training its forward keeps what the backward needs, in evaluation it does not."""

    mode: Mode
    backward: bool = False

    def __str__(self) -> str:
        return f"{self.mode} {'forward+backward' if self.backward else 'forward'}"


_LEARN, _TRAIN, _EVALUATE = Pass("training", backward=True), Pass("training"), Pass("evaluation")


@dataclass(frozen=True)
class Operation:
    """A layer, the shapes it is measured on, and the passes.

    Attributes:
        name: As the command line has it.
        shapes: Those of a run that names none.
        ranks: How many dimensions an input may have.
        passes: What is run.
        adds: Whether a residual is added first, and the sum returned as well.
        gated: Whether the output is multiplied by SiLU of a gate.
    """

    name: str
    shapes: tuple[Shape, ...]
    ranks: range
    passes: tuple[Pass, ...]
    adds: bool = False
    gated: bool = False

    def __str__(self) -> str:
        return self.name.replace("_", " ")


_ANY, _IMAGE = range(2, 6), range(4, 5)
OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("rms_norm", (*_ROWS, *_SMALL), _ANY, (_EVALUATE, _LEARN)),
        Operation("layer_norm", (*_ROWS, *_SMALL), _ANY, (_EVALUATE, _LEARN)),
        Operation("add_rms_norm", _ROWS, _ANY, (_EVALUATE, _LEARN), adds=True),
        Operation("add_layer_norm", _ROWS, _ANY, (_EVALUATE, _LEARN), adds=True),
        Operation("gated_rms_norm", _ROWS, _ANY, (_EVALUATE, _LEARN), gated=True),
        Operation("batch_norm", (*_IMAGES, *_TABLE), _ANY, (_TRAIN, _EVALUATE, _LEARN)),
        Operation("batch_norm_relu", _IMAGES, _IMAGE, (_TRAIN, _LEARN)),
        Operation("instance_norm", _IMAGES, _IMAGE, (_EVALUATE, _LEARN)),
        Operation("layer_norm_2d", _IMAGES, _IMAGE, (_EVALUATE, _LEARN)),
        Operation("group_norm", _IMAGES, _IMAGE, (_EVALUATE, _LEARN)),
    )
}
MODELS = ("resnet", "convnext", "llama")
NAMES = (*MODELS, *OPERATIONS)


@dataclass(frozen=True)
class Case:
    """One operation on one input.

    >>> case = Case("add_rms_norm", (4096, 768), "float32", "contiguous", Pass("training", backward=True))
    >>> print(case, case.bytes)
    add_rms_norm 4096x768 float32 training forward+backward 100663296
    """

    operation: str
    shape: Shape
    dtype: str
    layout: Layout
    what: Pass
    compiled: bool = False

    @property
    def adds(self) -> bool:
        """Whether a residual is added first."""
        return OPERATIONS[self.operation].adds

    @property
    def gated(self) -> bool:
        """Whether the output is multiplied by SiLU of a gate."""
        return OPERATIONS[self.operation].gated

    @property
    def inputs(self) -> int:
        """How many tensors of the input's shape come in."""
        return 2 if self.adds or self.gated else 1

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the input."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def bytes(self) -> int:
        """Bytes that must be read and written, each tensor once.

        A forward reads the input and writes the output: 2 tensors; with the add it reads the residual and writes the
        sum as well: 4. A backward reads the input and the output's gradient and writes the input's: 3 more; with the
        add the gradient of the sum comes in as well, and one gradient serves input and residual: 4 more. A gate is read
        in both, and its gradient written: 3 and 5.
        """
        forward, backward = (4, 4) if self.adds else (3, 5) if self.gated else (2, 3)
        return self.tensor_bytes * (forward + backward * self.what.backward)

    def __str__(self) -> str:
        layout = f" {self.layout}" if self.layout != "contiguous" else ""
        return f"{self.operation} {'x'.join(map(str, self.shape))} {self.dtype}{layout} {self.what}"


@dataclass(frozen=True)
class ModelCase:
    """A step of a whole model: in training forward, backward and an SGD step, in evaluation forward.

    >>> print(ModelCase("resnet", "training"))
    resnet training
    """

    model: str
    mode: Mode

    def __str__(self) -> str:
        return f"{self.model} {self.mode}"


AnyCase: TypeAlias = Case | ModelCase


@dataclass(frozen=True)
class Wanted:
    """Which cases are asked for; None leaves a choice to the benchmark.

    Attributes:
        names: Models and operations.
        shape: One shape, instead of each operation's own.
        dtypes: Of operations.
        layouts: Of operations.
        compiled: Whether compiled layers are timed: "all", "some" (one shape of each operation, float32, contiguous),
            "none".
        quick: Only the first shape of each operation, float32, nothing compiled.
    """

    names: tuple[str, ...] | None = None
    shape: Shape | None = None
    dtypes: tuple[str, ...] | None = None
    layouts: tuple[Layout, ...] | None = None
    compiled: str | None = None
    quick: bool = False


def cases(wanted: Wanted) -> list[AnyCase]:
    """The cases that are asked for, whole models first.

    Raises:
        StudyError: a name that is unknown, a shape that no operation of those asked for takes, or nothing is left.

    >>> found = cases(Wanted(names=("layer_norm",), shape=(64, 512)))
    >>> [str(case) for case in found]
    ['layer_norm 64x512 float32 evaluation forward', 'layer_norm 64x512 float32 training forward+backward']
    """
    _check(wanted)
    names = wanted.names or (tuple(OPERATIONS) if wanted.shape or wanted.dtypes or wanted.layouts else NAMES)
    models: list[AnyCase] = [ModelCase(name, mode) for name in names if name in MODELS for mode in get_args(Mode)]
    found = [*models, *(case for name in names if name in OPERATIONS for case in _of(OPERATIONS[name], wanted))]
    if not found:
        raise StudyError("no case is left: channels_last is for inputs of four dimensions")
    return found


def _of(operation: Operation, wanted: Wanted) -> list[Case]:
    """The cases of an operation, those on one input next to each other."""
    own = wanted.shape is not None
    shapes = (wanted.shape,) if wanted.shape is not None else operation.shapes
    dtypes = wanted.dtypes or (("float32",) if own or wanted.quick else ("float32", "bfloat16"))
    layouts: Sequence[Layout] = wanted.layouts or (("contiguous",) if own else LAYOUTS)
    first = operation.shapes[0]
    return [
        Case(operation.name, shape, dtype, layout, what, _is_compiled(wanted, shape == first, dtype, layout))
        for shape, dtype, layout in product(shapes, dtypes, layouts)
        if _exists(shape, dtype, layout, wanted)
        and not (wanted.quick and not own and shape not in (first, *_TABLE, *_SMALL))
        for what in operation.passes
    ]


def _exists(shape: Shape, dtype: str, layout: str, wanted: Wanted) -> bool:
    """Channels last needs images; a small call is measured in one dtype."""
    if layout == "channels_last" and len(shape) != 4:
        return False
    return shape not in _SMALL or dtype == "float32" or wanted.dtypes is not None or wanted.shape is not None


def _is_compiled(wanted: Wanted, is_first: bool, dtype: str, layout: str) -> bool:
    compiled = wanted.compiled or ("none" if wanted.quick else "all" if wanted.names else "some")
    return compiled == "all" or (compiled == "some" and is_first and dtype == "float32" and layout == "contiguous")


def _check(wanted: Wanted) -> None:
    _known("op", wanted.names, NAMES)
    _known("dtype", wanted.dtypes, tuple(DTYPES))
    _known("layout", wanted.layouts, LAYOUTS)
    _known("compile", wanted.compiled and (wanted.compiled,), ("all", "some", "none"))
    if wanted.shape is not None:
        _check_shape(wanted.names, wanted.shape)
    models = [name for name in wanted.names or () if name in MODELS]
    for option, value in (("shape", wanted.shape), ("dtype", wanted.dtypes), ("layout", wanted.layouts)):
        if models and value is not None:
            raise StudyError(f"{option} does nothing with the model {models[0]!r}: its inputs are fixed")


def _check_shape(names: Sequence[str] | None, shape: Shape) -> None:
    if names is None:
        raise StudyError("shape needs op: say which operations the shape is for, as in --op layer_norm --shape 512,768")
    if not all(shape):
        raise StudyError(f"shape {','.join(map(str, shape))}: every size is 1 or more")
    for name in names:
        ranks = OPERATIONS[name].ranks if name in OPERATIONS else range(len(shape), len(shape) + 1)
        if len(shape) not in ranks:
            takes = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
            raise StudyError(
                f"{name} takes inputs of {takes} dimensions, and {','.join(map(str, shape))} has {len(shape)}"
            )


def _known(option: str, given: Sequence[str] | None, known: Sequence[str]) -> None:
    for one in given or ():
        if one not in known:
            raise StudyError(f"{option} {one!r}: there are {', '.join(known)}")
