"""Layers through the kernels in Triton, on the CPU: Triton's interpreter runs them, and every access is watched.

Every address must lie in one of the tensors that a launch was given. What a launch makes must be written completely,
each element by one program alone, and not be read before, nor by a program that has not waited for it. Fresh memory is
full of NaN. The interpreter runs programs one after another, so one that waits for a later one would wait for ever:
that is an error here.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from triton import knobs
from triton import language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from normwise.kernels import launch, prepare
from normwise.kernels import run as running
from normwise.kernels.gpu import kernel as kernels
from normwise.kernels.launch import LIMITS, Layout, Limits, grid_of, layout_of, view_of
from tests.compiled import Call
from tests.poisoned import poison

needs_interpreter = pytest.mark.skipif(not knobs.runtime.interpret, reason="Triton compiles for a GPU in this process")

# Columns of more than 32 elements have up to 3 parts of tiles of 16, and few of their blocks make a group.
DIVIDED = Limits(held=32, held_back=16, divided=16, beside=2, least=8, parts=3, joined=64, turns=2, share=2**12)
WAYS = {"held": LIMITS, "divided": DIVIDED}
every_way = pytest.mark.parametrize("limits", WAYS.values(), ids=WAYS)

_FORWARD, _BACKWARD = (
    {"total", "y", "statistics", "partial"},
    {"d_x", "d_gate", "d_weight", "d_bias", "partial", "sums"},
)
_MADE = {
    "resident.forward": _FORWARD,
    "divided_forward.forward": _FORWARD,
    "resident.backward": _BACKWARD,
    "divided_backward.backward": _BACKWARD,
    "commit.commit": set(),
}
_CHANGED = {"commit.commit": {"mean", "spread", "batches", "skips"}}  # by program 0


@dataclass
class Buffer:
    """A dense tensor of a launch.

    `writers`: the program that wrote each element, -1 for none yet; None: nobody may.
    """

    name: str
    first: int
    itemsize: int
    size: int
    writers: NDArray[np.int64] | None

    def places(self, addresses: NDArray[np.uint64]) -> NDArray[np.int64] | None:
        """The numbers of the elements at some addresses, if all are in here."""
        offsets = addresses.astype(np.int64) - self.first
        if offsets.min() < 0 or offsets.max() >= self.size * self.itemsize or (offsets % self.itemsize).any():
            return None
        return offsets // self.itemsize


class Launch(NamedTuple):
    """A kernel's name, how many programs ran, and how they shared columns that no program holds."""

    kernel: str
    programs: int
    is_given: bool  # it reads statistics that are remembered
    parts: int = 1
    tiles: int = 1
    per_group: int = 0  # blocks; 0: nobody waits
    loop: int = 1

    @property
    def groups(self) -> int:
        """How many groups of blocks took turns."""
        return self.programs // (self.per_group * self.parts) // 2 - 1 if self.per_group else 1


@dataclass
class Watch:
    """Which launches there were, and what the one that runs was given.

    With `backwards`, programs of one turn run from last to first: nothing may depend on which of them is done first.
    """

    backwards: bool = False
    launches: list[Launch] = field(default_factory=list)
    _buffers: list[Buffer] = field(default_factory=list)
    _known: dict[int, set[int]] = field(default_factory=dict)  # to a program: those whose writes it may read
    _told: dict[int, set[int]] = field(default_factory=dict)  # to whoever comes to a counter

    @contextmanager
    def launch(self, launched: Launch, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """While a kernel runs, and once it is done."""
        self.launches.append(launched)
        self._buffers = [_buffer(launched, name, tensor) for name, tensor in tensors.items()]
        self._known, self._told = defaultdict(set), defaultdict(set)
        yield
        for buffer in self._buffers:
            assert buffer.writers is None or (buffer.writers >= 0).all(), f"{launched.kernel} left out {buffer.name}"

    def load(self, addresses: NDArray[np.uint64], program: int) -> None:
        """Nothing that is not there, or not yet, or of which the program cannot know that it is there."""
        buffer, places = self._found(addresses)
        if buffer.writers is None:
            return
        writers = {*buffer.writers[places].tolist()}
        assert -1 not in writers, f"{buffer.name} is read too early"
        assert writers <= self._known[program] | {program}, f"nobody waited for {buffer.name}"

    def store(self, addresses: NDArray[np.uint64], program: int) -> None:
        """Only what is to be made, and nothing that another program makes."""
        buffer, places = self._found(addresses)
        assert buffer.writers is not None, f"{buffer.name} is written"
        assert len(np.unique(places)) == len(places), f"{buffer.name} is written twice at once"
        others = (buffer.writers[places] != -1) & (buffer.writers[places] != program)
        assert not others.any(), f"two programs write {buffer.name}"
        buffer.writers[places] = program
        for others in (*self._known.values(), *self._told.values()):
            others.discard(program)

    def count(self, addresses: NDArray[np.uint64], found: NDArray[np.int32], program: int) -> NDArray[np.int32]:
        """Only what is there to be counted with; the first counter hands out tickets."""
        buffer, places = self._found(addresses)
        assert buffer.name == "counters", f"{buffer.name} is counted with"
        if places.item():
            self._known[program] |= self._told[places.item()]
            self._told[places.item()] |= self._known[program] | {program}
        launched = self.launches[-1]
        turn = launched.per_group * launched.parts
        if not self.backwards or places.item() or not turn:
            return found
        return found // turn * turn + (turn - 1 - found % turn)

    def _found(self, addresses: NDArray[np.uint64]) -> tuple[Buffer, NDArray[np.int64]]:
        for buffer in self._buffers:
            places = buffer.places(addresses)
            if places is not None:
                return buffer, places
        known = ", ".join(f"{b.name} {b.first}..{b.first + b.size * b.itemsize}" for b in self._buffers)
        raise AssertionError(f"{addresses.min()}..{addresses.max()} is in none of {known}")


def _buffer(launched: Launch, name: str, tensor: Tensor) -> Buffer:
    assert tensor.numel() == 1 + sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape, strict=True)), name
    writers = None
    if name in _MADE[launched.kernel] and not (name == "statistics" and launched.is_given):
        writers = np.full(tensor.numel(), -1)
    elif name in _CHANGED.get(launched.kernel, ()):
        writers = np.zeros(tensor.numel(), int)
    return Buffer(name, tensor.data_ptr(), tensor.element_size(), tensor.numel(), writers)


