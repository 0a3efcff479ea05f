"""Recurrent cells as pure functions of gates and state, and the one scan over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from normwise.moments import only
from normwise.scan import Kept, Rows, derivatives, total
from normwise.transforms import being_traced

State: TypeAlias = tuple[Tensor, ...]  # (h,), or (h, c); h comes first
Along: TypeAlias = Callable[[Tensor], Tensor]  # the normalization of the cell state, or its derivative
Place: TypeAlias = Callable[[int, Tensor], Tensor]  # a normalization at a step

_tanh_back, _sigmoid_back = torch.ops.aten.tanh_backward.default, torch.ops.aten.sigmoid_backward.default


class Cell(NamedTuple):
    """What one kind of cell is.

    `step` makes the next state of the input's part of the gates, the hidden state's part, the state and the
    normalization of the cell state. It also returns what `back` needs, which takes the gradient of the next state to
    those of both parts of the gates and of the state; that of the hidden state is without what went through the gates
    (None: there is nothing else).
    """

    step: Callable[[Tensor, Tensor, State, Along], tuple[State, Kept]]
    back: Callable[[Kept, State, Along], tuple[Tensor, Tensor, Tensor | None, State]]
    gates: int  # the gates are so many times as wide as the hidden state
    adds: bool = True  # whether the two parts of the gates are added, and nothing else is done to them
    remembers: bool = False  # whether there is a cell state beside the hidden state


class Recurrence(NamedTuple):
    """What takes one layer in one direction from step to step."""

    cell: Cell
    hidden_norm: Place
    cell_norm: Place
    alive: Tensor | None  # which sequences have which step, (t, n); where one has not, its state stays. None: all have
    backwards: bool  # from the last step to the first; a sequence then starts at its own end

    def order(self, steps: int) -> Sequence[int]:
        """The steps in the order in which they are made."""
        return range(steps)[::-1] if self.backwards else range(steps)


def scan(recurrence: Recurrence, gates: Tensor, weight: Tensor, bias: Tensor | None, *state: Tensor) -> State:
    """Every step's hidden state, (t, n, hidden), 0 where a sequence has no such step; and the last state.

    Args:
        recurrence: What happens in a step.
        gates: The input's part of the gates, (t, n, gates).
        weight: Makes the hidden state's part, (gates, hidden).
        bias: Added to that part at every step; None: there is none, or it is in the input's part.
        *state: The first state, (n, hidden) each.
    """
    norms = (recurrence.hidden_norm, recurrence.cell_norm)
    parameters = [norm.parameters for norm in norms if isinstance(norm, Rows) and norm.parameters is not None]
    one_dtype = gates.dtype == weight.dtype == state[0].dtype == state[-1].dtype  # not so under autocast
    if being_traced() or len(parameters) < len(norms) or not one_dtype:
        return _scan(recurrence, gates, weight, bias, *state)
    of_cell = parameters[1] if recurrence.cell.remembers else (None, None)
    tensors = (gates, weight, bias, *state, *parameters[0], *of_cell)
    scanned: State = _ScanOfRows.apply(recurrence, *tensors)  # type: ignore[no-untyped-call]
    return scanned


def _scan(
    recurrence: Recurrence,
    gates: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *state: Tensor,
    log: list[Kept] | None = None,
) -> State:
    """The scan, in operations that autograd follows; the log takes what the derivative of each step needs."""
    outputs = {}
    given, transposed = gates.unbind(), weight.t()  # all at once: the gradient of one index is as large as that of all
    for step in recurrence.order(len(given)):
        hidden = recurrence.hidden_norm(step, state[0] @ transposed)
        if bias is not None:
            hidden = hidden + bias
        after, kept = recurrence.cell.step(given[step], hidden, state, partial(recurrence.cell_norm, step))
        if log is not None:
            log.append((state[0], *kept))
        if recurrence.alive is not None:
            here = recurrence.alive[step].unsqueeze(1)
            after = tuple(torch.where(here, new, old) for new, old in zip(after, state, strict=True))
        state = after
        outputs[step] = state[0]
    output = torch.stack([outputs[step] for step in range(len(given))])
    return _within(output, recurrence.alive), *state


def _within(sequences: Tensor, alive: Tensor | None) -> Tensor:
    return only(sequences, None if alive is None else alive.unsqueeze(2))


class _Logs(NamedTuple):
    """What the derivatives of the steps need, in the order in which they were made."""

    cell: list[Kept]  # the hidden state before the step comes first
    hidden_norm: list[Kept]
    cell_norm: list[Kept]


class _ScanOfRows(torch.autograd.Function):
    """The scan where features alone are normalized, differentiated step by step from the last to the first.

    Autograd would record some twenty operations a step, and add to the gradient of the weights at each; here that is
    one product for all steps. Where a derivative of this derivative is wanted, it is taken of `_scan`.

    Its tensors are gates, weight, bias, the first state, and weight and bias of both norms.
    """

    @staticmethod
    def forward(ctx: Any, recurrence: Recurrence, *tensors: Tensor | None) -> State:
        logs = _Logs([], [], [])
        recorded = recurrence._replace(
            hidden_norm=_recording(recurrence.hidden_norm, logs.hidden_norm),
            cell_norm=_recording(recurrence.cell_norm, logs.cell_norm),
        )
        output, *state = _scan(recorded, *cast("State", tensors[:-4]), log=logs.cell)
        ctx.recurrence, ctx.widths = recurrence, [len(log[0]) if log else 0 for log in logs]
        ctx.save_for_backward(*tensors, *(number for log in logs for kept in log for number in kept))
        return output, *(part.clone() for part in state)  # what is returned is never what is saved

    @staticmethod
    def backward(ctx: Any, d_output: Tensor, *d_state: Tensor) -> tuple[Tensor | None, ...]:
        (_, *wanted), saved = ctx.needs_input_grad, iter(ctx.saved_tensors)  # a checkpoint hands them out once
        tensors = [next(saved) for _ in wanted]
        if torch.is_grad_enabled():
            definition = partial(_definition, ctx.recurrence)
            return None, *derivatives(definition, tensors, (d_output, *d_state), wanted)
        steps = range(len(d_output))
        logs = _Logs(*([tuple(next(saved) for _ in range(width)) for _ in steps if width] for width in ctx.widths))
        _, weight, bias, *_ = tensors
        return None, *_differentiated(ctx.recurrence, weight, bias is not None, logs, d_output, d_state)


def _recording(norm: Place, log: list[Kept]) -> Place:
    def recorded(step: int, x: Tensor) -> Tensor:
        output, kept = cast("Rows", norm).measure(x)
        log.append(kept)
        return output

    return recorded


def _definition(recurrence: Recurrence, *tensors: Tensor) -> State:
    """The scan as a function of all of its tensors."""

    def defined(norm: Place, weight: Tensor, bias: Tensor) -> Place:
        return lambda step, x: cast("Rows", norm).define(x, weight, bias)

    *scanned, weight, bias, cell_weight, cell_bias = tensors
    hidden_norm = defined(recurrence.hidden_norm, weight, bias)
    cell_norm = defined(recurrence.cell_norm, cell_weight, cell_bias)
    return _scan(recurrence._replace(hidden_norm=hidden_norm, cell_norm=cell_norm), *scanned)


def _differentiated(
    recurrence: Recurrence, weight: Tensor, has_bias: bool, logs: _Logs, d_output: Tensor, d_state: State
) -> tuple[Tensor | None, ...]:
    """The gradients of the scan's tensors."""
    alive, norms = recurrence.alive, cast("tuple[Rows, Rows]", (recurrence.hidden_norm, recurrence.cell_norm))
    d_outputs = _within(d_output, alive).unbind()
    d_gates, d_hidden, d_product = {}, [], []
    d_norms: tuple[list[Any], list[Any]] = ([], [])

    def through(which: int, kept: Kept, d_normalized: Tensor) -> Tensor:
        d_x, *d_parameters = norms[which].differentiate(kept, d_normalized)
        d_norms[which].append(d_parameters)
        return d_x

    for at, step in reversed(list(enumerate(recurrence.order(len(d_outputs))))):
        d_after = (d_outputs[step] + d_state[0], *d_state[1:])
        here = None if alive is None else alive[step].unsqueeze(1)
        d_new = tuple(only(part, here) for part in d_after)
        along_cell = partial(through, 1, logs.cell_norm[at] if logs.cell_norm else ())
        d_gates[step], d_part, d_direct, d_rest = recurrence.cell.back(logs.cell[at][1:], d_new, along_cell)
        d_hidden.append(d_part)
        d_product.append(through(0, logs.hidden_norm[at], d_part))
        d_before = d_product[-1] @ weight if d_direct is None else torch.addmm(d_direct, d_product[-1], weight)
        d_state = (d_before, *d_rest)
        if here is not None:
            d_state = tuple(torch.where(here, new, old) for new, old in zip(d_state, d_after, strict=True))
    before = torch.cat([kept[0] for kept in reversed(logs.cell)])
    d_weight = torch.cat(d_product).t() @ before
    d_bias = torch.cat(d_hidden).sum(0) if has_bias else None
    d_parameters = [total(parts) for found in d_norms for parts in (zip(*found, strict=True) if found else ((), ()))]
    return torch.stack([d_gates[step] for step in range(len(d_gates))]), d_weight, d_bias, *d_state, *d_parameters


