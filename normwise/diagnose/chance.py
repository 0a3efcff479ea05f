"""The loss of the best constant prediction, against which a trained network's loss is seen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normwise.batches import Loss, target_of


def entropy(labels: Tensor) -> float:
    """The entropy of the labels' distribution, in nats.

    >>> round(entropy(torch.tensor([0, 1, 0, 1])), 6)
    0.693147
    """
    counts = torch.unique(labels, return_counts=True)[1].double()
    return float(torch.special.entr(counts / counts.sum()).sum())


def spread(targets: Tensor) -> float:
    """The variance of the targets, biased, its mean over the columns.

    >>> spread(torch.tensor([[1.0], [3.0]]))
    1.0
    """
    return float(targets.double().var(dim=0, correction=0).mean())


def chance_of(batches: Iterable[Any], loss: Loss | None) -> tuple[float, str] | None:
    """The loss of the best constant prediction and where it is from; None where the loss is not one of torch's two.

    That is the entropy of the labels in nats for cross-entropy, and for the mean squared error the variance of the
    targets, biased, its mean over the columns.

    >>> chance_of([(None, torch.tensor([[1.0], [3.0]]))], nn.MSELoss())
    (1.0, "targets' variance")
    """
    targets = [target_of(batch) for batch in batches]
    if not all(isinstance(target, Tensor) for target in targets):
        return None
    if _is(loss, F.mse_loss, nn.MSELoss):
        return spread(torch.cat(targets)), "targets' variance"
    if _is(loss, F.cross_entropy, nn.CrossEntropyLoss) and not any(t.is_floating_point() for t in targets):
        labels = torch.cat([target.reshape(-1) for target in targets])
        return entropy(labels[labels != getattr(loss, "ignore_index", -100)]), "labels' entropy"
    return None


def _is(loss: Loss | None, function: Loss, module: type[nn.Module]) -> bool:
    """Whether a loss is torch's own with its own settings, as a function or a module."""
    plain = getattr(loss, "reduction", "") == "mean" and getattr(loss, "weight", None) is None
    return loss is function or (type(loss) is module and plain and not getattr(loss, "label_smoothing", 0.0))
