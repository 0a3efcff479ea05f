"""The masked layers' definition for the tests: a slow loop over columns, and the patterns and memories it is run on."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import normwise as nw
from normwise import RMS, Affine, Average, Frozen, Moving, Norm, Renorm, Scale, Standardize
from normwise.memory import Memory
from normwise.normalizers import Normalizer
from normwise.pattern import parse_names
from normwise.recoveries import Recovery
from tests.catalogue import randomize

EPS = 1e-5
_STANDARDIZE = Standardize(EPS)


@dataclass(frozen=True)
class Kind:
    """A pattern as the slow loop sees it: all axes with their sizes, in order, and which of them a mask covers."""

    text: str
    axes: dict[str, int]
    reduced: str
    valid_axes: str
    leading: bool = False  # whether the mask simply covers the leading dimensions, and the layer is not told
    over: str = "c"  # the axes of weight and bias
    remembers: str = ""
    sizes: tuple[tuple[str, int], ...] = ()
    normalizer: Normalizer = _STANDARDIZE

    def __str__(self) -> str:
        return f"{self.text}, mask over {self.valid_axes}, {type(self.normalizer).__name__}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the input: the axes that a size is given for share a dimension with the axis after them."""
        flat = {name for name, _ in self.sizes}
        groups = "".join(
            f"({name} " if name in flat else f"{name}) " if name == "k" else f"{name} " for name in self.axes
        )
        return self.sizes_of(groups)

    def sizes_of(self, names: str) -> tuple[int, ...]:
        return tuple(math.prod(self.axes[name] for name in dim) for dim in parse_names(names))

    def spread(self, tensor: Tensor, names: str) -> Tensor:
        """A tensor over some axes, in their order, shaped to broadcast against all of them."""
        named = {name for dim in parse_names(names) for name in dim}
        return tensor.reshape([size if name in named else 1 for name, size in self.axes.items()])

    def whole(self, mask: Tensor) -> Tensor:
        """A mask over all axes."""
        return self.spread(mask, self.valid_axes).expand(tuple(self.axes.values()))

    def layer(self, recovery: type[Recovery] | None, memory: Memory | None, dtype: torch.dtype) -> Norm:
        """With numbers as after some training."""
        recovers = None if recovery is None else recovery(self.over)
        layer = Norm(self.text, self.normalizer, recovers, memory, sizes=dict(self.sizes), dtype=dtype)
        with nw.no_update(layer):
            layer(torch.randn(self.shape, dtype=dtype))
        if layer.spec.elastic is not None:
            layer._resize(self.axes[layer.spec.elastic])
        randomize(layer)
        return layer

    def options(self, mask: Tensor) -> dict[str, object]:
        """The mask as the layer is told of it."""
        return {"valid": mask} if self.leading else {"valid": mask, "valid_axes": self.valid_axes}

    def mask(self) -> Tensor:
        """Random; where it tells columns apart, the first ones have no valid element, and the next ones one at most."""
        names = [name for dim in parse_names(self.valid_axes) for name in dim]
        mask = torch.rand([self.axes[name] for name in names]) < 0.6
        kept = [dim for dim, name in enumerate(names) if name not in self.reduced.split()]
        if kept:
            columns = mask.movedim(kept[0], 0)
            columns[:2] = False
            columns[(1, *[0] * (mask.dim() - 1))] = True
        return mask.reshape(self.sizes_of(self.valid_axes))


_IMAGES = {"n": 6, "c": 4, "h": 3, "w": 3}
_SEQUENCES = {"n": 8, "t": 4, "c": 3}
_TOKENS = {"n": 6, "t": 4, "d": 5}
_GROUPS = {"n": 5, "g": 2, "k": 2, "t": 4}
_TWO = (("g", 2),)

KINDS = (
    Kind("[n] c [...]", _IMAGES, "n h w", "n", leading=True, remembers="c"),
    Kind("[n] c [...]", _IMAGES, "n h w", "n c h w", leading=True, remembers="c"),
    Kind("[n t] c", _SEQUENCES, "n t", "n t", remembers="c"),
    Kind("[n t] c", _SEQUENCES, "n t", "t", remembers="c", normalizer=RMS(EPS)),
    Kind("[n] t c", _SEQUENCES, "n", "n t", leading=True, remembers="t c"),
    Kind("[n] t c", _SEQUENCES, "n", "n t c", remembers="t c", normalizer=RMS(EPS)),
    Kind("... [d]", _TOKENS, "d", "n t", leading=True, over="d"),
    Kind("... [d]", _TOKENS, "d", "d", over="d"),
    Kind("n t [d]", _TOKENS, "d", "n d", over="d", remembers="t", normalizer=RMS(EPS)),
    Kind("n c [l]", {"n": 5, "c": 3, "l": 6}, "l", "n l", remembers="c"),
    Kind("n (g [k]) [t]", _GROUPS, "k t", "n t", over="(g k)", remembers="g", sizes=_TWO),
    Kind("n (g [k]) [...]", _GROUPS, "k t", "n (g k)", leading=True, over="(g k)", remembers="g", sizes=_TWO),
    Kind("n (g [k]) [...]", _GROUPS, "k t", "g k", over="(g k)", sizes=_TWO),
    Kind("n [c] ...", _IMAGES, "c", "n c h w", leading=True),
    Kind("[n] ...", {"n": 6, "h": 3}, "n", "n", over="n"),
)

