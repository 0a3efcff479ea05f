"""The built-in networks of tables and images: mlp, cnn, resnet.

A network is made by a function of `norm`, which makes each normalization layer as `norm(features)`.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from normwise.errors import StudyError
from normwise.tuning.axes import known
from normwise.tuning.norms import NormFactory
from normwise.tuning.starts import restart

AroundActivation = Literal["before", "after"]
AroundResidual = Literal["pre", "post", "inside"]

AROUND_ACTIVATION = ("before", "after")
AROUND_RESIDUAL = ("pre", "post", "inside")
_LARGE = 16  # an image of this height or more is halved by a resnet's first convolution


def mlp(
    norm: NormFactory,
    inputs: int = 64,
    outputs: int = 10,
    width: int = 64,
    depth: int = 6,
    placement: AroundActivation = "before",
) -> nn.Module:
    """A deep multilayer perceptron: depth - 1 hidden blocks of Linear -> norm -> ReLU, and an output layer.

    `placement` is that of the norm, before or after the ReLU. Weights from He's normal distribution (std
    sqrt(2 / fan in), arXiv:1502.01852), zero biases.

    Raises StudyError for an unknown placement.

    >>> sum(p.numel() for p in mlp(lambda features: nn.Identity()).parameters())
    21450
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in in (inputs, *[width] * (depth - 2)):
        layers += _activated(nn.Linear(fan_in, width), norm(width), placement)
    return restart(nn.Sequential(*layers, nn.Linear(width, outputs)), "he")


def cnn(
    norm: NormFactory,
    shape: tuple[int, ...] = (64,),
    outputs: int = 10,
    placement: AroundActivation = "before",
) -> nn.Module:
    """A small convolutional network: four blocks of 3x3 convolution -> norm -> ReLU, global average, output layer.

    The second and the fourth convolution halve the image. `shape` is that of one example, (channels, height, width), or
    the number of pixels of a square image of one channel. Placement and start as for `mlp`.

    Raises StudyError for a shape that is no image's, and for an unknown placement.

    >>> cnn(lambda features: nn.Identity())(torch.zeros(2, 64)).shape
    torch.Size([2, 10])
    """
    channels, height, width = image("cnn", shape)
    layers: list[nn.Module] = [nn.Flatten(), nn.Unflatten(1, (channels, height, width))]
    for fan_in, fan_out, stride in ((channels, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2)):
        layers += _activated(nn.Conv2d(fan_in, fan_out, 3, stride, padding=1), norm(fan_out), placement)
    return restart(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, outputs)), "he")


def resnet(
    norm: NormFactory,
    shape: tuple[int, ...] = (64,),
    outputs: int = 10,
    width: int = 8,
    placement: AroundResidual = "inside",
) -> nn.Module:
    """A small residual network: a 3x3 convolution, three stages of two of ResNet-18's basic blocks, an output layer.

    The stages have `width`, 2 `width` and 4 `width` channels; the second and the third halve the image, and so does the
    first convolution from a height of 16 on. `shape` as for `cnn`; He's start. With f two convolutions that have a norm
    and a ReLU between them, a block is, by placement:

    ======== ============================== ===============================================
    inside   ReLU(x + norm(f(x)))           ResNet (He et al., arXiv:1512.03385)
    pre      x + f(ReLU(norm(x)))           pre-activation (He et al., arXiv:1603.05027)
    post     ReLU(norm(x + f(x)))           normalized after the addition
    ======== ============================== ===============================================

    Raises StudyError for a shape that is no image's, and for an unknown placement.

    >>> resnet(lambda features: nn.Identity(), (1, 28, 28))(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    known("placement", placement, AROUND_RESIDUAL)
    channels, height, side = image("resnet", shape)
    stem = nn.Conv2d(channels, width, 3, 2 if height >= _LARGE else 1, padding=1)
    widths = (width, width, width, 2 * width, 2 * width, 4 * width, 4 * width)
    blocks = [BasicBlock(norm, fan_in, fan_out, placement) for fan_in, fan_out in pairwise(widths)]
    ends: list[nn.Module] = [norm(4 * width if placement == "pre" else width), nn.ReLU()]
    body = [*blocks, *ends] if placement == "pre" else [*ends, *blocks]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, outputs))
    return restart(nn.Sequential(nn.Flatten(), nn.Unflatten(1, (channels, height, side)), stem, *body, *head), "he")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the way around them; where the channels grow, the image is halved. See `resnet`."""

    def __init__(self, norm: NormFactory, fan_in: int, fan_out: int, placement: AroundResidual) -> None:
        super().__init__()
        stride = 1 if fan_in == fan_out else 2
        first: list[nn.Module] = [norm(fan_in), nn.ReLU()] if placement == "pre" else []
        last: list[nn.Module] = [norm(fan_out)] if placement == "inside" else []
        middle = [
            nn.Conv2d(fan_in, fan_out, 3, stride, padding=1),
            norm(fan_out),
            nn.ReLU(),
            nn.Conv2d(fan_out, fan_out, 3, padding=1),
        ]
        self.branch = nn.Sequential(*first, *middle, *last)
        self.around = nn.Identity() if stride == 1 else nn.Conv2d(fan_in, fan_out, 1, stride)
        after: list[nn.Module] = [] if placement == "pre" else [nn.ReLU()]
        self.after = nn.Sequential(*([norm(fan_out)] if placement == "post" else []), *after)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) to the same, or to half the height and width."""
        return self.after(self.around(x) + self.branch(x))  # type: ignore[no-any-return]


def image(model: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Channels, height and width of an example of this shape.

    Raises StudyError that names the model for a shape that is no image's.

    >>> image("cnn", (64,))
    (1, 8, 8)
    """
    if len(shape) == 3:
        return shape
    side = math.isqrt(math.prod(shape))
    if len(shape) != 1 or side * side != shape[0]:
        raise StudyError(
            f"model {model!r} needs images, (channels, height, width) or a square number of pixels, not {shape}"
        )
    return 1, side, side


def _activated(layer: nn.Module, norm: nn.Module, placement: str) -> list[nn.Module]:
    known("placement", placement, AROUND_ACTIVATION)
    return [layer, norm, nn.ReLU()] if placement == "before" else [layer, nn.ReLU(), norm]