def _tanh(inputs: Tensor, hidden: Tensor, state: State, along: Along) -> tuple[State, Kept]:
    h = torch.tanh(inputs + hidden)
    return (h,), (h,)


def _back_of_tanh(kept: Kept, d_state: State, along: Along) -> tuple[Tensor, Tensor, None, State]:
    d_gates = _tanh_back(d_state[0], kept[0])
    return d_gates, d_gates, None, ()


def _relu(inputs: Tensor, hidden: Tensor, state: State, along: Along) -> tuple[State, Kept]:
    h = torch.relu(inputs + hidden)
    return (h,), (h,)


def _back_of_relu(kept: Kept, d_state: State, along: Along) -> tuple[Tensor, Tensor, None, State]:
    d_gates = only(d_state[0], kept[0] > 0)
    return d_gates, d_gates, None, ()


def _lstm(inputs: Tensor, hidden: Tensor, state: State, along: Along) -> tuple[State, Kept]:
    i, f, g, o = (inputs + hidden).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * state[1] + i * g
    shown = along(c).tanh()
    return (o * shown, c), (i, f, g, o, state[1], shown)


def _back_of_lstm(kept: Kept, d_state: State, along: Along) -> tuple[Tensor, Tensor, None, State]:
    (i, f, g, o, c, shown), (d_h, d_c) = kept, d_state
    d_c = d_c + along(_tanh_back(d_h * o, shown))
    d_i, d_f, d_o = _sigmoid_back(d_c * g, i), _sigmoid_back(d_c * c, f), _sigmoid_back(d_h * shown, o)
    d_gates = torch.cat((d_i, d_f, _tanh_back(d_c * i, g), d_o), -1)
    return d_gates, d_gates, None, (d_c * f,)


def _gru(inputs: Tensor, hidden: Tensor, state: State, along: Along) -> tuple[State, Kept]:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = inputs.chunk(3, -1), hidden.chunk(3, -1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = torch.tanh(x_n + r * h_n)
    return (n + z * (state[0] - n),), (r, z, n, h_n, state[0])


def _back_of_gru(kept: Kept, d_state: State, along: Along) -> tuple[Tensor, Tensor, Tensor, State]:
    (r, z, n, h_n, h), (d_h,) = kept, d_state
    d_n = _tanh_back(d_h * (1 - z), n)
    d_r, d_z = _sigmoid_back(d_n * h_n, r), _sigmoid_back(d_h * (h - n), z)
    return torch.cat((d_r, d_z, d_n), -1), torch.cat((d_r, d_z, d_n * r), -1), d_h * z, ()


CELLS = {
    "RNN_TANH": Cell(_tanh, _back_of_tanh, 1),
    "RNN_RELU": Cell(_relu, _back_of_relu, 1),
    "LSTM": Cell(_lstm, _back_of_lstm, 4, remembers=True),
    "GRU": Cell(_gru, _back_of_gru, 3, adds=False),
}
