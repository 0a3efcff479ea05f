"""Recurrent networks with a declared normalization at the standard places: torch's `RNN`, `LSTM` and `GRU`.

With W_x the weights of the input, W_h those of the hidden state, and N_x, N_h, N_c three normalizations made after one
pattern::

    RNN     h' = tanh(a + b)                  a = N_x(W_x x) + bias_ih
    GRU     r, z = sigmoid(a + b)             b = N_h(W_h h) + bias_hh
            n = tanh(a_n + r b_n)
            h' = (1 - z) n + z h
    LSTM    i, f, o = sigmoid(a + b)
            g = tanh(a + b)
            c' = f c + i g
            h' = o tanh(N_c(c'))

Every gate takes its own part of a and b; N_x and N_h normalize all gates of a cell together, as the papers do.

`norm=` is a declared `Norm` without sizes, after which a fresh layer is made for every place, layer and direction: of
features alone, `"... [c]"`, or with a time axis called t, `"[n] t c"`, whose memory is over "t c" (statistics of each
step) or over "c" (one set, averaged over the steps). torch's bias_ih and bias_hh take the place of the recovery's bias
at N_x and N_h, which so have a weight only (one bias would do, as in the second paper; both are kept for torch's
checkpoints); they are added after the normalization, which would undo them. N_c has the recovery as declared. A pattern
that normalizes over the batch starts with weights of 0.1, as the second paper found: with 1 the gradient through tanh
vanishes. Statistics belong to the step of the sequence, counted from its start, in either direction.

torch's compiler refuses its recurrent classes, and so ours, until `torch._dynamo.config.allow_rnn = True` is set.

Sources: layer normalization: Ba, Kiros, Hinton, arXiv:1607.06450; batch normalization: Cooijmans, Ballas, Laurent,
Gülçehre, Courville, "Recurrent Batch Normalization", arXiv:1603.09025.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from normwise.errors import NormwiseError, ShapeError
from normwise.moments import only
from normwise.norm import Norm
from normwise.plan import plan_for
from normwise.recoveries import Affine, Scale
from normwise.recurrent_cells import CELLS, Cell, Recurrence, State, can_scan_rows, scan, scan_rows
from normwise.scan import TIME, Rows, Scan, check_scannable, has_time
from normwise.spec import NormSpec
from normwise.transforms import being_traced

Device: TypeAlias = torch.device | str | None
Hidden: TypeAlias = Tensor | tuple[Tensor, Tensor]

_BATCH_NORM_WEIGHT = 0.1  # Cooijmans et al., section 4: a weight of 1 saturates tanh, and its gradient vanishes


class _Recurrent(nn.RNNBase):
    """What the three share: the norms, the layers and directions, lengths, and torch's conventions."""

    norms: nn.ModuleDict | None

    def _add_norms(self, norm: Norm | NormSpec | None, device: Device, dtype: torch.dtype | None) -> None:
        """A layer for every place, named as torch's parameters are: ih_l0, hh_l0, cell_l0, ih_l0_reverse ..."""
        if norm is None:
            self.norms = None
            return
        spec = norm.spec if isinstance(norm, Norm) else norm
        if not isinstance(spec, NormSpec):
            raise TypeError(f"norm is {norm!r}, which is not an nw.Norm")
        check_scannable(spec)
        cell = CELLS[self.mode]
        gates = _sized(spec, cell.gates * self.hidden_size, bias=False)
        places = {"ih": gates, "hh": gates}
        if cell.remembers:
            places["cell"] = _sized(spec, self.hidden_size, bias=True)
        suffixes = [suffix for layer in range(self.num_layers) for suffix in self._suffixes(layer)]
        names = {f"{place}_{suffix}": sized for suffix in suffixes for place, sized in places.items()}
        self.norms = nn.ModuleDict({name: _made(sized, device, dtype) for name, sized in names.items()})
        self._start_norms()

    def reset_parameters(self) -> None:
        """Start anew: torch's uniform weights and biases, and the norms at their first values."""
        bound = 1 / math.sqrt(self.hidden_size)
        for name in self._flat_weights_names:
            nn.init.uniform_(getattr(self, name), -bound, bound)
        self._start_norms()

    def forward(self, input: Any, hx: Any = None, *, lengths: Tensor | None = None) -> Any:  # noqa: A002 - torch's name
        """Run over whole sequences, as torch's layer does.

        Args:
            input: (t, n, input), or (n, t, input) with `batch_first`; (t, input) for a single sequence; or packed.
            hx: The first state, (layers * directions, n, hidden); for an LSTM two of them. Default: zeros.
            lengths: How many steps each sequence of a padded input has, n whole numbers from 1 on. What stands after
                them, NaN included, never matters; outputs there are 0, and the last state is that at each sequence's
                own last step.

        Returns:
            The outputs of the last layer, packed if the input was, and the last state of every layer and direction.

        Raises:
            ShapeError: lengths that do not fit the input.
        """
        if isinstance(input, PackedSequence):
            return self._packed(input, hx, lengths)
        if lengths is not None:
            _check_lengths(lengths, input, self.batch_first)
        if self.norms is None:
            return super().forward(input, hx) if lengths is None else self._by_packing(input, hx, lengths)
        return self._normalized(input, hx, lengths)

    def _packed(self, packed: PackedSequence, hx: Hidden | None, lengths: Tensor | None) -> tuple[Any, Any]:
        if lengths is not None:
            raise ShapeError("a packed input brings its lengths: leave out lengths=")
        if self.norms is None:
            return cast("tuple[Any, Any]", super().forward(packed, hx))
        padded, counts = pad_packed_sequence(packed, batch_first=self.batch_first)
        output, state = self._normalized(padded, hx, counts)
        if packed.sorted_indices is not None:
            output = output.index_select(0 if self.batch_first else 1, packed.sorted_indices)
            counts = counts[packed.sorted_indices.cpu()]
        data = pack_padded_sequence(output, counts, batch_first=self.batch_first).data
        return packed._replace(data=data), state

    def _by_packing(self, padded: Tensor, hx: Hidden | None, lengths: Tensor) -> tuple[Tensor, Any]:
        """torch's own layer knows lengths of packed input only."""
        packed = pack_padded_sequence(padded, lengths.cpu(), self.batch_first, enforce_sorted=False)
        output, state = super().forward(packed, hx)
        size = padded.shape[1 if self.batch_first else 0]
        return pad_packed_sequence(output, self.batch_first, total_length=size)[0], state

    def _normalized(self, sequences: Tensor, hx: Hidden | None, lengths: Tensor | None) -> tuple[Tensor, Any]:
        """torch's conventions around `_run`, which takes the time first and always a batch."""
        if sequences.dim() not in (2, 3):
            raise ShapeError(f"the input has 2 or 3 dimensions, not {sequences.dim()}: shape {tuple(sequences.shape)}")
        single, batch_dim = sequences.dim() == 2, 0 if self.batch_first else 1
        state: State = () if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if single:
            sequences, state = sequences.unsqueeze(batch_dim), tuple(part.unsqueeze(1) for part in state)
        if not state:
            zeros = sequences.new_zeros(len(self._all_weights), sequences.shape[batch_dim], self.hidden_size)
            state = (zeros, zeros) if CELLS[self.mode].remembers else (zeros,)
        self.check_forward_args(sequences, _unwrapped(state), None)
        output, state = self._run(sequences.transpose(0, 1) if self.batch_first else sequences, state, lengths)
        output = output.transpose(0, 1) if self.batch_first else output
        if single:
            output, state = output.squeeze(batch_dim), tuple(part.squeeze(1) for part in state)
        return output, _unwrapped(state)

    def _run(self, x: Tensor, first: State, lengths: Tensor | None) -> tuple[Tensor, State]:
        """All layers and directions, on (t, n, input)."""
        alive = None
        if lengths is not None:
            alive = torch.arange(len(x), device=x.device).unsqueeze(1) < lengths.to(x.device)
            x = only(x, alive.unsqueeze(2))
        last: list[State] = []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for suffix in self._suffixes(layer):
                output, state = self._run_one(suffix, x, tuple(part[len(last)] for part in first), alive)
                outputs.append(output)
                last.append(state)
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
        return x, tuple(torch.stack(parts) for parts in zip(*last, strict=True))

    def _run_one(self, suffix: str, x: Tensor, state: State, alive: Tensor | None) -> tuple[Tensor, State]:
        """One layer in one direction."""
        cell, norms = CELLS[self.mode], self._norms_of(suffix)
        of_input, of_hidden = (getattr(self, f"weight_{name}_{suffix}") for name in ("ih", "hh"))
        biases = self._biases(suffix, cell)
        recurrence = Recurrence(cell, alive, suffix.endswith("_reverse"))
        if not has_time(norms[0].spec):
            widths = (len(of_input), len(of_hidden), self.hidden_size)
            rows = [Rows(norm, (x.shape[1], width), x) for norm, width in zip(norms, widths, strict=False)]
            if can_scan_rows(rows, x, of_input, of_hidden, *state):
                output, *last = scan_rows(recurrence, rows, biases, x, of_input, of_hidden, *state)
                return output, tuple(last)
        gates = _norm_all(norms[0], F.linear(x, of_input), biases[0], alive)
        places = [_scan_of(norms[1], gates, alive)]
        places += [_scan_of(norm, gates[..., : self.hidden_size], alive) for norm in norms[2:]]

        def hidden_gates(step: int, h: Tensor) -> Tensor:
            hidden = places[0](step, F.linear(h, of_hidden))
            return hidden if biases[1] is None else hidden + biases[1]

        output, *last = scan(recurrence, gates, hidden_gates, places[-1], *state)
        for place in places:
            place.close()
        return output, tuple(last)

    def _norms_of(self, suffix: str) -> list[Norm]:
        norms = cast("nn.ModuleDict", self.norms)
        places = ("ih", "hh", "cell") if CELLS[self.mode].remembers else ("ih", "hh")
        return [cast("Norm", norms[f"{place}_{suffix}"]) for place in places]

    def _biases(self, suffix: str, cell: Cell) -> tuple[Tensor | None, Tensor | None]:
        """What is added to the input's part, for all steps at once, and to the hidden state's part at each."""
        if not self.bias:
            return None, None
        from_input, from_hidden = (getattr(self, f"bias_{name}_{suffix}") for name in ("ih", "hh"))
        return (from_input + from_hidden, None) if cell.adds else (from_input, from_hidden)

    def _suffixes(self, layer: int) -> list[str]:
        """The ends of torch's parameter names."""
        return [f"l{layer}", f"l{layer}_reverse"] if self.bidirectional else [f"l{layer}"]

    def _start_norms(self) -> None:
        for norm in cast(
            "Iterable[Norm]", (getattr(self, "norms", None) or {}).values()
        ):  # torch's __init__ comes first
            norm.reset_parameters()
            if norm.weight is not None and norm.spec.joins_batches:
                nn.init.constant_(cast("Tensor", norm.weight), _BATCH_NORM_WEIGHT)


