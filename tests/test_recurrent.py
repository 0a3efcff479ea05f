"""Recurrent networks: torch's without a norm, the papers' formulas with one, for every length and direction."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from normwise import RMS, Affine, Average, Moving, Norm, Scale
from normwise.recurrent import GRU, LSTM, RNN
from tests.recurrent_nets import (
    EVERY_NORM,
    KINDS,
    LAYER,
    LENGTHS,
    NORMS,
    PER_STEP,
    SHARED,
    TWINS,
    assert_same,
    randomized,
    standardized,
    states,
    trained,
)
from tests.tolerances import COMPILED, DOUBLE, GRADIENTS, MEMORY, VALUES, check

# Without a norm


@KINDS
def test_the_constructor_is_torchs(kind: type) -> None:
    signature = inspect.signature(kind.__init__)
    *ours, norm = list(signature.parameters.values())[1:]
    assert (norm.name, norm.kind, norm.default) == ("norm", inspect.Parameter.KEYWORD_ONLY, None)
    arguments = TWINS[kind].__doc__.split("\n")[0].removeprefix("__init__(").rstrip(")").split(",")
    written = [f"{p.name}={p.default!r}" if p.default is not p.empty else p.name for p in ours]
    assert written == arguments
    assert issubclass(kind, TWINS[kind])


@KINDS
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
def test_without_a_norm_it_is_torchs_bit_for_bit(kind: type, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    ours = kind(3, 5, **options)
    torch.manual_seed(1)
    twin = TWINS[kind](3, 5, **options)
    assert {name: value.tolist() for name, value in ours.state_dict().items()} == {
        name: value.tolist() for name, value in twin.state_dict().items()
    }
    twin.load_state_dict(ours.state_dict(), strict=True)
    assert repr(ours) == repr(twin)
    x = torch.randn(6, 4, 3)
    assert_same(ours(x), twin(x))
    assert_same(ours(x[:, 0]), twin(x[:, 0]))
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    (ours_out, ours_last), (twin_out, twin_last) = ours(packed), twin(packed)
    assert_same((ours_out.data, ours_last), (twin_out.data, twin_last))
    padded = ours(x, lengths=LENGTHS)
    assert_same(padded, (pad_packed_sequence(twin_out)[0], twin_last))


def test_device_and_dtype_may_come_by_position() -> None:
    assert GRU(3, 5, 1, True, False, 0.0, False, None, torch.float64).weight_ih_l0.dtype == torch.float64
    assert RNN(3, 5, 1, "relu", True, False, 0.0, False, None, torch.float64).weight_ih_l0.dtype == torch.float64
    with_norm = LSTM(3, 5, 1, True, False, 0.0, False, 0, "meta", torch.float64, norm=LAYER)
    assert {(p.device.type, p.dtype) for p in with_norm.parameters()} == {("meta", torch.float64)}


# The formulas


def by_formula(layer: Any, x: Tensor, dim: int, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One layer, one direction, step by step as the papers write it; `dim` is -1 for layer, 0 for batch norm."""
    p = dict(layer.named_parameters())
    outputs = []
    for x_t in x:
        a = standardized(x_t @ p["weight_ih_l0"].T, dim) * p["norms.ih_l0.weight"] + p["bias_ih_l0"]
        b = standardized(state[0] @ p["weight_hh_l0"].T, dim) * p["norms.hh_l0.weight"] + p["bias_hh_l0"]
        if isinstance(layer, LSTM):
            i, f, g, o = (a + b).chunk(4, -1)
            c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            shown = standardized(c, dim) * p["norms.cell_l0.weight"] + p["norms.cell_l0.bias"]
            state = [o.sigmoid() * shown.tanh(), c]
        elif isinstance(layer, GRU):
            (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3, -1), b.chunk(3, -1)
            z = (a_z + b_z).sigmoid()
            state = [(1 - z) * (a_n + (a_r + b_r).sigmoid() * b_n).tanh() + z * state[0]]
        else:
            state = [(a + b).tanh()]
        outputs.append(state[0])
    return torch.stack(outputs), state


