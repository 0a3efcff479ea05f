"""The columns that a normalization reads: how many samples they have, their means and variances, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normwise.batches import tensors_in
from normwise.plan import plan_for
from normwise.spec import NormSpec

_MASKS = ("valid", "lengths")


@dataclass(frozen=True, eq=False)
class Call:
    """What a normalization has read in one call, without a mask.

    Attributes:
        rows: Samples in a column.
        examples: The first dimension of the tensor.
        rank: How many dimensions the tensor has.
        mean, var: Of each column, flat, in float64; the biased variance.
    """

    rows: int
    examples: int
    rank: int
    mean: Tensor
    var: Tensor


@dataclass(frozen=True)
class Columns:
    """The calls of one normalization, over all batches."""

    calls: tuple[Call, ...]

    @property
    def rows(self) -> int:
        """The fewest samples a column."""
        return min(call.rows for call in self.calls)

    @property
    def alike(self) -> tuple[Call, ...]:
        """The calls with as many columns as the first, which alone can be joined."""
        return tuple(call for call in self.calls if call.mean.shape == self.calls[0].mean.shape)

    @property
    def within(self) -> Tensor:
        """The variance within a call, on average over the calls."""
        return torch.stack([call.var for call in self.alike]).mean(0)

    @property
    def between(self) -> Tensor:
        """The variance of the means from call to call."""
        means = torch.stack([call.mean for call in self.alike])
        return means.var(0) if len(means) > 1 else torch.zeros_like(means[0])

    def joined(self) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of all samples joined."""
        calls = self.alike
        shares = torch.tensor([float(call.rows) for call in calls], dtype=torch.float64, device=calls[0].mean.device)
        shares = (shares / shares.sum())[:, None]
        means, variances = torch.stack([c.mean for c in calls]), torch.stack([c.var for c in calls])
        mean = (shares * means).sum(0)
        return mean, (shares * (variances + (means - mean).square())).sum(0)


@contextmanager
def watched(layers: Mapping[str, tuple[nn.Module, NormSpec]]) -> Iterator[dict[str, list[Call]]]:
    """Within this context the calls of some normalizations are measured, by path."""
    found: dict[str, list[Call]] = {path: [] for path in layers}
    with ExitStack() as hooks:
        for path, (module, spec) in layers.items():
            if not isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
                note = partial(_note, found[path], spec)
                hooks.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        yield found


def _note(
    calls: list[Call], spec: NormSpec, module: nn.Module, args: tuple[Any, ...], keywords: Mapping[str, Any]
) -> None:
    x = next((t for t in tensors_in((args, keywords)) if t.is_floating_point()), None)
    if x is None or x.numel() == 0 or any(keywords.get(name) is not None for name in _MASKS):
        return
    plan = plan_for(spec.pattern, x.shape, spec.call_sizes)
    view = x.detach().reshape(plan.view).double()
    var, mean = torch.var_mean(view, plan.reduced, correction=0)
    calls.append(Call(plan.rows, x.shape[0], x.dim(), mean.flatten(), var.flatten()))
