"""What a call costs where the tensor is so small that only the way to the kernel counts: ours against torch's.

    python benchmarks/small_calls.py [calls]

Medians of so many calls, ours and torch's in turn, and the smallest median of seven rounds. OMP_NUM_THREADS=1 is the
steadier setting.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

import normwise as nw

ROUNDS = 7


class Added(nn.Module):
    """The norm of a sum, which is wanted as well: ours takes the residual, torch's is given the sum."""

    def __init__(self, norm: nn.Module, *, takes_residual: bool) -> None:
        super().__init__()
        self.norm, self.takes_residual = norm, takes_residual

    def forward(self, x: Tensor) -> Tensor:
        """(n, c) to (n, c)."""
        if self.takes_residual:
            output, _ = self.norm(x, residual=x)
        else:
            output = self.norm(x + x)
        return output


ROWS, IMAGES = (8, 64), (4, 8, 4, 4)
CASES: list[tuple[str, nn.Module, nn.Module, tuple[int, ...]]] = [
    ("LayerNorm", nw.LayerNorm(64), nn.LayerNorm(64), ROWS),
    (
        "residual, LayerNorm",
        Added(nw.LayerNorm(64), takes_residual=True),
        Added(nn.LayerNorm(64), takes_residual=False),
        ROWS,
    ),
    ("RMSNorm, LayerNorm", nw.RMSNorm(64), nn.LayerNorm(64), ROWS),
    ("GroupNorm, LayerNorm", nw.GroupNorm(4, 64), nn.LayerNorm(64), ROWS),
    ("GroupNorm", nw.GroupNorm(4, 64), nn.GroupNorm(4, 64), ROWS),
    ("LayerNorm2d, LayerNorm", nw.LayerNorm2d(8), nn.LayerNorm(IMAGES[1:]), IMAGES),
    ("InstanceNorm", nw.InstanceNorm(8), nn.InstanceNorm2d(8), IMAGES),
    ("BatchNorm, training", nw.BatchNorm(64), nn.BatchNorm1d(64), ROWS),
    ("BatchNorm 2d, training", nw.BatchNorm(8), nn.BatchNorm2d(8), IMAGES),
    ("BatchNorm, evaluation", nw.BatchNorm(64).eval(), nn.BatchNorm1d(64).eval(), ROWS),
    ("BatchNorm 2d, evaluation", nw.BatchNorm(8).eval(), nn.BatchNorm2d(8).eval(), IMAGES),
]


def forward(layer: nn.Module, x: Tensor, cotangent: Tensor) -> None:
    """A call whose graph is recorded."""
    layer(x)


def both(layer: nn.Module, x: Tensor, cotangent: Tensor) -> None:
    """A call and its backward."""
    layer(x).backward(cotangent)


def microseconds(run: Callable[[], None], calls: int) -> float:
    """The median of so many calls."""
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return median(times) * 1e6


def compared(ours: nn.Module, theirs: nn.Module, shape: tuple[int, ...], way: Callable[..., None], calls: int) -> str:
    """Ours, theirs, and the ratio."""
    x = torch.randn(shape, requires_grad=True)
    cotangent = torch.randn(shape)
    runs: list[Callable[[], None]] = [lambda: way(ours, x, cotangent), lambda: way(theirs, x, cotangent)]
    rounds = [[microseconds(run, calls) for run in runs] for _ in range(ROUNDS)]
    a, b = (min(times) for times in zip(*rounds, strict=True))
    return f"{a:6.1f} {b:6.1f} {a / b:6.2f}"


def main() -> None:
    """One line for each case."""
    calls = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    print(f"{'µs a call':<26}{'ours':>6} {'torch':>6} {'ratio':>6}   forward and backward")
    for name, ours, theirs, shape in CASES:
        parts = [compared(ours, theirs, shape, way, calls) for way in (forward, both)]
        print(f"{name:<26}{'   '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
