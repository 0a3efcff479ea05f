"""The built-in networks of sequences: transformer, lstm.

Both read sequences of feature vectors, (n, t, features), and of tokens, (n, t) whole numbers. Of vectors they make one
prediction an example, (n, outputs), from the mean over time; of tokens one a place, (n, outputs, t), from what stands
at and before it. Images are read row by row, and other examples number by number.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from normwise.errors import StudyError
from normwise.memory import Moving
from normwise.norm import Norm
from normwise.recurrent import LSTM
from normwise.scan import TIME
from normwise.spec import NormSpec
from normwise.tuning.axes import known
from normwise.tuning.networks import AROUND_RESIDUAL, AroundResidual
from normwise.tuning.norms import NormFactory

# What a normalization of all places is at one time step.
_BY_STEP = {"[...] c": f"[n] {TIME} c", "n [...] (g [k])": "n (g [k])"}

_INSTANCE = "n [...] c"


def transformer(
    norm: NormFactory,
    shape: tuple[int, ...] = (64,),
    outputs: int = 10,
    tokens: int | None = None,
    width: int = 32,
    depth: int = 2,
    heads: int = 4,
    placement: AroundResidual = "pre",
) -> nn.Module:
    """A small transformer encoder: `depth` blocks of attention and of a perceptron, learned positions, output layer.

    `shape` is that of one example, and `tokens` the size of the vocabulary (None: the inputs are numbers). With f
    attention or the perceptron, Linear -> GELU -> Linear, each step is, by placement:

    ======== ====================== ========================================================================
    pre      x + f(norm(x))         and a norm before the output layer (Xiong et al., arXiv:2002.04745)
    post     norm(x + f(x))         the first transformer (Vaswani et al., arXiv:1706.03762)
    inside   x + norm(f(x))         and a norm before the output layer
    ======== ====================== ========================================================================

    A norm is made as `norm(width, axis=-1)`. Over tokens, attention is causal, and norms are given single places,
    (n t, width): one that reduces over the places of an example would show each place what comes after it. torch's
    start.

    Raises StudyError for an unknown placement, and over tokens for instance normalization.

    >>> network = transformer(lambda features, axis: nn.Identity(), (16,), 5, tokens=5)
    >>> network(torch.zeros(2, 16, dtype=torch.long)).shape
    torch.Size([2, 5, 16])
    """
    known("placement", placement, AROUND_RESIDUAL)
    steps, features = as_sequence(shape, tokens)

    def layer() -> nn.Module:
        made = norm(width, axis=-1)
        return made if tokens is None else ByPlace(_within_a_place(made, "transformer over tokens"))

    parts: list[nn.Module] = [Positions(steps, width)]
    for _ in range(depth):
        parts.append(Residual(Attention(width, heads, causal=tokens is not None), layer(), placement))
        perceptron = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        parts.append(Residual(perceptron, layer(), placement))
    if placement != "post":
        parts.append(layer())
    return nn.Sequential(Reader(steps, features, tokens, width), *parts, Head(width, outputs, pooled=tokens is None))


def lstm(
    norm: NormFactory,
    shape: tuple[int, ...] = (64,),
    outputs: int = 10,
    tokens: int | None = None,
    width: int = 64,
) -> nn.Module:
    """A long short-term memory of one layer, `nw.LSTM`, with the normalization at its three places; an output layer.

    `norm` is asked for the layers of the input's gates, of the hidden state's gates and of the cell state, as
    `norm(features, axis=-1)`, and each is computed at every time step by itself: "layer" is Ba et al.
    (arXiv:1607.06450), "batch" Cooijmans et al. (arXiv:1603.09025) with statistics of each step in training and their
    average over the steps in evaluation; a pattern "[n] t c" remembers every step's. "none" is torch's own layer.
    The layers that `norm` made share their parameters with the network. Arguments as for `transformer`; torch's start.

    Raises StudyError for instance normalization, and for layers that are not normwise's.

    >>> lstm(lambda features, axis: nn.Identity(), (20, 3), 4)(torch.zeros(2, 20, 3)).shape
    torch.Size([2, 4])
    """
    steps, features = as_sequence(shape, tokens)
    reader = Reader(steps, features, tokens, width)
    return nn.Sequential(reader, Recurrent(norm, width), Head(width, outputs, pooled=tokens is None))


def as_sequence(shape: tuple[int, ...], tokens: int | None = None) -> tuple[int, int]:
    """Time steps and features of an example: images by row, flat square ones as well, others by number or token.

    Raises StudyError for tokens that do not stand in rows.

    >>> as_sequence((3, 8, 10)), as_sequence((64,)), as_sequence((13,)), as_sequence((32, 4))
    ((8, 30), (8, 8), (13, 1), (32, 4))
    """
    if tokens is not None:
        if len(shape) != 1:
            raise StudyError(f"tokens stand in rows, (examples, places), and these examples have shape {shape}")
        return shape[0], 1
    if len(shape) == 2:
        return shape
    if len(shape) == 3:
        return shape[1], shape[0] * shape[2]
    side = math.isqrt(math.prod(shape))
    return (side, side) if side * side == math.prod(shape) else (math.prod(shape), 1)


class Reader(nn.Module):
    """From examples to vectors at every time step, (n, t, width)."""

    def __init__(self, steps: int, features: int, tokens: int | None, width: int) -> None:
        super().__init__()
        self.steps, self.features = steps, features
        self.embed = nn.Linear(features, width) if tokens is None else nn.Embedding(tokens, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens are looked up; numbers are put in order of time, and mapped."""
        if isinstance(self.embed, nn.Linear):
            x = x.transpose(1, 2) if x.dim() == 4 else x  # (n, height, channels, width)
            x = x.reshape(len(x), self.steps, self.features)
        return self.embed(x)  # type: ignore[no-any-return]