MEMORIES: dict[str, Callable[[str], Memory | None]] = {
    "none": lambda over: None,
    "moving": lambda over: Moving(over, decay=0.7),
    "biased": lambda over: Moving(over, decay=0.7, unbiased=False),
    "average": Average,
    "frozen": Frozen,
    "degenerate": lambda over: Moving(over, update_rate=0.3, degenerate="memory"),
    "corrected": lambda over: Moving(over, update_rate=0.3, renorm=Renorm(1.2, 0.3, 0, 0, 0)),
    "ghost": lambda over: Moving(over, update_rate=0.3, ghost=3),
    "beyond": lambda over: Moving(over, update_rate=0.3, beyond={over.split()[0]: "last"}),
}


def _fits(kind: Kind, memory: str) -> bool:
    """Whether a memory can be declared for a pattern, and filled under its mask."""
    masked = {name for dim in parse_names(kind.valid_axes) for name in dim}
    refused = {
        "average": bool(masked & set(kind.remembers.split())),
        "ghost": not kind.text.startswith("[n"),
        "beyond": kind.remembers.split()[:1] == kind.over.split() or bool(kind.sizes),
    }
    return memory == "none" or (kind.remembers != "" and not refused.get(memory, False))


GRID = [(kind, name) for kind in KINDS for name in MEMORIES if _fits(kind, name)]
RECOVERIES: tuple[type[Recovery] | None, ...] = (None, Scale, Affine)


class Loop:
    """The definition, column by column, in float64: what is valid is gathered, the rest is not looked at."""

    def __init__(self, kind: Kind, layer: Norm) -> None:
        self.kind, self.memory = kind, layer.spec.memory
        self.centers = isinstance(kind.normalizer, Standardize)
        self.least = 2 if self.centers else 1
        self.batches = 0
        if self.memory is not None:
            power = layer.running_var if self.centers else layer.running_mean_square
            self.power = power.double().clone()
            self.mean = layer.running_mean.double().clone() if self.centers else torch.zeros_like(self.power)

    def __call__(self, x: Tensor, mask: Tensor, *, training: bool) -> Tensor:
        """Normalized values of a view with all axes; in training the memory moves."""
        learns = self.memory is not None and self.memory.updates and training
        ghost = self.memory.ghost if self.memory is not None and learns else None
        pieces = 1 if ghost is None else -(-len(x) // ghost)
        parts = zip(x.tensor_split(pieces), mask.tensor_split(pieces), strict=True)
        return torch.cat([self._batch(part, valid, learns=learns) for part, valid in parts])

    def _batch(self, x: Tensor, mask: Tensor, *, learns: bool) -> Tensor:
        values = torch.zeros_like(x)
        entries: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        reduced = self.kind.reduced.split()
        kept = [
            [slice(None)] if name in reduced else range(size)
            for name, size in zip(self.kind.axes, x.shape, strict=True)
        ]
        for index in itertools.product(*kept):
            valid, at = mask[index], dict(zip(self.kind.axes, index, strict=True))
            cell = tuple(at[name] for name in self.kind.remembers.split())
            column = x[index][valid]
            values[index] = values[index].masked_scatter(valid, self._column(column, cell, learns=learns))
            if learns and len(column) >= self.least:
                entries[cell].append(self._statistics(column.detach()))
        self._remember(entries)
        return values

    def _column(self, x: Tensor, cell: tuple[int, ...], *, learns: bool) -> Tensor:
        if len(x) == 0:
            return x
        mean = x.mean() if self.centers else x.new_zeros(())
        sigma = ((x - mean).square().mean() + EPS).sqrt()
        if self.memory is None:
            return (x - mean) / sigma
        mean_then, sigma_then = self.mean[cell], (self.power[cell] + EPS).sqrt()
        renorm = self.memory.renorm
        falls_back = self.memory.degenerate == "memory" or self.memory.elastic is not None
        if not learns or (len(x) < self.least and falls_back):
            return (x - mean_then) / sigma_then
        if renorm is None or len(x) < self.least:
            return (x - mean) / sigma
        r = (sigma / sigma_then).detach().clamp(1 / renorm.r_max, renorm.r_max)
        d = ((mean - mean_then) / sigma_then).detach().clamp(-renorm.d_max, renorm.d_max)
        return (x - mean) / sigma * r + (d if self.centers else 0)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.centers:
            return x.new_zeros(()), x.square().mean()
        return x.mean(), x.var(unbiased=self.memory is not None and self.memory.unbiased)

    def _remember(self, entries: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]]) -> None:
        """Columns that the memory does not tell apart are averaged."""
        self.batches += bool(entries)
        for cell, found in entries.items():
            rate = self.memory.update_rate if self.memory is not None else None
            rate = 1 / self.batches if rate is None else rate
            for statistic, new in zip((self.mean, self.power), zip(*found, strict=True), strict=True):
                statistic[cell] = (1 - rate) * statistic[cell] + rate * torch.stack(new).mean()
