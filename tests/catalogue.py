"""The catalogue of layers: a layer that is entered here gets the common tests for free.

`CASES` pairs every layer, for every rank and option, with its twin in torch. `FAMILIES` puts a matrix of samples x
columns before every kind of layer, so that an input that is hard on a column is tried on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import normwise as nw

MakeLayer = Callable[..., nn.Module]


class ChannelsFirstLayerNorm(nn.LayerNorm):
    """torch's way to LayerNorm2d: channels last, LayerNorm, channels back."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class ChannelsFirstRMSNorm(nn.RMSNorm):
    """torch's way to RMSNorm2d."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


@dataclass(frozen=True)
class Case:
    """A layer, its twin in torch, and a shape that both take. The makers accept `dtype=`."""

    name: str
    ours: MakeLayer
    twin: MakeLayer
    shape: tuple[int, ...]
    repeated: int = 0  # a dimension along which an input may repeat itself without a column losing its spread

    def __str__(self) -> str:
        return f"{self.name}-{'x'.join(map(str, self.shape))}"

    def pair(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
        """Both layers with the same random numbers, in parameters and in memory; ours gives them to torch's."""
        ours, twin = self.ours(dtype=dtype), self.twin(dtype=dtype)
        randomize(ours)
        twin.load_state_dict(ours.state_dict(), strict=True)
        return ours, twin


@torch.no_grad()
def randomize(layer: nn.Module) -> None:
    """Numbers as after some training: weights away from 1, biases away from 0, memory away from its start."""
    for parameter in layer.parameters():
        parameter.uniform_(0.5, 2.0).mul_(torch.randn_like(parameter).sign())
    for buffer in layer.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2.0)


_SHAPES = ((7, 6), (3, 6, 9), (3, 6, 4, 5), (2, 6, 3, 4, 2))
_SPATIAL = _SHAPES[1:]
_BATCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_INSTANCE = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


def _batch(name: str, shapes: tuple[tuple[int, ...], ...], **options: object) -> Iterator[Case]:
    for shape in shapes:
        ours, twin = partial(nw.BatchNorm, 6, **options), partial(_BATCH[len(shape)], 6, **options)
        yield Case(name, ours, twin, shape, repeated=1 if len(shape) == 2 else 0)


def _instance(name: str, shapes: tuple[tuple[int, ...], ...], **options: object) -> Iterator[Case]:
    for shape in shapes:
        yield Case(name, partial(nw.InstanceNorm, 6, **options), partial(_INSTANCE[len(shape)], 6, **options), shape)


def _same(name: str, ours: MakeLayer, twin: MakeLayer, shapes: tuple[tuple[int, ...], ...]) -> Iterator[Case]:
    for shape in shapes:
        yield Case(name, ours, twin, shape)


CASES = (
    *_batch("BatchNorm", _SHAPES),
    *_batch("BatchNorm, plain", _SPATIAL[:1], affine=False),
    *_batch("BatchNorm, no memory", _SPATIAL[1:2], track_running_stats=False),
    *_batch("BatchNorm, average", _SHAPES[:1], momentum=None),
    *_batch("BatchNorm, momentum 1", _SHAPES[:1], momentum=1.0),
    *_batch("BatchNorm, eps", _SHAPES[2:3], eps=0.3, momentum=0.7),
    *_instance("InstanceNorm", _SPATIAL),
    *_instance("InstanceNorm, affine", _SPATIAL, affine=True),
    *_instance("InstanceNorm, memory", _SPATIAL, affine=True, track_running_stats=True),
    *_same("LayerNorm", partial(nw.LayerNorm, 6), partial(nn.LayerNorm, 6), ((7, 6), (3, 5, 6), (2, 3, 4, 6))),
    *_same("LayerNorm, two axes", partial(nw.LayerNorm, (4, 6)), partial(nn.LayerNorm, (4, 6)), ((5, 4, 6),)),
    *_same("LayerNorm, no bias", partial(nw.LayerNorm, 6, bias=False), partial(nn.LayerNorm, 6, bias=False), ((7, 6),)),
    *_same("LayerNorm, plain", partial(nw.LayerNorm, 6, 0.1, False), partial(nn.LayerNorm, 6, 0.1, False), ((7, 6),)),
    *_same("RMSNorm", partial(nw.RMSNorm, 6), partial(nn.RMSNorm, 6), ((7, 6), (3, 5, 6), (2, 3, 4, 6))),
    *_same("RMSNorm, two axes", partial(nw.RMSNorm, (4, 6), 0.01), partial(nn.RMSNorm, (4, 6), 0.01), ((5, 4, 6),)),
    *_same("RMSNorm, plain", partial(nw.RMSNorm, 6, 0.1, False), partial(nn.RMSNorm, 6, 0.1, False), ((7, 6),)),
    *_same("GroupNorm", partial(nw.GroupNorm, 2, 6), partial(nn.GroupNorm, 2, 6), _SHAPES),
    *_same("GroupNorm, one group", partial(nw.GroupNorm, 1, 6), partial(nn.GroupNorm, 1, 6), _SHAPES[2:3]),
    *_same(
        "GroupNorm, plain", partial(nw.GroupNorm, 3, 6, 0.1, False), partial(nn.GroupNorm, 3, 6, 0.1, False), _SPATIAL
    ),
    *_same("LayerNorm2d", partial(nw.LayerNorm2d, 6), partial(ChannelsFirstLayerNorm, 6), _SHAPES),
    *_same(
        "LayerNorm2d, no bias",
        partial(nw.LayerNorm2d, 6, bias=False),
        partial(ChannelsFirstLayerNorm, 6, bias=False),
        _SPATIAL[:1],
    ),
    *_same("RMSNorm2d", partial(nw.RMSNorm2d, 6), partial(ChannelsFirstRMSNorm, 6), _SHAPES),
)
REMEMBERING = tuple(case for case in CASES if "num_batches_tracked" in case.ours().state_dict())

