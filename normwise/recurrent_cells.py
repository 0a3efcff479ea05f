"""Recurrent cells as pure functions of gates and state, and the one scan over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from normwise.moments import only

State: TypeAlias = tuple[Tensor, ...]  # (h,), or (h, c); h comes first
Place: TypeAlias = Callable[[int, Tensor], Tensor]  # normalizes the values of one time step


class Cell(NamedTuple):
    """What one kind of cell is.

    `step` makes the next state from the gates as the input and as the hidden state make them, the state, and the
    normalization of the cell state.
    """

    step: Callable[[Tensor, Tensor, State, Callable[[Tensor], Tensor]], State]
    gates: int  # the width of the gates is so many times that of the hidden state
    adds: bool = True  # whether the two parts of the gates are added, and nothing else is done to them
    remembers: bool = False  # whether there is a cell state beside the hidden state


class Recurrence(NamedTuple):
    """What takes one layer in one direction from step to step."""

    cell: Cell
    weight: Tensor  # from hidden state to gates
    bias: Tensor | None  # added to these gates at every step; None: it is in the input's part already
    hidden_norm: Place
    cell_norm: Place


def scan(recurrence: Recurrence, gates: Tensor, state: State, order: Iterable[int], alive: Tensor | None) -> list[State]:
    """The states after every step, in the order of the steps.

    Args:
        recurrence: What happens in a step.
        gates: The input's part of the gates, (t, n, gates).
        state: The first state, (n, hidden) each.
        order: The steps in the order in which they are made; it covers every step once.
        alive: Which sequences have a step at all, (t, n, 1); the state of the others stays. None: all have every one.
    """
    states = {}
    for step in order:
        hidden = recurrence.hidden_norm(step, F.linear(state[0], recurrence.weight))
        if recurrence.bias is not None:
            hidden = hidden + recurrence.bias
        after = recurrence.cell.step(gates[step], hidden, state, lambda c, step=step: recurrence.cell_norm(step, c))
        if alive is not None:
            after = tuple(torch.where(alive[step], new, old) for new, old in zip(after, state, strict=True))
        states[step] = state = after
    return [states[step] for step in range(len(states))]


def _tanh(inputs: Tensor, hidden: Tensor, state: State, norm: object) -> State:
    return (torch.tanh(inputs + hidden),)


def _relu(inputs: Tensor, hidden: Tensor, state: State, norm: object) -> State:
    return (torch.relu(inputs + hidden),)


def _lstm(inputs: Tensor, hidden: Tensor, state: State, norm: Callable[[Tensor], Tensor]) -> State:
    i, f, g, o = (inputs + hidden).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * norm(c).tanh(), c


def _gru(inputs: Tensor, hidden: Tensor, state: State, norm: object) -> State:
    size = state[0].shape[-1]
    opened = [2 * size, size]
    (x_rz, x_n), (h_rz, h_n) = inputs.split(opened, -1), hidden.split(opened, -1)
    r, z = (x_rz + h_rz).sigmoid().chunk(2, -1)
    n = torch.tanh(x_n + r * h_n)
    return (torch.lerp(n, state[0], z),)


CELLS = {
    "RNN_TANH": Cell(_tanh, 1),
    "RNN_RELU": Cell(_relu, 1),
    "LSTM": Cell(_lstm, 4, remembers=True),
    "GRU": Cell(_gru, 3, adds=False),
}