class RNN(_Recurrent, nn.RNN):
    """An Elman network: h' = tanh(N(W_ih x) + bias_ih + N(W_hh h) + bias_hh), or relu.

    Args:
        input_size: Features of the input.
        hidden_size: Features of the hidden state.
        num_layers: Layers on top of each other.
        nonlinearity: "tanh" or "relu".
        bias: Whether there are bias_ih and bias_hh.
        batch_first: Whether inputs and outputs are (n, t, features) and not (t, n, features).
        dropout: The probability with which an output between two layers is dropped in training.
        bidirectional: Whether a second network runs from each sequence's end to its start.
        device: Of parameters and memory.
        dtype: Of parameters and memory.
        norm: The pattern of the normalizations; see the module's text. None: torch's own layer.

    >>> RNN(3, 5, norm=Norm("... [c]", recovery=Affine("c")))(torch.randn(7, 2, 3))[0].shape
    torch.Size([7, 2, 5])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        norm: Norm | NormSpec | None = None,
    ) -> None:
        sizes = (input_size, hidden_size, num_layers)
        options = {
            "device": device,
            "dtype": dtype,
        }  # by name: torch takes what comes here by position for its proj_size
        nn.RNN.__init__(self, *sizes, nonlinearity, bias, batch_first, dropout, bidirectional, **options)
        self._add_norms(norm, device, dtype)


class LSTM(_Recurrent, nn.LSTM):
    """A long short-term memory, with a normalization of the cell state before its output tanh as well.

    Args:
        input_size: Features of the input.
        hidden_size: Features of the hidden state.
        num_layers: Layers on top of each other.
        bias: Whether there are bias_ih and bias_hh.
        batch_first: Whether inputs and outputs are (n, t, features) and not (t, n, features).
        dropout: The probability with which an output between two layers is dropped in training.
        bidirectional: Whether a second network runs from each sequence's end to its start.
        proj_size: Features that the hidden state is projected to; only without a norm.
        device: Of parameters and memory.
        dtype: Of parameters and memory.
        norm: The pattern of the normalizations; see the module's text. None: torch's own layer.

    >>> per_step = Norm("[n] t c", recovery=Affine("c"), memory=Moving("t c", decay=0.9, beyond={"t": "last"}))
    >>> lstm = LSTM(3, 5, norm=per_step)
    >>> output, (h, c) = lstm(torch.randn(7, 4, 3), lengths=torch.tensor([7, 2, 5, 7]))
    >>> lstm.norms["hh_l0"].running_mean.shape
    torch.Size([7, 20])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        norm: Norm | NormSpec | None = None,
    ) -> None:
        if norm is not None and proj_size:
            raise NormwiseError(f"an LSTM with proj_size={proj_size} cannot be normalized: leave out proj_size or norm")
        sizes = (input_size, hidden_size, num_layers)
        nn.LSTM.__init__(self, *sizes, bias, batch_first, dropout, bidirectional, proj_size, device, dtype)
        self._add_norms(norm, device, dtype)