Relay = Callable[[Tensor], Tensor]


def _channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats.get(x.dim(), torch.contiguous_format))


def _transposed(x: Tensor) -> Tensor:
    backwards = tuple(reversed(range(x.dim())))
    return x.permute(backwards).contiguous().permute(backwards)


def _strided(x: Tensor) -> Tensor:
    return torch.stack((x, torch.full_like(x, torch.nan)), -1).flatten(-2)[..., ::2]


LAYOUTS: dict[str, Relay] = {
    "contiguous": Tensor.contiguous,
    "channels last": _channels_last,
    "transposed": _transposed,
    "strided": _strided,
}


def laid_out(case: Case, layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random input of the case's shape, as it may lie in memory; "expanded" repeats one slice with stride 0."""
    x = torch.randn(case.shape, dtype=dtype) * 2 + 1
    if layout == "expanded":
        return x.narrow(case.repeated, 0, 1).expand(case.shape)
    return LAYOUTS[layout](x)


@dataclass(frozen=True)
class Family:
    """A kind of layer as it sees a matrix X' of samples x columns; the number of columns is even."""

    name: str
    layer: Callable[..., nn.Module]  # from rows, columns
    fill: Relay  # from the matrix to an input
    matrix: Relay  # from an output back to the matrix
    centers: bool = True

    def __str__(self) -> str:
        return self.name

    def run(self, matrix: Tensor, **options: object) -> Tensor:
        """The layer, freshly made, on a matrix."""
        rows, columns = matrix.shape
        return self.matrix(self.layer(rows, columns, **options)(self.fill(matrix)))

    def formula(self, matrix: Tensor, eps: float | None = None) -> Tensor:
        """The formula in float64, written down without any care, because float64 needs none for float32's inputs."""
        x = matrix.double()
        if self.centers:
            x = x - x.mean(0)
        default = 1e-5 if self.centers else torch.finfo(matrix.dtype).eps
        return x / (x.square().mean(0) + (default if eps is None else eps)).sqrt()


FAMILIES = (
    Family("BatchNorm", lambda rows, columns, **o: nw.BatchNorm(columns, **o), lambda m: m, lambda y: y),
    Family(
        "BatchNorm of images",
        lambda rows, columns, **o: nw.BatchNorm(columns, **o),
        lambda m: m.T.reshape(1, m.shape[1], -1, 1),
        lambda y: y.reshape(y.shape[1], -1).T,
    ),
    Family("LayerNorm", lambda rows, columns, **o: nw.LayerNorm(rows, **o), lambda m: m.T, lambda y: y.T),
    Family("LayerNorm2d", lambda rows, columns, **o: nw.LayerNorm2d(rows, **o), lambda m: m[None], lambda y: y[0]),
    Family(
        "InstanceNorm",
        lambda rows, columns, **o: nw.InstanceNorm(columns, **o),
        lambda m: m.T[None],
        lambda y: y[0].T,
    ),
    Family(
        "GroupNorm",
        lambda rows, columns, **o: nw.GroupNorm(2, 2 * rows, **o),
        lambda m: m.T.reshape(-1, 2 * m.shape[0]),
        lambda y: y.reshape(-1, y.shape[1] // 2).T,
    ),
    Family("RMSNorm", lambda rows, columns, **o: nw.RMSNorm(rows, **o), lambda m: m.T, lambda y: y.T, centers=False),
    Family(
        "RMSNorm2d",
        lambda rows, columns, **o: nw.RMSNorm2d(rows, **o),
        lambda m: m[None],
        lambda y: y[0],
        centers=False,
    ),
)
CENTERING = tuple(family for family in FAMILIES if family.centers)
