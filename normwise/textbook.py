"""The lecture's functions: the four steps written out on matrices, with the lecture's arguments and conventions.

For a network use `normwise.BatchNorm`; these are for reading, for exercises, and for checking derivations by hand.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normwise.errors import ShapeError, TooFewSamplesError
from normwise.kernels.reference import wide_dtype
from normwise.normalizers import Standardize


def batch_norm(
    X: Tensor,  # noqa: N803 - the lecture's letter
    gamma: Tensor,
    beta: Tensor,
    moving_mean: Tensor,
    moving_var: Tensor,
    eps: float,
    momentum: float,
    training: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Batch normalization as a function: returns `(Y, moving_mean, moving_var)` and changes nothing in place.

    .. math:: Y = \gamma \frac{X - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} + \beta

    and moving = momentum * moving + (1 - momentum) * batch: `momentum` weighs the *old* value (torch's weighs the new).
    The batch variance is biased, and it is the biased one that enters the moving variance (torch's is unbiased).

    Args:
        X: (n, p): statistics over rows, for each feature; (n, c, h, w): over n, h, w, for each channel.
        gamma: Scale, p or c elements in any shape.
        beta: Shift, likewise.
        moving_mean: p or c elements.
        moving_var: Likewise.
        eps: Added to the variance.
        momentum: Weight of the old moving value, between 0 and 1.
        training: Whether to use this batch's statistics. None: prediction mode is "gradients are disabled", that is
            `training = torch.is_grad_enabled()`.

    Returns:
        Y in X's shape and dtype; the moving statistics, detached: for (n, p) in the shape they came in, for
        (n, c, h, w) as (1, c, 1, 1). In prediction they come back as they were.

    Warning:
        The rule behind `training=None` is wrong whenever gradients and training are not the same thing: the training
        loss measured under `no_grad` uses moving statistics, and a frozen network that is differentiated with respect
        to its input, or evaluated without `no_grad`, uses and updates batch statistics. Say `training=` then.

    Raises:
        ShapeError: X has another rank than 2 or 4, or a parameter another number of elements.
        ValueError: momentum is outside of [0, 1].
        TooFewSamplesError: in training, one value a column.

    >>> X = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    >>> zero, one = torch.zeros(2), torch.ones(2)
    >>> Y, mean, var = batch_norm(X, one, zero, zero, one, eps=0.0, momentum=0.9, training=True)
    >>> Y
    tensor([[-1., -1.],
            [ 1.,  1.]])
    >>> mean, var
    (tensor([0.2000, 0.4000]), tensor([1.0000, 1.3000]))

    Source: Ioffe and Szegedy, arXiv:1502.03167; Zhang et al., "Dive into Deep Learning", chapter 8.5.
    """
    if X.dim() not in (2, 4):
        raise ShapeError(f"X is (n, p) or (n, c, h, w), not of {X.dim()} dimensions: shape {tuple(X.shape)}")
    columns = X.shape[1]
    kept = (1, columns, 1, 1)
    for name, value in {"gamma": gamma, "beta": beta, "moving_mean": moving_mean, "moving_var": moving_var}.items():
        if value.numel() != columns:
            raise ShapeError(f"{name} has {value.numel()} elements, X has {columns} columns: shape {tuple(X.shape)}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum is a weight between 0 and 1, not {momentum}")
    training = torch.is_grad_enabled() if training is None else training
    mean, var = moving_mean.detach(), moving_var.detach()
    wide = wide_dtype(X)

    # Reshape: X' is n x p, or (n h w) x c.
    matrix = X.to(wide).movedim(1, -1).reshape(-1, columns)
    # Normalize, with this batch's statistics or the moving ones.
    if training:
        if matrix.shape[0] < 2:
            raise TooFewSamplesError(f"one sample has no variance: X of shape {tuple(X.shape)} in training")
        normalized, _, moments = Standardize(eps).normalize(matrix, (0,), X.dtype)
        mean = momentum * mean + (1 - momentum) * moments.mean.to(mean.dtype).reshape(mean.shape)
        var = momentum * var + (1 - momentum) * moments.variance().reshape(var.shape)
    else:
        remembered = (mean.to(wide).reshape(1, columns), var.to(wide).reshape(1, columns))
        normalized = Standardize(eps).recall(remembered, X.dtype).values(matrix)
    # Recover.
    recovered = gamma.reshape(columns) * normalized + beta.reshape(columns)
    # Output, in X's shape.
    by_channel = (X.shape[0], *X.shape[2:], columns)
    Y = recovered.reshape(by_channel).movedim(-1, 1).to(X.dtype)  # noqa: N806 - the lecture's letter
    return (Y, mean.reshape(kept), var.reshape(kept)) if X.dim() == 4 else (Y, mean, var)


def layer_norm(X: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:  # noqa: N803 - the lecture's letter
    r"""Layer normalization as a function: every example is one column, and normalized by itself.

    .. math:: Y = \gamma \frac{X - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}} + \beta

    with the mean and biased variance of each whole example. There is nothing to remember, so training and prediction
    are the same.

    Args:
        X: (n, p), or (n, c, h, w) or any other rank from 2 on: examples first.
        gamma: Scale: one element for each of the example's p (or c h w), or what broadcasts against one example.
        beta: Shift, likewise.
        eps: Added to the variance.

    Returns:
        Y in X's shape and dtype.

    Raises:
        ShapeError: X has fewer than 2 dimensions, or a parameter does not fit an example.

    >>> layer_norm(torch.tensor([[1.0, 3.0], [2.0, 6.0]]), torch.ones(2), torch.zeros(2), eps=0.0)
    tensor([[-1.,  1.],
            [-1.,  1.]])

    Source: Ba, Kiros, Hinton, arXiv:1607.06450.
    """
    if X.dim() < 2:
        raise ShapeError(f"X has the examples first and at least one more dimension: shape {tuple(X.shape)}")
    example = X.shape[1:]
    wide = wide_dtype(X)

    # Reshape: X' is p x n, or (c h w) x n: each example is a column.
    matrix = X.to(wide).reshape(X.shape[0], math.prod(example)).T
    # Normalize.
    normalized = Standardize(eps).normalize(matrix, (0,), X.dtype).values if X.numel() else matrix
    # Recover.
    recovered = _column("gamma", gamma, example) * normalized + _column("beta", beta, example)
    # Output, in X's shape.
    return recovered.T.reshape(X.shape).to(X.dtype)


def _column(name: str, parameter: Tensor, example: torch.Size) -> Tensor:
    """A parameter as a column that multiplies each example."""
    rows = math.prod(example)
    if parameter.numel() != rows:
        trailing = parameter.reshape(parameter.shape[1:]) if parameter.dim() == len(example) + 1 else parameter
        try:
            parameter = trailing.broadcast_to(example)
        except RuntimeError:
            shapes = f"shape {tuple(parameter.shape)} does not fit an example of shape {tuple(example)}"
            raise ShapeError(f"{name} of {shapes}: give {rows} elements, or what broadcasts") from None
    return parameter.reshape(rows, 1)
