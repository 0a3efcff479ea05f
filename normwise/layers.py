"""The catalogue: torch's layers, each a declaration of a few lines.

Every layer has torch's constructor order, defaults, attributes and `state_dict` keys, loads torch's checkpoints
strictly and gives its own back, and is an instance of torch's class, so that what others select by class finds it
(`swa_utils.update_bn`, FSDP's mixed precision, weight-decay filters, `convert_sync_batchnorm`).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from normwise.commit import Store
from normwise.errors import ShapeError
from normwise.kernels.reference import Use
from normwise.memory import Average, Degenerate, NonFinite
from normwise.named import Device, Named, Tracking, norm_options, torch_memory
from normwise.norm import Norm
from normwise.normalizers import RMS, Standardize
from normwise.plan import Plan
from normwise.pointwise import Activation, Gate
from normwise.recoveries import Affine, Recovery, Scale


class BatchNorm(Tracking, _BatchNorm):  # type: ignore[misc]  # eps is an attribute in torch, a property here
    r"""Batch normalization: `[n] c [...]`, for (n, c), (n, c, l), (n, c, h, w), (n, c, d, h, w) alike.

    .. math:: y = \gamma \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} + \beta

    with the mean and biased variance of each channel over the batch and all positions; in evaluation with moving ones:
    moving = (1 - momentum) * moving + momentum * batch, where the *unbiased* variance enters, as torch has it.

    Args:
        num_features: Channels, c.
        eps: Added to the variance.
        momentum: Weight of the new batch in the moving statistics; None: average of all batches.
        affine: Whether there are weight and bias, (c,) each.
        track_running_stats: Whether anything is remembered; if not, evaluation uses the batch's statistics.
        device, dtype: Of parameters; buffers are float32 at least.
        nonfinite: What becomes of a batch that is not finite: "skip", "raise" or "keep", as in `Moving`.
        degenerate: What becomes of a batch with one value a channel: "raise", or "memory" (as in evaluation).
        activation: Applied to the output in the same pass, as in `Norm`: "relu", "silu" or "gelu".
        gate: The function of a gate that every call brings, as in `Norm`: an activation's name, or "sigmoid".

    Differences from torch: one class for every rank; statistics are exact for large means and magnitudes; a batch with
    non-finite statistics does not enter the moving ones; an empty batch gives an empty output.

    Raises:
        TooFewSamplesError: in training, when a channel has one value.

    Source: Ioffe and Szegedy, arXiv:1502.03167.

    >>> norm = BatchNorm(3)
    >>> norm(torch.randn(8, 3, 4, 4)).mean((0, 2, 3)).abs().max().item() < 1e-6
    True
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        nonfinite: NonFinite = "skip",
        degenerate: Degenerate = "raise",
        activation: Activation | None = None,
        gate: Gate | None = None,
    ) -> None:
        memory = torch_memory(momentum, nonfinite, degenerate)
        policies = track_running_stats, memory
        self._declare("[n] c [...]", num_features, eps, affine, *policies, device, dtype, activation, gate)


class InstanceNorm(Tracking, _InstanceNorm):  # type: ignore[misc]  # eps is an attribute in torch, a property here
    r"""Instance normalization: `n c [...]`, for (n, c, l), (n, c, h, w), (n, c, d, h, w) alike.

    Each channel of each example is standardized by itself, with the biased variance over its positions. With
    `track_running_stats` the means over the batch of mean and unbiased variance are remembered, as torch has it.

    Args:
        num_features: Channels, c.
        eps: Added to the variance.
        momentum: Weight of the new batch in the moving statistics.
        affine: Whether there are weight and bias, (c,) each. Off by default, as in torch.
        track_running_stats: Whether anything is remembered. Off by default, as in torch.
        device, dtype: Of parameters; buffers are float32 at least.
        nonfinite: What becomes of a batch that is not finite: "skip", "raise" or "keep", as in `Moving`.
        degenerate: What becomes of a batch with one value a channel: "raise", or "memory" (as in evaluation).
        activation: Applied to the output in the same pass, as in `Norm`: "relu", "silu" or "gelu".
        gate: The function of a gate that every call brings, as in `Norm`: an activation's name, or "sigmoid".

    Differences from torch: one class for every rank, always with the batch axis (torch takes (c, h, w) for one example;
    here three dimensions are always (n, c, l)); the memory format is kept.

    Raises:
        TooFewSamplesError: when a channel of an example has one value.

    Source: Ulyanov, Vedaldi, Lempitsky, arXiv:1607.08022.

    >>> InstanceNorm(3)(torch.randn(2, 3, 5, 5)).shape
    torch.Size([2, 3, 5, 5])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        nonfinite: NonFinite = "skip",
        degenerate: Degenerate = "raise",
        activation: Activation | None = None,
        gate: Gate | None = None,
    ) -> None:
        memory = torch_memory(momentum, nonfinite, degenerate)
        policies = track_running_stats, memory
        self._declare("n c [...]", num_features, eps, affine, *policies, device, dtype, activation, gate)

    single_example_rank: int | None = None  # inputs of so many dimensions are one example; adopted layers take them

    def forward(self, input: Tensor, **options: Any) -> Any:  # noqa: A002 - torch's name
        """As any layer; a layer that stands for one of torch's takes a single example as well, as that does."""
        if self.single_example_rank is not None and input.dim() == self.single_example_rank and not options:
            return super().forward(input[None])[0]
        return super().forward(input, **options)

    def _use_of_memory(self, plan: Plan, mask: Tensor | None) -> Use | None:
        return super()._use_of_memory(plan, mask) if self.track_running_stats else None

    def _store(self) -> Store:
        # torch's InstanceNorm carries the counter and never moves it: nor do we, as long as nobody needs it
        store = super()._store()
        return store if isinstance(self.spec.memory, Average) else store._replace(batches=None)


