"""Statistics for more or fewer places of an axis than are remembered: a longer sequence than any in training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normwise.errors import ShapeError
from normwise.memory import Beyond
from normwise.transforms import being_traced


def stretched(
    statistics: Sequence[Tensor],
    names: Sequence[str],
    batches: Tensor | None,
    dim: int,
    axis: str,
    length: int,
    beyond: Beyond,
    used: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Remembered statistics for the first `length` places of an axis.

    Places that no batch has entered, and those past the end, have those of the last place before them that one has
    entered ("last"), or of all such places joined ("pooled"), or are refused ("raise").

    Args:
        statistics: Remembered, with the axis at dimension `dim`.
        names: What they are: "mean", "var", "mean_square".
        batches: How many batches entered each place; None, or all 0: every place counts as entered.
        dim: See `statistics`.
        axis: The axis' name, for the error.
        length: Of the input.
        beyond: The policy.
        used: Which of the first `length` places the input has anything at; None: all.

    Raises:
        ShapeError: nothing is remembered, or the policy is "raise" and a place was never entered.
    """
    known = statistics[0].shape[dim]
    if length == 0:
        return tuple(statistic.narrow(dim, 0, 0) for statistic in statistics)
    device = statistics[0].device
    if known == 0:
        raise ShapeError(f"nothing is remembered along axis '{axis}' yet: train, or load a checkpoint")
    entered = torch.ones(known, dtype=torch.bool, device=device) if batches is None else batches.reshape(-1) > 0
    entered = entered | ~entered.any()
    if beyond == "raise":
        _refuse(entered, axis, length, used)
    places = torch.arange(length, device=device).clamp_max(known - 1)
    if beyond != "pooled":
        here = torch.arange(known, device=device)
        order = entered.cumsum(0) - 1  # ONNX has no running maximum, so the entered places are listed
        listed = here.new_zeros(known + 1).scatter(0, torch.where(entered, order, known), here)
        last = listed[order.clamp_min(0)]
        return tuple(statistic.index_select(dim, last[places]) for statistic in statistics)
    taken = [statistic.index_select(dim, places) for statistic in statistics]
    column = [length if d == dim else 1 for d in range(statistics[0].dim())]
    seen = (entered[places] & (torch.arange(length, device=device) < known)).reshape(column)
    pooled = _pooled(statistics, names, entered, dim)
    return tuple(torch.where(seen, own, joined) for own, joined in zip(taken, pooled, strict=True))


def _refuse(entered: Tensor, axis: str, length: int, used: Tensor | None) -> None:
    """Refuse an input that has something at a place that no batch has entered."""
    known = entered.shape[0]
    way_out = f"and beyond={{'{axis}': 'raise'}} allows none; 'last' and 'pooled' do"
    if used is None and length > known:
        raise ShapeError(f"axis '{axis}' has {length} places, {known} are remembered, {way_out}")
    missing = torch.cat([~entered, entered.new_ones(max(length - known, 0))])[:length]
    missing = missing if used is None else missing & used
    message = f"axis '{axis}' has places within the first {length} that no batch has entered, {way_out}"
    if being_traced():
        torch._assert_async(~missing.any(), message)
    elif missing.any():
        raise ShapeError(message)


def _pooled(statistics: Sequence[Tensor], names: Sequence[str], entered: Tensor, dim: int) -> list[Tensor]:
    """The statistics of all entered places joined, each with equal weight; a variance includes that of the means."""
    column = [-1 if d == dim else 1 for d in range(statistics[0].dim())]
    weights = entered.to(statistics[0].dtype).reshape(column)
    total = weights.sum()

    def average(x: Tensor) -> Tensor:
        return (x * weights).sum(dim, keepdim=True) / total

    means = {name: average(statistic) for name, statistic in zip(names, statistics, strict=True)}
    if "var" in means and "mean" in means:
        means["var"] = means["var"] + average((statistics[names.index("mean")] - means["mean"]).square())
    return [means[name] for name in names]