def layout(call: Call, limits: Limits) -> tuple[Layout, int]:
    """How the forward of a call is laid out, and how many programs it takes."""
    geometry = call.choice().geometry
    assert geometry is not None
    view = view_of(geometry)
    found = layout_of(view.sizes[1], view.sizes[3], limits, backward=False)
    grid = grid_of(view, found, kernels._INTERPRETED, call.dtype.itemsize, limits, adds_up=False)
    return found, grid.blocks if found.is_resident else grid.tickets(found.parts)


@contextmanager
def interpreted(limits: Limits = LIMITS, *, backwards: bool = False) -> Iterator[Watch]:
    """All calls go through the kernels in Triton, and through nothing else."""
    watch = Watch(backwards)
    with pytest.MonkeyPatch.context() as patch:
        for module in (prepare, running):
            patch.setattr(module, "requested", lambda: "triton")
        patch.setattr(prepare, "compiled", lambda: {"cpu": "triton"})
        patch.setattr(launch, "LIMITS", limits)
        _watch(patch, watch)
        prepare._prepared.cache_clear()
        yield from _poisoned(watch)
    prepare._prepared.cache_clear()


def _poisoned(watch: Watch) -> Iterator[Watch]:
    for _ in poison():
        yield watch


def _watch(patch: pytest.MonkeyPatch, watch: Watch) -> None:
    patch.setattr(GridExecutor, "__call__", _launching(watch, GridExecutor.__call__))
    load, store, count = (
        getattr(InterpreterBuilder, name) for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw")
    )

    def loading(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        _each(lambda addresses: watch.load(addresses, self.grid_idx[0]), pointers, mask)
        return load(self, pointers, mask, *others)

    def storing(self: Any, pointers: Any, values: Any, mask: Any, *others: Any) -> Any:
        _each(lambda addresses: watch.store(addresses, self.grid_idx[0]), pointers, mask)
        return store(self, pointers, values, mask, *others)

    def counting(self: Any, operation: Any, pointers: Any, values: Any, mask: Any, *others: Any) -> Any:
        found = count(self, operation, pointers, values, mask, *others)
        assert values.data.any() or found.data.all(), "a program waits for one that comes later"
        return TensorHandle(watch.count(pointers.data, found.data, self.grid_idx[0]), found.dtype)

    patch.setattr(InterpreterBuilder, "create_masked_load", loading)
    patch.setattr(InterpreterBuilder, "create_masked_store", storing)
    patch.setattr(InterpreterBuilder, "create_atomic_rmw", counting)
    patch.setattr(InterpreterBuilder, "create_fp_trunc", _rounded)


def _launching(watch: Watch, execute: Callable[..., None]) -> Callable[..., None]:
    def launching(self: GridExecutor, *arguments: Any, **told: Any) -> None:
        given = dict(zip(self.arg_names, arguments, strict=False)) | told
        name = f"{self.fn.__globals__['__name__'].rpartition('.')[2]}.{self.fn.__name__}"
        numbers = {key: given[key] for key in ("parts", "tiles", "per_group", "loop") if key in given}
        tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
        if hasattr(arguments[0], "_asdict"):
            tensors = {key: value for key, value in arguments[0]._asdict().items() if value is not None}
        if "counters" not in tensors:
            numbers.pop("per_group", None)
        launched = Launch(name, self.grid[0], given.get("IS_GIVEN", False), **numbers)
        with watch.launch(launched, tensors), _interpreting():
            execute(self, *arguments, **told)

    return launching


def _each(look: Callable[[NDArray[np.uint64]], None], pointers: Any, mask: Any) -> None:
    addresses = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
    taken = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
    if taken.size:
        look(taken)


@contextmanager
def _interpreting() -> Iterator[None]:
    """Triton changes its language at every call of a function: once for a launch does, in a third of the time.

    A GPU warns of no overflow, nor of columns without a number.
    """
    with np.errstate(all="ignore"), warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
        changed = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        patch.setattr(interpreter, "_patch_lang", lambda _: interpreter._LangPatchScope())
        try:
            yield
        finally:
            changed.restore()


def _rounded(self: InterpreterBuilder, source: TensorHandle, wanted: Any) -> TensorHandle:
    """To the nearest, as GPUs round; the interpreter cuts float32 off to make it bfloat16."""
    if wanted.scalar != tl.bfloat16:
        return self.cast_impl(source, wanted)
    cut = torch.from_numpy(np.array(source.data)).to(torch.bfloat16).view(torch.uint16)
    return TensorHandle(cut.numpy(), tl.bfloat16)