class GRU(_Recurrent, nn.GRU):
    """A gated recurrent unit, in torch's form: the reset gate opens what W_hh has made of the hidden state.

    Args:
        input_size: Features of the input.
        hidden_size: Features of the hidden state.
        num_layers: Layers on top of each other.
        bias: Whether there are bias_ih and bias_hh.
        batch_first: Whether inputs and outputs are (n, t, features) and not (t, n, features).
        dropout: The probability with which an output between two layers is dropped in training.
        bidirectional: Whether a second network runs from each sequence's end to its start.
        device: Of parameters and memory.
        dtype: Of parameters and memory.
        norm: The pattern of the normalizations; see the module's text. None: torch's own layer.

    >>> GRU(3, 5, norm=Norm("... [c]", RMS(), Scale("c")))(torch.randn(7, 2, 3))[1].shape
    torch.Size([1, 2, 5])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        norm: Norm | NormSpec | None = None,
    ) -> None:
        sizes = (input_size, hidden_size, num_layers)
        options = {"device": device, "dtype": dtype}  # by name: see RNN
        nn.GRU.__init__(self, *sizes, bias, batch_first, dropout, bidirectional, **options)
        self._add_norms(norm, device, dtype)


def _unwrapped(state: State) -> Any:
    """A state as torch takes and returns it: a tensor, or two for an LSTM."""
    return state if len(state) > 1 else state[0]


def _norm_all(norm: Norm, gates: Tensor, bias: Tensor | None, alive: Tensor | None) -> Tensor:
    """All steps at once, (t, n, gates), and the bias; where features alone are normalized, every step is a row."""
    if not has_time(norm.spec):
        rows = gates.flatten(0, 1)
        normalized = Rows(norm, (len(rows), rows.shape[1]), rows)(0, rows).reshape(gates.shape)
    else:
        normalized = norm(gates.transpose(0, 1), valid=None if alive is None else alive.T).transpose(0, 1)
    return normalized if bias is None else normalized + bias


def _scan_of(norm: Norm, like: Tensor, alive: Tensor | None) -> Scan | Rows:
    """The norm step by step, for values of the shape of `like`: (t, n, features)."""
    steps, examples, features = like.shape
    if not has_time(norm.spec):
        return Rows(norm, (examples, features), like)
    return Scan(norm, TIME, (examples, steps, features), like, None if alive is None else alive.T)


def _check_lengths(lengths: Tensor, sequences: Tensor, batch_first: bool) -> None:
    """Refuse lengths that do not fit; their values only where the host can see them for nothing."""
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths is a tensor of whole numbers, not {lengths!r}")
    if sequences.dim() != 3:
        raise ShapeError(f"lengths are for a batch of sequences, and the input has shape {tuple(sequences.shape)}")
    examples, steps = sequences.shape[:2] if batch_first else (sequences.shape[1], sequences.shape[0])
    if lengths.shape != (examples,):
        raise ShapeError(f"lengths has shape {tuple(lengths.shape)}, and there are {examples} sequences")
    if being_traced() or lengths.device.type != "cpu" or not examples:
        return
    least, most = (int(bound) for bound in lengths.aminmax())
    if least < 1 or most > steps:
        raise ShapeError(f"a length of {least if least < 1 else most}: lengths are from 1 to the input's {steps} steps")


def _made(spec: NormSpec, device: Device, dtype: torch.dtype | None) -> Norm:
    parts = (spec.text, spec.normalizer, spec.recovery, spec.memory)
    return Norm(*parts, sizes=dict(spec.sizes), device=device, dtype=dtype)


def _sized(pattern: NormSpec, features: int, *, bias: bool) -> NormSpec:
    """The pattern for a place of so many features; without a bias, where torch's biases are that of the recovery."""
    recovery = pattern.recovery
    if isinstance(recovery, Affine) and not bias:
        recovery = Scale(recovery.over)
    shape = torch.Size((1, dict(pattern.sizes).get(TIME, 1), features) if has_time(pattern) else (1, features))
    plan = plan_for(pattern.pattern, shape, pattern.call_sizes)
    return replace(pattern, recovery=recovery).with_sizes({name: plan.size(name) for name in pattern.unknown})