class LayerNorm(Named, nn.LayerNorm):  # type: ignore[misc]  # eps is an attribute in torch, a property here
    r"""Layer normalization: `... [d]`, over the last dimension or dimensions.

    .. math:: y = \gamma \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} + \beta

    with the mean and biased variance of each example (or token) over its features.

    Args:
        normalized_shape: The last dimensions, an int or a sequence.
        eps: Added to the variance.
        elementwise_affine: Whether there are parameters, of `normalized_shape`.
        bias: Whether the parameters include a bias.
        device, dtype: Of the parameters.
        activation: Applied to the output in the same pass, as in `Norm`: "relu", "silu" or "gelu".
        gate: The function of a gate that every call brings, as in `Norm`: an activation's name, or "sigmoid".

    Differences from torch: right to float32's last digits for large means (torch loses 1e-3 at mean 1e4). The output is
    contiguous, as torch's is, where an example's features lie apart in memory, as in `x.permute(0, 2, 3, 1)` of
    images; otherwise the order of the axes in memory is kept, which torch loses.

    Source: Ba, Kiros, Hinton, arXiv:1607.06450.

    >>> LayerNorm(16)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    _shown = ("normalized_shape", "eps", "elementwise_affine")

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation | None = None,
        gate: Gate | None = None,
    ) -> None:
        shape, axes, sizes = _last_axes(normalized_shape)
        recovery = _affine(axes, elementwise_affine, bias)
        options = norm_options(sizes, activation, gate, device, dtype)
        Norm.__init__(self, f"... [{axes}]", Standardize(eps), recovery, **options)
        self.normalized_shape, self.elementwise_affine = shape, elementwise_affine


class RMSNorm(Named, nn.RMSNorm):
    r"""Root mean square normalization: `... [d]`, over the last dimension or dimensions.

    .. math:: y = \gamma \frac{x}{\sqrt{\mathrm{mean}(x^2) + \epsilon}}

    Args:
        normalized_shape: The last dimensions, an int or a sequence.
        eps: Added to the mean square; None: the machine epsilon of the input's dtype.
        elementwise_affine: Whether there is a weight, of `normalized_shape`.
        device, dtype: Of the weight.
        activation: Applied to the output in the same pass, as in `Norm`: "relu", "silu" or "gelu".
        gate: The function of a gate that every call brings, as in `Norm`: an activation's name, or "sigmoid".

    Source: Zhang and Sennrich, arXiv:1910.07467.

    >>> RMSNorm(16)(torch.randn(2, 5, 16)).square().mean(-1).allclose(torch.ones(2, 5))
    True
    """

    _shown = ("normalized_shape", "eps", "elementwise_affine")

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation | None = None,
        gate: Gate | None = None,
    ) -> None:
        shape, axes, sizes = _last_axes(normalized_shape)
        recovery = _affine(axes, elementwise_affine, bias=False)
        options = norm_options(sizes, activation, gate, device, dtype)
        Norm.__init__(self, f"... [{axes}]", RMS(eps), recovery, **options)
        self.normalized_shape, self.elementwise_affine = shape, elementwise_affine


class GroupNorm(Named, nn.GroupNorm):  # type: ignore[misc]  # eps is an attribute in torch, a property here
    r"""Group normalization: `n (g [k]) [...]`, over the channels of each group and all positions.

    Args:
        num_groups: Groups, g.
        num_channels: Channels, c = g k.
        eps: Added to the variance.
        affine: Whether there are weight and bias, (c,) each.
        device, dtype: Of the parameters.
        activation: Applied to the output in the same pass, as in `Norm`: "relu", "silu" or "gelu".
        gate: The function of a gate that every call brings, as in `Norm`: an activation's name, or "sigmoid".

    Raises:
        ShapeError: the channels cannot be split into so many groups.
        TooFewSamplesError: when a group has one value.

    Source: Wu and He, arXiv:1803.08494.

    >>> GroupNorm(2, 6)(torch.randn(4, 6, 5, 5)).shape
    torch.Size([4, 6, 5, 5])
    """

    _shown = ("num_groups", "num_channels", "eps", "affine")

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation | None = None,
        gate: Gate | None = None,
    ) -> None:
        if num_channels < 1:
            raise ShapeError(f"num_channels is a whole number from 1 on, not {num_channels}")
        if num_groups < 1 or num_channels % num_groups:
            raise ShapeError(
                f"{num_channels} channels cannot be split into {num_groups} groups; "
                f"group counts that work: {', '.join(str(g) for g in _divisors(num_channels))}"
            )
        sizes = {"g": num_groups, "k": num_channels // num_groups}
        recovery = Affine("(g k)") if affine else None
        options = norm_options(sizes, activation, gate, device, dtype)
        Norm.__init__(self, "n (g [k]) [...]", Standardize(eps), recovery, **options)
        self.num_groups, self.num_channels, self.affine = num_groups, num_channels, affine


class LayerNorm2d(Named, nn.LayerNorm):  # type: ignore[misc]  # eps is an attribute in torch, a property here
    r"""Layer normalization of channels-first tensors: `n [c] ...`, over the channels at each position.

    The same as `LayerNorm` with the channels moved last and back, as ConvNeXt does it.

    Args:
        num_channels: Channels, c.
        eps: Added to the variance.
        elementwise_affine: Whether there are parameters, (c,).
        bias: Whether the parameters include a bias.
        device, dtype: Of the parameters.
        activation: Applied to the output in the same pass, as in `Norm`: "relu", "silu" or "gelu".
        gate: The function of a gate that every call brings, as in `Norm`: an activation's name, or "sigmoid".

    Source: Ba, Kiros, Hinton, arXiv:1607.06450; over channels: Liu et al., arXiv:2201.03545.

    >>> LayerNorm2d(8)(torch.randn(2, 8, 5, 5)).mean(1).abs().max().item() < 1e-6
    True
    """

    _shown = ("normalized_shape", "eps", "elementwise_affine")

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation | None = None,
        gate: Gate | None = None,
    ) -> None:
        recovery = _affine("c", elementwise_affine, bias)
        options = norm_options({"c": num_channels}, activation, gate, device, dtype)
        Norm.__init__(self, "n [c] ...", Standardize(eps), recovery, **options)
        self.normalized_shape, self.elementwise_affine = (num_channels,), elementwise_affine


class RMSNorm2d(Named, nn.RMSNorm):
    r"""Root mean square normalization of channels-first tensors: `n [c] ...`, over the channels at each position.

    Args:
        num_channels: Channels, c.
        eps: Added to the mean square; None: the machine epsilon of the input's dtype.
        elementwise_affine: Whether there is a weight, (c,).
        device, dtype: Of the weight.
        activation: Applied to the output in the same pass, as in `Norm`: "relu", "silu" or "gelu".
        gate: The function of a gate that every call brings, as in `Norm`: an activation's name, or "sigmoid".

    Source: Zhang and Sennrich, arXiv:1910.07467.

    >>> RMSNorm2d(8)(torch.randn(2, 8, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """

    _shown = ("normalized_shape", "eps", "elementwise_affine")

    def __init__(
        self,
        num_channels: int,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation | None = None,
        gate: Gate | None = None,
    ) -> None:
        recovery = _affine("c", elementwise_affine, bias=False)
        options = norm_options({"c": num_channels}, activation, gate, device, dtype)
        Norm.__init__(self, "n [c] ...", RMS(eps), recovery, **options)
        self.normalized_shape, self.elementwise_affine = (num_channels,), elementwise_affine


def _affine(axes: str, elementwise_affine: bool, bias: bool) -> Recovery | None:
    if not elementwise_affine:
        return None
    return Affine(axes) if bias else Scale(axes)


def _last_axes(normalized_shape: int | Sequence[int]) -> tuple[tuple[int, ...], str, dict[str, int]]:
    """The shape as a tuple, names for its dimensions, and their sizes."""
    dims = normalized_shape if isinstance(normalized_shape, Sequence) else (normalized_shape,)
    shape = tuple(operator.index(size) for size in dims)
    names = ["d"] if len(shape) == 1 else [f"d{dim}" for dim in range(len(shape))]
    return shape, " ".join(names), dict(zip(names, shape, strict=True))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