class Positions(nn.Module):
    """A learned vector added at every place, at first normal with std 1, as torch starts an embedding."""

    def __init__(self, steps: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(steps, width))

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, width) to the same."""
        return x + self.vectors


class Attention(nn.Module):
    """Attention of several heads, each place to all, or to itself and those before it."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, width) to the same. In plain operations: torch's fused ones have no second derivative on a CPU."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """A function, the way around it, and the norm at its placement. See `transformer`."""

    def __init__(self, inner: nn.Module, norm: nn.Module, placement: AroundResidual) -> None:
        super().__init__()
        self.inner, self.norm, self.placement = inner, norm, placement

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, width) to the same."""
        if self.placement == "pre":
            return x + self.inner(self.norm(x))  # type: ignore[no-any-return]
        if self.placement == "post":
            return self.norm(x + self.inner(x))  # type: ignore[no-any-return]
        return x + self.norm(self.inner(x))  # type: ignore[no-any-return]


class ByPlace(nn.Module):
    """A norm that sees no example as a whole: every place is a row."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, width) to the same."""
        return self.norm(x.flatten(0, 1)).view_as(x)  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """`nw.LSTM` with what `norm` makes at its three places. See `lstm`."""

    def __init__(self, norm: NormFactory, width: int) -> None:
        super().__init__()
        places = {"ih_l0": 4 * width, "hh_l0": 4 * width, "cell_l0": width}
        made = {name: _within_a_place(norm(features, axis=-1), "lstm") for name, features in places.items()}
        self.lstm = LSTM(width, width, batch_first=True, norm=_by_step(made["cell_l0"]))
        for name, place in (self.lstm.norms or {}).items():
            layer, place = cast("Norm", made[name]), cast("Norm", place)
            layer.weight = place.weight
            layer.bias = layer.bias if place.bias is None else place.bias

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, width) to every step's hidden state, (n, t, width)."""
        return self.lstm(x)[0]  # type: ignore[no-any-return]


class Head(nn.Module):
    """The output layer: of the mean over time, (n, outputs), or of each place, (n, outputs, t)."""

    def __init__(self, width: int, outputs: int, *, pooled: bool) -> None:
        super().__init__()
        self.pooled, self.linear = pooled, nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """From (n, t, width); classes come second, where torch's cross-entropy expects them."""
        if self.pooled:
            return self.linear(x.mean(dim=1))  # type: ignore[no-any-return]
        return self.linear(x).transpose(1, 2)  # type: ignore[no-any-return]


def _within_a_place(layer: nn.Module, model: str) -> nn.Module:
    """The layer, unless it needs several places of an example."""
    if isinstance(layer, Norm) and layer.spec.text == _INSTANCE:
        raise StudyError(
            f"a {model} normalizes every place by itself, where instance normalization has one value a channel, and "
            "one value has no variance; use layer or group"
        )
    return layer


def _by_step(layer: nn.Module) -> NormSpec | None:
    """The declaration of a layer for time steps one after another; None for no normalization."""
    if isinstance(layer, nn.Identity):
        return None
    if not isinstance(layer, Norm):
        raise StudyError(f"model 'lstm' normalizes with normwise's own layers, not a {type(layer).__name__}")
    spec, memory = layer.spec, layer.spec.memory
    if isinstance(memory, Moving) and (TIME,) in spec.memory_over:
        memory = replace(memory, beyond={TIME: "last"})  # type: ignore[arg-type]  # as it is declared
    inner = spec.pattern.dims[-1][-1].name  # whose size differs from place to place
    sizes = tuple((name, size) for name, size in spec.sizes if name != inner)
    return replace(spec, text=_BY_STEP.get(spec.text, spec.text), memory=memory, sizes=sizes)
