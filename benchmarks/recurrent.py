"""How long forward and backward of a layer-normalized LSTM take, beside the loops that people write.

The loops go over `torch` modules step by step: two `nn.Linear` and three `nn.LayerNorm` (what `nw.LSTM` computes), or
`nn.LSTMCell` and one `nn.LayerNorm` on the hidden state (less than that). All take turns, so that what else the machine
does meets all of them; printed are medians in milliseconds. First the net is checked against the loop in float64.

    python benchmarks/recurrent.py
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from torch import Tensor, nn

import normwise as nw

STEPS = 64
SIZES = ((128, 16), (256, 32), (512, 64))  # hidden and input, batch


class ThreeNorms(nn.Module):
    """The loop with layer norm at the three places."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.of_input, self.of_hidden = nn.Linear(size, 4 * size), nn.Linear(size, 4 * size, bias=False)
        self.input_norm, self.hidden_norm = nn.LayerNorm(4 * size), nn.LayerNorm(4 * size)
        self.cell_norm = nn.LayerNorm(size)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """From (t, n, input) to all hidden states, and the last state."""
        h = c = x.new_zeros(x.shape[1], self.size)
        outputs = []
        for x_t in x:
            gates = self.input_norm(self.of_input(x_t)) + self.hidden_norm(self.of_hidden(h))
            i, f, g, o = gates.chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * self.cell_norm(c).tanh()
            outputs.append(h)
        return torch.stack(outputs), (h, c)


class OneNorm(nn.Module):
    """The loop with layer norm on the hidden state."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.cell, self.norm = nn.LSTMCell(size, size), nn.LayerNorm(size)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """From (t, n, input) to all hidden states, and the last state."""
        h = c = x.new_zeros(x.shape[1], self.size)
        outputs = []
        for x_t in x:
            h, c = self.cell(x_t, (h, c))
            h = self.norm(h)
            outputs.append(h)
        return torch.stack(outputs), (h, c)


def models(size: int) -> dict[str, nn.Module]:
    """What is compared."""
    layer = nw.Norm("... [c]", recovery=nw.Affine("c"))
    per_step = nw.Norm("[n] t c", recovery=nw.Affine("c"), memory=nw.Moving("t c", decay=0.9, beyond={"t": "last"}))
    return {
        "nw.LSTM, layer norm": nw.LSTM(size, size, norm=layer),
        "loop, three LayerNorm": ThreeNorms(size),
        "loop, LSTMCell + one": OneNorm(size),
        "nw.LSTM, batch norm": nw.LSTM(size, size, norm=per_step),
        "nn.LSTM, no norm": nn.LSTM(size, size),
    }


@torch.no_grad()
def same_parameters(lstm: nn.LSTM, loop: ThreeNorms) -> None:
    """Give the loop the net's parameters."""
    loop.of_input.weight.copy_(lstm.weight_ih_l0)
    loop.of_hidden.weight.copy_(lstm.weight_hh_l0)
    loop.of_input.bias.zero_()
    loop.input_norm.bias.copy_(lstm.bias_ih_l0)
    loop.hidden_norm.bias.copy_(lstm.bias_hh_l0)


def results(model: nn.Module, weight: Tensor, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Outputs, and the gradients of the input and of the weight of the hidden state."""
    leaf = x.clone().requires_grad_()
    output = model(leaf)[0]
    return [output, *torch.autograd.grad(output, (leaf, weight), cotangent)]


def check(lstm: nn.LSTM, loop: ThreeNorms, x: Tensor, cotangent: Tensor) -> None:
    """Refuse to time a net that is not the loop: 8 steps, after which float32 is still within 1e-4 of float64."""
    same_parameters(lstm, loop)
    wide = copy.deepcopy(loop).double()
    exact = results(wide, wide.of_hidden.weight, x[:8].double(), cotangent[:8].double())
    for found, wanted in zip(results(lstm, lstm.weight_hh_l0, x[:8], cotangent[:8]), exact, strict=True):
        error = ((found - wanted).abs().max() / wanted.abs().max()).item()
        if not error < 1e-4:
            raise SystemExit(f"nw.LSTM is off by {error:.1e} of the largest value: nothing is timed")


def milliseconds(model: nn.Module, x: Tensor, cotangent: Tensor) -> float:
    """One forward and backward."""
    start = time.perf_counter()
    model(x)[0].backward(cotangent)
    took = time.perf_counter() - start
    model.zero_grad()
    return 1000 * took


def main() -> None:
    """Measure every size, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    columns = {}
    for size, batch in SIZES:
        x, cotangent = torch.randn(STEPS, batch, size), torch.randn(STEPS, batch, size)
        compared = models(size)
        check(compared["nw.LSTM, layer norm"], compared["loop, three LayerNorm"], x, cotangent)
        rounds = [[milliseconds(m, x, cotangent) for m in compared.values()] for _ in range(options.rounds + 1)]
        columns[f"{size}, batch {batch}"] = [statistics.median(times) for times in zip(*rounds[1:], strict=True)]
    print(f"{f'hidden, {STEPS} steps':24}" + "".join(f"{head:>16}" for head in columns))
    for at, name in enumerate(compared):
        print(f"{name:24}" + "".join(f"{column[at]:16.1f}" for column in columns.values()))


if __name__ == "__main__":
    main()