@KINDS
@pytest.mark.parametrize(("norm", "dim"), [(LAYER, -1), (PER_STEP, 0), (SHARED, 0)], ids=NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_papers_formula(kind: type, norm: Norm, dim: int, dtype: torch.dtype) -> None:
    layer = randomized(kind(3, 5, norm=norm, dtype=dtype))
    x = torch.randn(6, 4, 3, dtype=dtype, requires_grad=True)
    first = [torch.randn(1, 4, 5, dtype=dtype, requires_grad=True) for _ in range(2 if kind is LSTM else 1)]
    output, last = layer(x, tuple(first) if kind is LSTM else first[0])
    expected, expected_last = by_formula(layer, x, dim, [part[0] for part in first])
    for ours, theirs in zip((output, *states(last)), (expected, *(part[None] for part in expected_last)), strict=True):
        check(ours, theirs, VALUES if dtype == torch.float32 else DOUBLE)
    leaves = [x, *first, *layer.parameters()]
    cotangents = [torch.randn_like(part) for part in (output, *states(last))]
    ours = torch.autograd.grad((output, *states(last)), leaves, cotangents)
    theirs = torch.autograd.grad((expected, *(part[None] for part in expected_last)), leaves, cotangents)
    for grad, expected_grad in zip(ours, theirs, strict=True):
        check(grad, expected_grad, GRADIENTS if dtype == torch.float32 else DOUBLE)


def test_the_statistics_of_each_step_are_those_of_a_plain_loop() -> None:
    layer = LSTM(3, 5, norm=PER_STEP)
    x = torch.randn(6, 4, 3)
    layer(x)
    p, h, c = dict(layer.named_parameters()), torch.zeros(4, 5), torch.zeros(4, 5)
    for step, x_t in enumerate(x):
        product = h @ p["weight_hh_l0"].T
        memory = layer.norms["hh_l0"]
        check(memory.running_mean[step], 0.1 * product.mean(0).detach(), MEMORY)
        check(memory.running_var[step], 0.9 + 0.1 * product.var(0).detach(), MEMORY)
        _, (h, c) = by_formula(layer, x_t[None], 0, [h, c])
        check(layer.norms["cell_l0"].running_mean[step], 0.1 * c.mean(0).detach(), MEMORY)
    assert layer.norms["hh_l0"].num_batches_tracked.tolist() == [1] * 6


def test_shared_statistics_are_averaged_over_the_steps() -> None:
    layer, per_step = LSTM(3, 5, norm=SHARED), LSTM(3, 5, norm=PER_STEP)
    numbers = {k: v for k, v in layer.state_dict().items() if "running" not in k and "num" not in k}
    per_step.load_state_dict(numbers, strict=False)
    x = torch.randn(6, 4, 3)
    check(layer(x)[0], per_step(x)[0], VALUES)
    for name, norm in layer.norms.items():
        assert norm.running_mean.shape == (norm.spec.sizes[0][1],)
        check(norm.running_mean, per_step.norms[name].running_mean.mean(0), MEMORY)
        check(norm.running_var, per_step.norms[name].running_var.mean(0), MEMORY)


def test_weights_of_batch_norm_start_at_a_tenth() -> None:
    for norm, start in ((PER_STEP, 0.1), (SHARED, 0.1), (LAYER, 1.0)):
        layer = LSTM(3, 5, 2, norm=norm)
        assert {n.weight.unique().item() for n in layer.norms.values()} == {torch.tensor(start).item()}
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        layer.reset_parameters()
        for name, value in layer.norms.state_dict().items():
            assert torch.equal(value, before[f"norms.{name}"])
        assert not torch.equal(layer.weight_ih_l0, before["weight_ih_l0"])


def test_the_places_and_their_parameters() -> None:
    layer = LSTM(3, 5, 2, bidirectional=True, norm=LAYER)
    ends = ["l0", "l0_reverse", "l1", "l1_reverse"]
    assert list(layer.norms) == [f"{place}_{end}" for end in ends for place in ("ih", "hh", "cell")]
    shapes = {name: tuple(p.shape) for name, p in layer.norms.named_parameters() if "l1_reverse" in name}
    assert shapes == {
        "ih_l1_reverse.weight": (20,),
        "hh_l1_reverse.weight": (20,),
        "cell_l1_reverse.weight": (5,),
        "cell_l1_reverse.bias": (5,),
    }
    assert list(GRU(3, 5, norm=LAYER).norms) == ["ih_l0", "hh_l0"]
    twin = nn.LSTM(3, 5, 2, bidirectional=True)
    missing = layer.load_state_dict(twin.state_dict(), strict=False)
    assert missing.unexpected_keys == []
    assert all(key.startswith("norms.") for key in missing.missing_keys)
    assert LSTM(3, 5, norm=LAYER.spec).norms["hh_l0"].spec == LSTM(3, 5, norm=LAYER).norms["hh_l0"].spec


@pytest.mark.parametrize("norm", [Norm("... [c]", RMS(), Scale("c")), Norm("n t (g [k])", g=5), Norm("n [c]")], ids=str)
def test_other_declarations(norm: Norm) -> None:
    layer = randomized(GRU(3, 10, norm=norm))
    x = torch.randn(6, 4, 3)
    layer(x)[0].backward(torch.randn(6, 4, 10))
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


# Conventions


@KINDS
@EVERY_NORM
def test_lengths_are_as_if_each_sequence_were_packed(kind: type, norm: Norm) -> None:
    layer = trained(kind(3, 5, 2, bidirectional=True, norm=norm))
    x = torch.randn(6, 4, 3)
    output, last = layer(x, lengths=LENGTHS)
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    packed_output, packed_last = layer(packed)
    assert isinstance(packed_output, PackedSequence)
    assert torch.equal(packed_output.unsorted_indices, packed.unsorted_indices)
    assert_same((pad_packed_sequence(packed_output)[0], packed_last), (output, last))
    for example, length in enumerate(LENGTHS.tolist()):
        alone, alone_last = layer(x[:length, example])
        check(output[:length, example], alone, VALUES)
        assert output[length:, example].abs().sum() == 0
        for ours, theirs in zip(states(last), states(alone_last), strict=True):
            check(ours[:, example], theirs, VALUES)


def test_packed_in_order_stays_without_indices() -> None:
    layer = LSTM(3, 5, norm=LAYER)
    packed = pack_padded_sequence(torch.randn(6, 3, 3), torch.tensor([6, 4, 1]))
    output, _ = layer(packed)
    assert output.sorted_indices is None
    assert torch.equal(output.batch_sizes, packed.batch_sizes)


@KINDS
@EVERY_NORM
def test_batch_first(kind: type, norm: Norm) -> None:
    layer = trained(kind(3, 5, 2, bidirectional=True, norm=norm))
    first = copy.deepcopy(layer)
    first.batch_first = True
    x = torch.randn(6, 4, 3)
    (output, last), (output_first, last_first) = layer(x), first(x.transpose(0, 1))
    assert_same((output_first.transpose(0, 1), last_first), (output, last))
    assert_same(first(x[:, 0]), layer(x[:, 0]))


@KINDS
@EVERY_NORM
def test_padding_never_matters(kind: type, norm: Norm) -> None:
    reference = randomized(kind(3, 5, 2, bidirectional=True, norm=norm))
    x, found = torch.randn(6, 4, 3), []
    here = (torch.arange(6).unsqueeze(1) < LENGTHS).unsqueeze(2)
    cotangent = torch.randn(6, 4, 10)
    for padding in (0.0, 1e9, torch.inf, torch.nan):
        layer = copy.deepcopy(reference)
        padded = torch.where(here, x, padding).requires_grad_()
        output, last = layer(padded, lengths=LENGTHS)
        (output * cotangent).sum().backward()
        assert torch.where(here, 0.0, padded.grad).abs().max() == 0
        results = [output, *states(last), padded.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]
        found.append([result.detach() for result in results])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_second_direction_is_the_reversed_sequence() -> None:
    layer = randomized(LSTM(3, 5, bidirectional=True, norm=LAYER))
    forwards = LSTM(3, 5, norm=LAYER)
    forwards.load_state_dict(
        {key.replace("_reverse", ""): v for key, v in layer.state_dict().items() if "_reverse" in key}, strict=True
    )
    x = torch.randn(6, 2, 3)
    check(layer(x)[0][..., 5:], forwards(x.flip(0))[0].flip(0), VALUES)


def test_the_reverse_direction_keeps_the_statistics_of_the_step_itself() -> None:
    layer = LSTM(3, 5, bidirectional=True, norm=PER_STEP)
    x = torch.randn(6, 4, 3)
    layer(x, lengths=LENGTHS)
    forwards, backwards = layer.norms["ih_l0"], layer.norms["ih_l0_reverse"]
    assert forwards.batch_samples[:, 0].tolist() == backwards.batch_samples[:, 0].tolist() == [4, 4, 3, 3, 2, 1]
    assert layer.norms["hh_l0_reverse"].batch_samples[:, 0].tolist() == [4, 4, 3, 3, 2, 1]
    products = x @ layer.weight_ih_l0_reverse.T
    check(backwards.running_mean[0], 0.1 * products[0].mean(0).detach(), MEMORY)


def test_dropout_stands_between_the_layers_in_training_only() -> None:
    layer = LSTM(3, 64, 2, dropout=0.5, norm=LAYER)
    x = torch.randn(6, 4, 3)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    plain = LSTM(3, 64, 2, norm=LAYER)
    plain.load_state_dict(layer.state_dict())
    assert_same(layer.eval()(x), plain(x))
    layer.dropout = 1.0
    layer.train()
    assert_same((layer(x)[0][0], layer(x)[1]), (layer(x + 1)[0][0], layer(x)[1]))


# Time


@pytest.mark.parametrize("beyond", ["last", "pooled"])
@KINDS
def test_shorter_and_longer_sequences_than_trained(kind: type, beyond: str) -> None:
    norm = Norm("[n] t c", recovery=Affine("c"), memory=Moving("t c", decay=0.9, beyond={"t": beyond}))
    layer = kind(3, 5, norm=norm)
    for _ in range(3):
        layer(torch.randn(6, 8, 3))
    layer.eval()
    x = torch.randn(12, 2, 3)
    long, short = layer(x)[0], layer(x[:4])[0]
    assert torch.equal(long[:4], short)
    assert torch.isfinite(long).all()
    assert layer.norms["hh_l0"].running_mean.shape[0] == 6


def test_beyond_the_end_the_last_steps_statistics_are_used() -> None:
    layer = RNN(3, 5, norm=PER_STEP)
    layer(torch.randn(6, 8, 3))
    memory = layer.eval().norms["hh_l0"]
    x = torch.randn(7, 2, 3)
    output, _ = layer(x)
    product = output[5] @ layer.weight_hh_l0.T
    hidden = (product - memory.running_mean[5]) / (memory.running_var[5] + 1e-5).sqrt() * memory.weight
    at = layer.norms["ih_l0"]
    given = (x[6] @ layer.weight_ih_l0.T - at.running_mean[5]) / (at.running_var[5] + 1e-5).sqrt() * at.weight
    check(output[6], (given + layer.bias_ih_l0 + hidden + layer.bias_hh_l0).tanh(), VALUES)


def test_a_declared_length_is_that_of_the_memory() -> None:
    norm = Norm("[n] t c", recovery=Affine("c"), memory=Moving("t c", decay=0.9, beyond={"t": "last"}), t=7)
    net = LSTM(3, 5, batch_first=True, norm=norm)
    assert [layer.running_mean.shape for layer in net.norms.values()] == [(7, 20), (7, 20), (7, 5)]
    sequences = torch.randn(4, 7, 3)
    trained, _ = net(sequences)
    evaluated, _ = net.eval()(torch.randn(4, 9, 3))
    assert trained.shape == (4, 7, 5)
    assert evaluated.isfinite().all()


def test_an_empty_batch() -> None:
    output, (h, c) = LSTM(3, 5, norm=LAYER)(torch.zeros(6, 0, 3))
    assert [tuple(part.shape) for part in (output, h, c)] == [(6, 0, 5), (1, 0, 5), (1, 0, 5)]


def test_checkpointing_commits_once() -> None:
    plain = LSTM(3, 5, 2, bidirectional=True, norm=PER_STEP)
    x, cotangent = torch.randn(6, 4, 3), torch.randn(6, 4, 10)
    for reentrant in (False, True):
        kept, again = copy.deepcopy(plain), copy.deepcopy(plain)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        kept(leaves[0])[0].backward(cotangent)
        checkpoint(lambda x, layer=again: layer(x)[0], leaves[1], use_reentrant=reentrant).backward(cotangent)
        assert torch.equal(leaves[0].grad, leaves[1].grad)
        for name, value in kept.state_dict().items():
            assert torch.equal(value, again.state_dict()[name])
        assert again.norms["hh_l1_reverse"].num_batches_tracked.tolist() == [1] * 6


def test_a_layer_norm_is_checkpointed_and_copied_and_called_twice() -> None:
    layer = LSTM(3, 5, norm=LAYER)
    x = torch.randn(6, 4, 3, requires_grad=True)
    plain = torch.autograd.grad(layer(x)[0].square().sum(), [x, *layer.parameters()])
    again = checkpoint(lambda x: layer(x)[0], x, use_reentrant=False).square().sum()
    for ours, expected in zip(torch.autograd.grad(again, [x, *layer.parameters()]), plain, strict=True):
        assert torch.equal(ours, expected)
    loss = layer(x)[0].square().sum()
    for _ in range(2):
        for ours, expected in zip(
            torch.autograd.grad(loss, [x, *layer.parameters()], retain_graph=True), plain, strict=True
        ):
            assert torch.equal(ours, expected)
    assert_same(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # the compiler's own
def test_one_graph() -> None:
    layer = randomized(LSTM(3, 8, norm=LAYER))
    x, cotangent = torch.randn(4, 2, 3), torch.randn(4, 2, 8)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    with torch._dynamo.config.patch(allow_rnn=True):  # the compiler refuses torch's recurrent classes without it
        compiled = torch.compile(layer, fullgraph=True)
        outputs = [layer(leaves[0])[0], compiled(leaves[1])[0]]
        grads = [
            torch.autograd.grad(output, [leaf, *layer.parameters()], cotangent)
            for output, leaf in zip(outputs, leaves, strict=True)
        ]
    check(outputs[1], outputs[0], COMPILED)
    for ours, eager in zip(*grads, strict=True):
        check(ours, eager, COMPILED)


def test_an_average_goes_along_with_lengths() -> None:
    memory = Average("t c", beyond={"t": "last"})
    layer = GRU(3, 5, norm=Norm("[n] t c", recovery=Affine("c"), memory=memory))
    for lengths in (LENGTHS, torch.tensor([3, 3, 3, 3])):
        layer(torch.randn(6, 4, 3), lengths=lengths)
    assert layer.norms["hh_l0"].num_batches_tracked.tolist() == [2, 2, 2, 1, 1, 0]
