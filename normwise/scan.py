"""A normalization place by place along an axis, as a recurrent net computes its input: one commit for all places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from normwise.kernels.closed_form import run
from normwise.kernels.reference import Recalled, Steps, placed, wide_dtype
from normwise.moments import Moments
from normwise.norm import Norm
from normwise.plan import Plan, plan_for
from normwise.spec import check_samples


class Scan:
    """Calls a layer on one place of an axis after another; `close` lets all of them enter its memory as one batch.

    The result at each place, and the memory at the end, are those of one call with all places, for a pattern that
    keeps the axis. A pattern without the axis (layer normalization) is called on each place by itself.

    Args:
        norm: The layer.
        axis: The axis's name, a dimension of its own in the pattern if it is there.
        shape: Of the input with all places, as the pattern names it: (n, t, c).
        like: A tensor with the input's dtype and device, whose values tell this batch from others.
        alive: Which examples count at which place, (n, t); None: all do.
    """

    def __init__(
        self, norm: Norm, axis: str, shape: tuple[int, ...], like: Tensor, alive: Tensor | None = None
    ) -> None:
        spec = norm.spec
        dims = [axes[0].name for axes in spec.pattern.dims]
        self._norm, self._alive = norm, alive
        self._dim = dims.index(axis) if axis in dims else None
        self._measured: dict[int, Moments] = {}
        if self._dim is None:
            return
        sizes = tuple(pair for pair in spec.call_sizes if pair[0] != axis)
        one = tuple(1 if dim == self._dim else size for dim, size in enumerate(shape))
        self._plan, self._one = (
            plan_for(spec.pattern, torch.Size(shape), sizes),
            plan_for(spec.pattern, torch.Size(one), sizes),
        )
        mask = None if alive is None else self._mask(alive, self._plan)
        use = norm._use_of_memory(self._plan, mask)
        if use != "instead" and spec.normalizer.needs_two:
            check_samples(spec.pattern, self._one, remembers=spec.memory is not None)
        if spec.unknown:
            norm._materialize_for(self._plan)
        self._commits = norm._commits()
        if self._commits:
            norm._grow(self._plan)
        self._steps = Steps(self._one, norm.spec.normalizer, norm.spec.recovery)
        self._parameters = placed(
            norm.spec.recovery, norm._parameters_of_recovery(), norm.spec.parameter_over, self._one, like
        )
        self._recalled: Recalled | None = None
        if use is not None:
            wide = wide_dtype(like)
            total = like.detach().to(wide).sum().expand(norm._memory_shape())
            self._recalled = norm._recalled(use, self._plan, wide, lambda: norm._within(total))

    def __call__(self, place: int, x: Tensor) -> Tensor:
        """Normalize the input at one place: (n, c)."""
        if self._dim is None:
            output: Tensor = self._norm(x, valid=None if self._alive is None else self._alive[:, place])
            return output
        mask = None if self._alive is None else self._mask(self._alive[:, place : place + 1], self._one)
        steps = self._steps._replace(valid=mask, recalled=self._recalled_at(place))
        result = run(x.unsqueeze(self._dim), steps, self._parameters)
        if result.moments is not None and self._commits:
            self._measured[place] = result.moments
        return result.output.squeeze(self._dim)

    def close(self) -> None:
        """Let what was measured enter the memory."""
        if not self._measured:
            return
        parts = [self._measured[place] for place in sorted(self._measured)]

        def along(pieces: Sequence[Tensor | int]) -> Tensor:
            return torch.cat([torch.as_tensor(piece) for piece in pieces], cast("int", self._dim))

        count = along([part.count for part in parts]) if isinstance(parts[0].count, Tensor) else parts[0].count
        mean, m2 = along([part.mean for part in parts]), along([part.m2 for part in parts])
        self._norm._commit(self._plan, Moments(count, mean, m2))

    def _mask(self, alive: Tensor, plan: Plan) -> Tensor:
        return alive.reshape([*alive.shape, *([1] * (len(plan.view) - alive.dim()))])

    def _recalled_at(self, place: int) -> Recalled | None:
        recalled, dim = self._recalled, self._dim
        if recalled is None or dim is None:
            return recalled
        at = tuple(s.narrow(dim, place, 1) if s.shape[dim] != 1 else s for s in recalled.statistics)
        return recalled._replace(statistics=at)
