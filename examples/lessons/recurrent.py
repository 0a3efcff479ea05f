"""Batch norm per time step: what it remembers, what that is good for, and where it ends.

A recurrent network meets other statistics at its first steps, when its state is still empty, than later. Recurrent
batch normalization (Cooijmans et al. 2016, arXiv:1603.09025) keeps a set of statistics for each step, which pays at the
first steps and costs a memory as long as the sequences. A longer sequence than any in training meets steps without
statistics: `beyond={"t": "last"}` takes those of the last step for them. That is right where the data are stationary by
then, as text is, and wrong where they drift on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import log
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normwise as nw
from normwise.lessons import Chart, Check, Lesson, Size, about, tell

PER_STEP, SHARED = nw.Moving("t c", decay=0.9, beyond={"t": "last"}), nw.Moving("c", decay=0.9)
LENGTH, LONG = 40, 320
TEXTS = {"small": (2, 80), "full": (3, 300)}  # seeds, and steps of Adam
NUMBERS = {"small": (1, 60), "full": (3, 300)}  # fewer do: beyond 40 steps the error is 2 % or 50 %
TEXT = "".join(topics[key] for key in sorted(topics))
SYMBOLS = {symbol: number for number, symbol in enumerate(sorted(set(TEXT)))}
SPANS = {"first step": slice(1), "steps 21 to 40": slice(20, 40), "steps 281 to 320": slice(280, 320)}


class Reader(nn.Module):
    """An LSTM with batch norm that scores every step: from (n, t, ...) to (n, outputs, t)."""

    def __init__(self, memory: nw.Moving, read: nn.Module, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        norm = nw.Norm("[n] t c", recovery=nw.Affine("c"), memory=memory)
        self.read, self.lstm = read, nw.LSTM(inputs, hidden, batch_first=True, norm=norm)
        self.score = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102 - the class says it
        return self.score(self.lstm(self.read(x))[0]).transpose(1, 2)


def characters(rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Pieces of Python's help texts, and at each character the next one."""
    starts = torch.randint(len(TEXT) - length - 1, (rows,)).tolist()
    pieces = torch.tensor([[SYMBOLS[symbol] for symbol in TEXT[at : at + length + 1]] for at in starts])
    return pieces[:, :-1], pieces[:, 1:]


def numbers(rows: int, length: int, drift: float) -> tuple[Tensor, Tensor]:
    """Numbers around a mean that rises by `drift` a step, and whether each is above it."""
    noise = torch.randn(rows, length)
    return (noise + drift * torch.arange(length))[..., None], (noise > 0).long()


def by_step(model: Reader, batch: Callable[[int, int], tuple[Tensor, Tensor]], steps: int) -> tuple[Tensor, Tensor]:
    """Bits, and the error in percent, at every step of long sequences, after some steps of Adam on short ones."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        inputs, targets = batch(32, LENGTH)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    inputs, targets = batch(256, LONG)
    with torch.no_grad():
        scores = model.eval()(inputs)
    bits = F.cross_entropy(scores, targets, reduction="none").mean(0) / log(2)
    return bits, 100 * (scores.argmax(1) != targets).float().mean(0)


def course(memory: nw.Moving, drift: float | None, size: Size) -> Tensor:
    """By step, mean over the seeds: bits a character of text (no drift given), or the error on numbers that drift."""
    (seeds, steps), found = (TEXTS if drift is None else NUMBERS)[size], []
    for seed in range(seeds):
        torch.manual_seed(seed)
        if drift is None:
            found.append(by_step(reader_of_text(memory), characters, steps)[0])
        else:
            model = Reader(memory, nn.Identity(), 1, 16, 2)
            found.append(by_step(model, partial(numbers, drift=drift), steps)[1])
    return torch.stack(found).mean(0)


def reader_of_text(memory: nw.Moving) -> Reader:
    """The network that predicts the next character."""
    return Reader(memory, nn.Embedding(len(SYMBOLS), 32), 32, 64, len(SYMBOLS))


def measure(size: Size) -> Lesson:
    """What batch norm through time remembers, its bits per character, and its errors beyond the trained length."""
    lines = {
        "bits of text, per step": course(PER_STEP, None, size),
        "bits of text, shared": course(SHARED, None, size),
        "error in percent, no drift": course(PER_STEP, 0.0, size),
        "error in percent, drift": course(PER_STEP, 0.1, size),
    }
    rows = {what: {name: line[span].mean().item() for name, span in SPANS.items()} for what, line in lines.items()}
    per_step, shared, still, drifting = rows.values()
    first, trained, end = SPANS
    reader = reader_of_text(PER_STEP)
    reader(characters(2, LENGTH)[0])
    kept = sum(value.numel() for key, value in reader.state_dict().items() if "running" in key)
    known = sum(parameter.numel() for parameter in reader.parameters())
    head_start, stretch = shared[first] - per_step[first], per_step[end] / per_step[trained]
    return Lesson(
        name="recurrent",
        claim="Batch norm per time step helps at the first step, costs a memory as long as the sequences, and goes on "
        "beyond them where the data are stationary only.",
        setting=f"LSTM of 64 over the characters of pydoc's topics, and of 16 over numbers; sequences of {LENGTH} in "
        f"training, of {LONG} in evaluation; seeds and steps of Adam: text {TEXTS[size]}, numbers {NUMBERS[size]}",
        table=tuple({"what": what, **row} for what, row in rows.items()),
        checks=(
            Check("remembered numbers", kept, 46_080, 46_080, "40 steps of 2 x (4 + 4 + 1) x 64, exactly"),
            about("parameters", known, 35_463, 1.05, "the characters differ by Python's version"),
            Check("bits of the first step, shared - per step", head_start, 0.02, why="the state is empty then"),
            about("bits of text, steps 281 to 320 / 21 to 40", stretch, 1, 1.1, "text is stationary"),
            Check("error at steps 281 to 320, no drift", still[end], high=10, why="in percent; chance is 50"),
            Check("error at steps 21 to 40, drift", drifting[trained], high=15, why="in percent; chance is 50"),
            Check("error at steps 281 to 320, drift", drifting[end], 40, 60, why="in percent; chance is 50"),
        ),
        chart=Chart(
            "Trained on 40 steps",
            "step",
            "bits; percent",
            {what: (list(range(1, LONG + 1)), line.tolist()) for what, line in lines.items()},
            log="x",
        ),
        size=size,
    )


if __name__ == "__main__":
    tell(measure)
