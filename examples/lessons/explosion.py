"""Without normalization the activations of a residual network explode with depth; with it they grow by a sum.

Each block adds a branch to the stream. Without normalization a branch, from He's start, is about as large as its input,
so the variance doubles with every block: a million times after twenty. With a normalization at its entrance every
branch has the same variance, whatever has gathered before it, and twenty of them add up.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import geometric_mean

import torch
from torch import Tensor, nn

import normwise as nw
from normwise.lessons import Chart, Check, Lesson, Size, about, tell

NORMS = {"none": nn.Identity, "batch": nw.BatchNorm, "layer": nw.LayerNorm}
BLOCKS, WIDTH, ROWS, SEEDS = 20, 64, 256, {"small": 3, "full": 20}


class Block(nn.Module):
    """x + linear(relu(norm(x))), the linear layer from He's normal distribution."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm, self.linear = norm(WIDTH), nn.Linear(WIDTH, WIDTH)
        nn.init.kaiming_normal_(self.linear.weight, nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The stream behind this block."""
        return x + self.linear(self.norm(x).relu())


def variances(norm: Callable[[int], nn.Module], seed: int) -> list[float]:
    """The variance of the stream behind each block, for inputs of variance 1."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(Block(norm) for _ in range(BLOCKS)))
    found = nw.activations(model, torch.randn(ROWS, WIDTH), layers=[str(block) for block in range(BLOCKS)])
    return [row.rms**2 - row.mean**2 for row in found.calls if row.layer == "Block"]


def measure(size: Size) -> Lesson:
    """The variance of the residual stream by depth, with each normalization."""
    depths, series = list(range(1, BLOCKS + 1)), {}
    for name, norm in NORMS.items():
        by_seed = [variances(norm, seed) for seed in range(SEEDS[size])]
        series[name] = depths, [geometric_mean(found) for found in zip(*by_seed, strict=True)]
    table = [
        {"norm": n, **{f"block {b}": found[b - 1] for b in (1, 5, 10, BLOCKS)}} for n, (_, found) in series.items()
    ]
    ends = {name: found[-1] for name, (_, found) in series.items()}
    why = "2 to the 20 is 1e6; a product of twenty factors differs between starts"
    return Lesson(
        name="explosion",
        claim="Without normalization the activations of a residual network explode with depth; with it they do not.",
        setting=f"{BLOCKS} blocks x + linear(relu(norm(x))), width {WIDTH}, He's start, {ROWS} rows of variance 1, "
        f"training mode, geometric mean of {SEEDS[size]} seeds",
        table=tuple(table),
        checks=(
            about("variance without norm", ends["none"], 3e6, 10, why),
            about("variance with batch norm", ends["batch"], 25, 2, "a sum of twenty terms of variance 1"),
            about("variance with layer norm", ends["layer"], 25, 2, "a sum of twenty terms of variance 1"),
            Check(
                "variance without norm, block 20 / block 10", ends["none"] / series["none"][1][9], 100, why="2 a block"
            ),
        ),
        chart=Chart("Variance of the residual stream", "block", "variance", series, log="y"),
        size=size,
    )


if __name__ == "__main__":
    tell(measure)
