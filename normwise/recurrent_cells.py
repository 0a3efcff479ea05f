"""Recurrent cells as pure functions of gates and state, and the one scan over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from normwise.kernels.rows import Derivative, Standardized, are_safe, linear, recovered, standardize, torchs
from normwise.moments import only
from normwise.scan import Rows
from normwise.transforms import being_traced, derivatives

Item = TypeVar("Item")
State: TypeAlias = tuple[Tensor, ...]  # (h,), or (h, c); h comes first
Kept: TypeAlias = tuple[Tensor, ...]  # what a derivative needs
Standardizes: TypeAlias = Callable[[Tensor, float], Standardized]
Along: TypeAlias = Callable[[Tensor], Tensor]  # the normalization of the cell state, or its derivative
Place: TypeAlias = Callable[[int, Tensor], Tensor]  # a normalization at a step

_BLOCK = 256  # rows of a block of steps: the fastest of 32 to 512 on the whole, at hidden sizes of 128 to 512

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
    alive: Tensor | None  # which sequences have which step, (t, n); where one has not, its state stays. None: all have
    backwards: bool  # from the last step to the first; a sequence then starts at its own end

    def order(self, steps: Sequence[Item]) -> Sequence[Item]:
        """Steps in the order in which they are made; and back."""
        return steps[::-1] if self.backwards else steps


def scan(recurrence: Recurrence, gates: Tensor, hidden_gates: Place, cell_norm: Place, *state: Tensor) -> State:
    """Every step's hidden state, (t, n, hidden), 0 where a sequence has no such step; and the last state.

    Args:
        recurrence: What happens in a step.
        gates: The input's part of the gates, (t, n, gates).
        hidden_gates: Makes the hidden state's part.
        cell_norm: Normalizes the cell state.
        *state: The first state, (n, hidden) each.
    """
    given = list(enumerate(gates.unbind()))  # all at once: the gradient of one index is as large as that of all
    return _scan(recurrence, recurrence.order(given), hidden_gates, cell_norm, state)


def _scan(
    recurrence: Recurrence,
    given: Iterable[tuple[int, Tensor]],
    hidden_gates: Place,
    cell_norm: Place,
    state: State,
    log: list[Kept] | None = None,
) -> State:
    """The scan over steps and their gates, in order; the log takes what the derivative of each step needs."""
    outputs = []
    for step, inputs in given:
        hidden = hidden_gates(step, state[0])
        after, kept = recurrence.cell.step(inputs, hidden, state, partial(cell_norm, step))
        if log is not None:
            log.append((state[0], *kept))
        if recurrence.alive is not None:
            here = recurrence.alive[step].unsqueeze(1)
            after = tuple(torch.where(here, new, old) for new, old in zip(after, state, strict=True))
        state = after
        outputs.append(state[0])
    return _within(torch.stack(list(recurrence.order(outputs))), recurrence.alive), *state


def _within(sequences: Tensor, alive: Tensor | None) -> Tensor:
    return only(sequences, None if alive is None else alive.unsqueeze(2))


def can_scan_rows(norms: Sequence[Rows], *tensors: Tensor) -> bool:
    """Whether `scan_rows` can do it: float32 on a CPU, and nothing but ordinary autograd looks on."""
    known = all(norm.eps is not None for norm in norms)
    plain = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
    return known and plain and not being_traced() and not torch.is_autocast_enabled("cpu")


def scan_rows(
    recurrence: Recurrence,
    norms: Sequence[Rows],
    biases: Sequence[Tensor | None],
    x: Tensor,
    of_input: Tensor,
    of_hidden: Tensor,
    *state: Tensor,
) -> State:
    """`scan` where features alone are normalized, from the input on, several times as fast.

    Args:
        recurrence: What happens in a step.
        norms: Of the input's part of the gates, the hidden state's, and the cell state where there is one.
        biases: What is added to the two parts.
        x: The input, (t, n, input).
        of_input: Makes the input's part, (gates, input).
        of_hidden: Makes the hidden state's part, (gates, hidden).
        *state: The first state, (n, hidden) each.
    """
    parameters = [*norms[0].parameters, *norms[1].parameters]
    parameters[1::2] = [own if bias is None else bias for own, bias in zip(parameters[1::2], biases, strict=True)]
    parameters += [parameter for norm in norms[2:] for parameter in norm.parameters]
    tensors = (x, of_input, of_hidden, *state, *parameters)
    scanned: State = _ScanRows.apply(recurrence, norms, *tensors)  # type: ignore[no-untyped-call]
    return scanned


class _ScanRows(torch.autograd.Function):
    """Differentiated step by step, from the last to the first.

    Autograd would record some twenty operations a step, and add to the gradient of the weights at each. Here the
    input's part of the gates, and the gradients of weights and input, are made for a block of steps: enough rows for a
    fast product, and few enough to stay in the cache. Where a derivative of this derivative is wanted, it is taken of
    `_scan`.

    Its tensors are those of `scan_rows`, and weight and bias of each norm.
    """

    @staticmethod
    def forward(ctx: Any, recurrence: Recurrence, norms: Sequence[Rows], *tensors: Tensor | None) -> State:
        scanned, logs = _logged(recurrence, norms, torchs, tensors)
        if not are_safe([rows for norm in logs[:-1] for rows in norm]).all():
            scanned, logs = _logged(recurrence, norms, standardize, tensors)
        ctx.recurrence, ctx.norms, ctx.widths = recurrence, norms, [[len(kept) for kept in log] for log in logs]
        ctx.save_for_backward(*tensors, *(number for log in logs for kept in log for number in kept))
        output, *state = scanned
        return output, *(part.clone() for part in state)  # what is returned is never what is saved

    @staticmethod
    def backward(ctx: Any, d_output: Tensor, *d_state: Tensor) -> tuple[Tensor | None, ...]:
        (_, _, *wanted), saved = ctx.needs_input_grad, iter(ctx.saved_tensors)  # a checkpoint hands them out once
        tensors = [next(saved) for _ in wanted]
        if torch.is_grad_enabled():
            definition = partial(_definition, ctx.recurrence, ctx.norms)
            return None, None, *derivatives(definition, tensors, (d_output, *d_state), wanted)
        logs = [[tuple(islice(saved, width)) for width in widths] for widths in ctx.widths]
        return None, None, *_differentiated(ctx.recurrence, tensors, logs, wanted[0], d_output, d_state)


def _split(tensors: Sequence[Any], norms: int) -> tuple[Sequence[Tensor], list[Sequence[Tensor | None]]]:
    """Input, weights and state; and weight and bias of each norm."""
    first = len(tensors) - 2 * norms
    return tensors[:first], [tensors[at : at + 2] for at in range(first, len(tensors), 2)]


def _definition(recurrence: Recurrence, norms: Sequence[Rows], *tensors: Tensor | None) -> State:
    """The scan as a function of all of its tensors."""
    (x, of_input, of_hidden, *state), parameters = _split(tensors, len(norms))

    def norm(which: int, rows: Tensor) -> Tensor:
        return norms[which].define(rows, *parameters[which])

    gates = torch.stack([norm(0, product) for product in F.linear(x, of_input)])
    last = len(norms) - 1
    return scan(recurrence, gates, lambda _, h: norm(1, F.linear(h, of_hidden)), lambda _, c: norm(last, c), *state)


def _logged(
    recurrence: Recurrence, norms: Sequence[Rows], standardizes: Standardizes, tensors: Sequence[Tensor | None]
) -> tuple[State, list[list[Any]]]:
    """The scan, and what was kept on the way: by each norm (that of the input: of each block), and of each step."""
    (x, of_input, of_hidden, *state), parameters = _split(tensors, len(norms))
    logs: list[list[Any]] = [[] for _ in (*norms, "steps")]

    def norm(which: int, x: Tensor) -> Tensor:
        rows = standardizes(x, cast("float", norms[which].eps))
        logs[which].append(rows)
        return recovered(rows.values, *parameters[which])

    def given() -> Iterable[tuple[int, Tensor]]:
        for steps in _blocks(recurrence, x):
            gates = norm(0, linear(_rows(x, steps), of_input)).reshape(len(steps), x.shape[1], len(of_input))
            yield from recurrence.order(list(zip(steps, gates, strict=True)))

    last = len(norms) - 1
    hidden_gates, cell_norm = (lambda _, h: norm(1, linear(h, of_hidden))), (lambda _, c: norm(last, c))
    return _scan(recurrence, given(), hidden_gates, cell_norm, tuple(state), logs[-1]), logs


def _blocks(recurrence: Recurrence, x: Tensor) -> Sequence[range]:
    """Neighbouring steps, in the order in which they are made."""
    steps, size = range(len(x)), max(1, _BLOCK // max(1, x.shape[1]))
    return recurrence.order([steps[start : start + size] for start in range(0, len(x), size)])


def _rows(x: Tensor, steps: range) -> Tensor:
    return x[steps.start : steps.stop].flatten(0, 1)


class _BackOfNorm:
    """The derivative of a normalization of rows, from its last call to its first, and of its parameters."""

    def __init__(self, parameters: Sequence[Tensor | None], log: list[Kept]) -> None:
        self._log, like = log, log[0][0]
        self._differentiate = Derivative(parameters[0], like)
        self._sums = [None if p is None else torch.zeros_like(like) for p in parameters]

    def __call__(self, d_output: Tensor, out: Tensor | None = None) -> Tensor:
        values, _, inverse = self._log.pop()
        d_weight, d_bias = self._sums
        if d_weight is not None:
            d_weight.addcmul_(d_output, values)
        if d_bias is not None:
            d_bias.add_(d_output)
        return self._differentiate(d_output, values, inverse, out)

    def gradients(self) -> list[Tensor | None]:
        """Of weight and bias."""
        return [None if total is None else total.sum(0) for total in self._sums]


def _differentiated(
    recurrence: Recurrence,
    tensors: Sequence[Tensor | None],
    logs: list[list[Kept]],
    wants_x: bool,
    d_output: Tensor,
    d_state: State,
) -> tuple[Tensor | None, ...]:
    """The gradients of the scan's tensors."""
    (x, of_input, of_hidden, *_), parameters = _split(tensors, len(logs) - 1)
    blocks = _blocks(recurrence, x)
    logs[0] = [kept for both in zip(blocks, logs[0], strict=True) for kept in _by_step(recurrence, *both)]
    norms = [_BackOfNorm(*both) for both in zip(parameters, logs, strict=False)]
    d_outputs = _within(d_output, recurrence.alive).unbind()
    d_x = x.new_empty(x.shape)  # contiguous, whatever the input is, so that its rows are views
    d_of_input, d_of_hidden = torch.zeros_like(of_input), torch.zeros_like(of_hidden)
    room = of_input.new_empty(2, max(len(steps) for steps in blocks), x.shape[1], len(of_input))  # for a block's gates
    for steps in reversed(blocks):
        before: list[Tensor] = []
        for step in reversed(recurrence.order(steps)):
            h, *kept = logs[-1].pop()
            before.append(h)
            d_after = (d_outputs[step] + d_state[0], *d_state[1:])
            here = None if recurrence.alive is None else recurrence.alive[step].unsqueeze(1)
            d_new = tuple(only(part, here) for part in d_after)
            d_input, d_hidden, d_direct, d_rest = recurrence.cell.back(tuple(kept), d_new, norms[-1])
            norms[0](d_input, room[0, step - steps.start])
            d_before = linear(norms[1](d_hidden, room[1, step - steps.start]), of_hidden.t())
            d_state = (d_before if d_direct is None else d_before.add_(d_direct), *d_rest)
            if here is not None:
                d_state = tuple(torch.where(here, new, old) for new, old in zip(d_state, d_after, strict=True))
        d_input, d_hidden = room[:, : len(steps)].flatten(1, 2)
        d_of_input += linear(d_input.t(), _rows(x, steps).t())
        d_of_hidden += linear(d_hidden.t(), torch.cat(tuple(recurrence.order(before[::-1]))).t())
        if wants_x:
            _rows(d_x, steps).copy_(linear(d_input, of_input.t()))
    gradients = (gradient for norm in norms for gradient in norm.gradients())
    return d_x if wants_x else None, d_of_input, d_of_hidden, *d_state, *gradients


def _by_step(recurrence: Recurrence, steps: range, block: Kept) -> Sequence[Kept]:
    """What a norm kept of a block, for each of its steps, in the order in which they are made."""
    parts = (part.reshape(len(steps), len(part) // len(steps), part.shape[1]) for part in block)
    return recurrence.order(list(zip(*parts, strict=True)))


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
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.contiguous().tanh(), o.sigmoid()  # tanh of scattered rows is slow
    c = torch.addcmul(f * state[1], i, g)
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
