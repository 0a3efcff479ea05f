"""The user's model, input and batches, by the names that the command line is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normwise.errors import NormwiseError, SurgeryError
from normwise.recipes import Code, calling
from normwise.tuning.user import blame, one_line, resolve
from normwise.weight_files import load, read


@dataclass(frozen=True)
class Input:
    """A batch to run a model on, and how to make it again."""

    batch: Any
    code: Code


def made(spec: str) -> nn.Module:
    """The model that `module:factory` makes.

    Raises:
        NormwiseError: the factory cannot be called, or gives no module.
    """
    factory = resolve(spec, "model")
    if isinstance(factory, nn.Module):
        raise SurgeryError(f"model {spec!r} is a {type(factory).__name__}: give a function that returns it")
    needed = _needed(factory)
    if needed:
        raise SurgeryError(f"model {spec!r} needs the arguments {', '.join(needed)}: give a function that needs none")
    with blame(f"model {spec!r} raised"):
        model = factory()
    if not isinstance(model, nn.Module):
        raise SurgeryError(f"model {spec!r} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def loaded(spec: str, weights: Path | None) -> tuple[nn.Module, tuple[str, ...]]:
    """The model that `module:factory` makes, with the weights of a file; and what there is to know of it.

    Raises:
        NormwiseError: there is no such model; the weights cannot be read or do not fit.
    """
    if weights is None:
        return made(spec), (f"without --weights the weights are those that {spec} gives",)
    found = read(weights)
    model = made(spec)
    return model, load(model, found)


def _needed(factory: Callable[..., Any]) -> list[str]:
    """The arguments without which a function cannot be called."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # of some functions that are not written in Python
        return []
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in several]


def given_input(model: nn.Module, shape: tuple[int, ...] | None, ids: int | None, data: str | None) -> Input | None:
    """Random numbers of a shape, token ids below `ids` of that shape, or the first batch of `module:function`.

    Raises:
        NormwiseError: both or neither half of an input are given; the function fails.
    """
    if shape is not None and data is not None:
        raise SurgeryError("the input is of a --shape or comes from --data, not both")
    if data is not None:
        return _first_batch(data)
    if shape is None:
        if ids is not None:
            raise SurgeryError("--ids needs the shape of the token ids: --shape 2,128 --ids 1000")
        return None
    generator = torch.Generator().manual_seed(0)
    if ids is not None:
        batch = torch.randint(ids, shape, generator=generator)
        return Input(batch, Code(f"torch.randint({ids}, {shape})", ("import torch",)))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    text = f"torch.randn({shape}" + (")" if dtype == torch.float32 else f", dtype={dtype})")
    return Input(torch.randn(shape, generator=generator).to(dtype), Code(text, ("import torch",)))


def _first_batch(spec: str) -> Input:
    """The batch of `module:function`, or the first of its batches.

    A tensor, a mapping and a tuple are a batch; a list or a loader has batches. Of a list that is itself a batch the
    first element is the input, so that both readings agree.
    """
    code = calling(spec)
    batches = _call(spec)
    if isinstance(batches, (Tensor, Mapping, tuple)):
        return Input(batches, code)
    if not isinstance(batches, Iterable):
        raise SurgeryError(f"data {spec!r} returned a {type(batches).__name__}, neither a batch nor batches")
    with blame(f"data {spec!r} raised"):
        first = next(iter(batches), None)
    if first is None:
        raise SurgeryError(f"data {spec!r} returned no batch")
    return Input(first, Code(f"next(iter({code.text}))", code.imports))


class Batches:
    """The batches of `module:function`, at most so many, as often as they are wanted.

    Where the function gives an iterator, which can be read once, it is called again for every pass.
    """

    def __init__(self, spec: str, most: int | None) -> None:
        self._spec, self._most, self._given = spec, most, _call(spec)
        if isinstance(self._given, (Tensor, Mapping)) or not isinstance(self._given, Iterable):
            kind = type(self._given).__name__
            raise SurgeryError(f"data {spec!r} returned a {kind}, not batches: a list, a loader or a generator of them")

    @property
    def given(self) -> Any:
        """What the function returned, such as a loader; these batches, where that is an iterator."""
        return self if isinstance(self._given, Iterator) else self._given

    def __iter__(self) -> Iterator[Any]:
        with blame(f"data {self._spec!r} raised"):
            batches = _call(self._spec) if isinstance(self._given, Iterator) else self._given
            yield from islice(batches, self._most)


def made_optimizer(spec: str, model: nn.Module) -> Optimizer:
    """The optimizer that `module:function` makes of a model.

    Raises:
        NormwiseError: there is no such function, or it gives no optimizer.
    """
    make = resolve(spec, "optimizer")
    with blame(f"optimizer {spec!r} raised"):
        optimizer = make(model)
    if not isinstance(optimizer, Optimizer):
        raise SurgeryError(f"optimizer {spec!r} returned a {type(optimizer).__name__}, not a torch.optim.Optimizer")
    return optimizer


def _call(spec: str) -> Any:
    function = resolve(spec, "data")
    needed = _needed(function)
    if needed:
        raise SurgeryError(f"data {spec!r} needs the arguments {', '.join(needed)}: give a function that needs none")
    with blame(f"data {spec!r} raised"):
        return function()


@contextmanager
def operating(what: str) -> Iterator[None]:
    """Turn an exception of the user's model into one line; normwise's own pass unchanged."""
    try:
        yield
    except NormwiseError:
        raise
    except Exception as error:
        raise SurgeryError(f"{what} raised {one_line(error)}") from error
