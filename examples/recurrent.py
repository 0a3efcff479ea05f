"""Four LSTMs learn to write Python, character by character: plain, with layer norm, with batch norm per step or shared.

What to look for in the tables (bits per character, on text that was not trained on; less is better):

- By position: every network starts with an empty state, so the first characters of a sequence are the hardest. Batch
  norm per step keeps statistics of its own for that start; shared statistics are those of an average step.
- By length: training saw 50 characters. Layer norm does not know how long a sequence is. Batch norm per step has no
  statistics beyond the 50th step, and uses those of the last one (`beyond={"t": "last"}`).
- Remembered: what a network must keep beside its parameters. Per step it grows with the length of the sequences.

The text is the source of Python's own library, as it is installed; nothing is downloaded. Under a minute on two cores:

    python examples/recurrent.py
    python examples/recurrent.py --steps 2000 --seed 1
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normwise as nw

LENGTH = 50  # characters of a training sequence
LENGTHS = (50, 100, 200)
BATCH, HIDDEN, SYMBOLS = 32, 64, 128  # every ASCII character is a symbol

NORMS = {
    "none": None,
    "layer": nw.Norm("... [c]", recovery=nw.Affine("c")),
    "batch, per step": nw.Norm(
        "[n] t c", recovery=nw.Affine("c"), memory=nw.Moving("t c", decay=0.9, beyond={"t": "last"})
    ),
    "batch, shared": nw.Norm("[n] t c", recovery=nw.Affine("c"), memory=nw.Moving("c", decay=0.9)),
}


class Writer(nn.Module):
    """Reads characters and says, after each, how likely every character is to come next."""

    def __init__(self, norm: nw.Norm | None) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, 32)
        self.lstm = nw.LSTM(32, HIDDEN, batch_first=True, norm=norm)
        self.predict = nn.Linear(HIDDEN, SYMBOLS)

    def forward(self, text: Tensor) -> Tensor:
        """From characters (n, t) to scores (n, t, symbols)."""
        return self.predict(self.lstm(self.embed(text))[0])


def library_text() -> Tensor:
    """The source of a package of the standard library, as the numbers of its characters."""
    files = sorted(Path(asyncio.__file__).parent.glob("*.py"))
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    return torch.tensor(list(text.encode("ascii", "replace")))


def sequences(text: Tensor, count: int, length: int) -> Tensor:
    """Pieces from random places, each with one character more: what comes next is the target."""
    starts = torch.randint(len(text) - length, (count, 1))
    return text[starts + torch.arange(length + 1)]


def bits(model: Writer, pieces: Tensor) -> Tensor:
    """Bits per character at every position, averaged over the sequences."""
    scores = model(pieces[:, :-1])
    losses = F.cross_entropy(scores.transpose(1, 2), pieces[:, 1:], reduction="none")
    return losses.mean(0) / torch.log(torch.tensor(2.0))


def train(model: Writer, text: Tensor, steps: int) -> None:
    """Adam on random pieces of the text."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = bits(model, sequences(text, BATCH, LENGTH)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():  # batch norm needs a batch to remember, even if no step was taken
        model(sequences(text, BATCH, LENGTH)[:, :-1])


@torch.no_grad()
def row(model: Writer, text: Tensor) -> list[str]:
    """One network's numbers."""
    model.eval()
    by_length = [bits(model, sequences(text, 128, length)) for length in LENGTHS]
    short = by_length[0]
    numbers = [short[0], short[LENGTH // 2], short[-1], *(found.mean() for found in by_length)]
    remembered = sum(b.numel() for name, b in model.state_dict().items() if "running" in name)
    parameters = sum(p.numel() for p in model.parameters())
    return [f"{number:.2f}" for number in numbers] + [f"{remembered:,}", f"{parameters:,}"]


def main() -> None:
    """Train the four, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of training, for each network")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    text = library_text()
    trained_on, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    heads = ("first", "middle", "last", *(f"of {length}" for length in LENGTHS), "remembered", "parameters")
    print(f"{'bits per character':18}" + "".join(f"{head:>11}" for head in heads))
    for name, norm in NORMS.items():
        torch.manual_seed(options.seed)
        model = Writer(norm)
        train(model, trained_on, options.steps)
        torch.manual_seed(options.seed)
        print(f"{name:18}" + "".join(f"{cell:>11}" for cell in row(model, held_out)), flush=True)


if __name__ == "__main__":
    main()
