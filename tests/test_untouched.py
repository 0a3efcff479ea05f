"""A model that was run within `untouched` is the model as it was: values, objects, modes, random numbers."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise import BatchNorm, Moving, Norm
from normwise.untouched import Moment, seed, untouched
from tests.test_memory import bits
from tests.traces import everything, network, step


def test_a_forward_and_a_backward_leave_no_trace() -> None:
    model = network()
    before = everything(model)
    with untouched(model):
        step(model)
        assert everything(model) != before
    assert everything(model) == before


def test_a_model_in_the_middle_of_training_goes_on_as_if_nothing_had_been() -> None:
    model = network()
    step(model)
    model[0].bias.requires_grad_(False)
    model[4].eval()
    twin, before = copy.deepcopy(model), everything(model)
    with untouched(model):
        step(model)
        model.eval()
        model(torch.randn(8, 4))
        model.zero_grad()
        for parameter in model.parameters():
            parameter.requires_grad = not parameter.requires_grad
        assert everything(model)["gradients"] != before["gradients"]
    assert everything(model) == before
    model.zero_grad()  # a copy has no gradients
    torch.manual_seed(1)
    y = step(model)
    torch.manual_seed(1)
    assert torch.equal(step(twin), y)
    assert bits(model) == bits(twin)
    learning = [(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True) if p.requires_grad]
    assert len(learning) == 7
    assert all(torch.equal(p.grad, q.grad) for p, q in learning)


def _rebind(model: nn.Module) -> None:
    model[4].running_mean = torch.randn(6)


def _grow(model: nn.Module) -> None:
    model[4].running_mean.set_(torch.randn(9))


def _register(model: nn.Module) -> None:
    model[0].register_buffer("seen", torch.randn(3))
    model[2].register_parameter("scale", nn.Parameter(torch.randn(3)))


def _remove(model: nn.Module) -> None:
    running_mean = model[4].running_mean
    del model[4].running_mean
    model[4].register_buffer("running_mean", running_mean)  # now the last one


def _fill(model: nn.Module) -> None:
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.fill_(torch.nan)


def _switch_off(model: nn.Module) -> None:
    model[1].running_mean = model[1].running_var = None


def _exchange_a_parameter(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(torch.randn(6, 4))


CHANGES = [_rebind, _grow, _register, _remove, _fill, _switch_off, _exchange_a_parameter]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_what_happens_to_buffers_and_parameters_is_taken_back(change: Callable[[nn.Module], None]) -> None:
    model = network()
    step(model)
    before = everything(model)
    with untouched(model):
        change(model)
        assert {name: before[name] for name in ("values", "keys", "objects")} != everything(model)
    assert everything(model) == before


def test_nan_in_a_memory_stays() -> None:
    model = nn.BatchNorm1d(2)
    model.running_mean[1] = torch.nan
    before = bits(model)
    with untouched(model):
        model(torch.randn(8, 2))
    assert bits(model) == before


def test_a_memory_that_grows_with_the_sequence_is_as_long_as_before() -> None:
    norm = Norm("[n] t c", memory=Moving("t c", decay=0.5, beyond={"t": "last"}))
    norm(torch.randn(8, 3, 2))
    before, mean = everything(norm), norm.running_mean
    with untouched(norm):
        norm(torch.randn(8, 5, 2))
        assert norm.running_mean.shape == (5, 2)
    assert everything(norm) == before
    assert norm.running_mean is mean
    norm(torch.randn(8, 4, 2))
    assert norm.num_batches_tracked.tolist() == [2, 2, 2, 1]


def test_skipped_batches_are_counted_on() -> None:
    layer = BatchNorm(3)
    with pytest.warns(UserWarning, match="^BatchNorm: the batch's statistics are not finite"):
        layer(torch.full((4, 3), torch.nan))
    before = everything(layer)
    with untouched(layer):
        for _ in range(3):
            layer(torch.full((4, 3), torch.inf))
        assert layer.skipped_batches == 4
    assert everything(layer) == before
    assert layer.skipped_batches == 1


def test_a_memory_that_only_a_probe_has_entered_is_empty() -> None:
    layer = BatchNorm(3)
    with untouched(layer):
        layer(torch.randn(8, 3))
        assert layer._is_fed()
    assert not layer._is_fed()


def test_a_domain_of_which_only_a_probe_was_seen_is_still_empty() -> None:
    layer = BatchNorm(3)
    with nw.domain(layer, "night"):
        layer(torch.randn(8, 3))
        with untouched(layer):
            layer(torch.randn(8, 3) + 9)
    before = bits(layer)
    with untouched(layer):
        layer(torch.randn(8, 3))
    assert bits(layer) == before
    with pytest.raises(nw.NormwiseError, match=r"^every batch was of a domain, and none is in use"):
        layer.eval()(torch.randn(8, 3))


def numbers() -> tuple[list[float], float, list[float]]:
    return torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()


def test_random_numbers_go_on_from_where_they_were() -> None:
    model = network()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = [numbers(), numbers()]
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    drawn = [numbers()]
    with untouched(model):
        assert numbers() == expected[1]  # within, they go on as well
        seed(0)
        first = numbers()
        with untouched(nn.Identity()):
            numbers()
        second = numbers()
    assert [*drawn, numbers()] == expected
    seed(0)
    assert [numbers(), numbers()] == [first, second]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_after_an_exception_as_well(error: type[BaseException]) -> None:
    class Interrupting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise error

    model = nn.Sequential(network(), Interrupting())
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    before = everything(model), numbers()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)

    def interrupted() -> None:
        with untouched(model):
            seed(1)
            model.eval()[0][1].train()
            model(torch.randn(8, 4))

    with pytest.raises(error):
        interrupted()
    assert (everything(model), numbers()) == before


def test_one_within_another() -> None:
    model = network()
    before = everything(model)
    with untouched(model):
        step(model)
        between = everything(model)
        with untouched(model), untouched(model[1]):
            step(model)
            assert everything(model) != between
        assert everything(model) == between
    assert everything(model) == before


def test_a_part_of_a_model_alone() -> None:
    model = network()
    before = everything(model[1]), bits(model[4])
    with untouched(model[1]):
        step(model)
    assert everything(model[1]) == before[0]
    assert bits(model[4]) != before[1]


def test_what_is_exchanged_within_stays() -> None:
    model = network()
    new = BatchNorm(6)
    with untouched(model):
        model[4] = new
    assert model[4] is new


def test_embeddings_that_a_forward_scales_and_plain_attributes() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.norm = nn.Embedding(9, 8, max_norm=1.0), nn.LayerNorm(8)
            self.calls, self.seen, self.total = 0, [], torch.zeros(())
            self.sizes: dict[str, int] = {}

        def forward(self, ids: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(ids)
            self.sizes["rows"] = len(ids)
            self.total += 1
            self.last = self.norm(self.words(ids))
            self.norm.register_forward_hook(lambda *_: None)
            return self.last

    model = Counting()
    weight = model.words.weight.detach().clone()
    with untouched(model):
        model(torch.arange(9))
        assert not torch.equal(model.words.weight, weight)
    assert torch.equal(model.words.weight, weight)
    assert (model.calls, model.seen, model.sizes, float(model.total)) == (0, [], {}, 0.0)
    assert not hasattr(model, "last")
    assert not model.norm._forward_hooks


def test_a_zero_that_becomes_negative() -> None:
    model = nn.BatchNorm1d(2)
    with untouched(model):
        model.running_mean.neg_()
    assert not model.running_mean.signbit().any()


ODD: dict[str, Callable[[], Tensor]] = {
    "complex": lambda: torch.tensor([1 + 2j, 3 - 1j]),
    "conjugated": lambda: torch.tensor([1 + 2j, 3 - 1j]).conj(),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "one number": lambda: torch.ones((), dtype=torch.bool),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
}


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_tensors_of_every_kind(make: Callable[[], Tensor]) -> None:
    model = nn.Identity()
    model.register_buffer("held", make())
    with untouched(model):
        model.held.copy_(torch.zeros_like(model.held))
        assert not as_made(model.held, make)
    assert as_made(model.held, make)


def as_made(held: Tensor, make: Callable[[], Tensor]) -> bool:
    numbers = [t.values() if t.is_nested else t.to_dense() for t in (held, make())]
    return torch.equal(*(t.to(torch.complex64) for t in numbers))


def test_what_is_as_it_was_is_not_written() -> None:
    """So an expanded tensor, whose elements share memory, is no problem, and a graph that has saved it stays whole."""
    model = nn.Identity()
    model.register_buffer("held", torch.tensor([float("nan")]).expand(4))
    with untouched(model):
        pass
    assert model.held._version == 0


def test_a_moment_leaves_weights_alone() -> None:
    model = nn.Embedding(3, 2, max_norm=100.0)
    moment = Moment(model)
    with torch.no_grad():
        model.weight.fill_(5.0)
    moment.back()
    assert torch.equal(model.weight, torch.full((3, 2), 5.0))


def test_generators_that_modules_hold() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(0)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn(x.shape, generator=self.generator)

    model, x = Noise(), torch.zeros(3)
    moment = Moment(model)
    first = model(x)
    moment.back()
    assert torch.equal(model(x), first)


def test_parameters_that_only_the_optimizer_has() -> None:
    model, scale = nn.Linear(2, 2), nn.Parameter(torch.ones(2))
    scale.grad = torch.full((2,), 3.0)
    optimizer = torch.optim.SGD([*model.parameters(), scale], 0.1)
    with untouched(model, values=True, optimizer=optimizer):
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(scale, torch.ones(2))
    assert torch.equal(scale, torch.ones(2))
    assert torch.equal(scale.grad, torch.full((2,), 3.0))


def test_an_autocast_around_it_forgets_the_weights_within() -> None:
    model, x = nn.Linear(1, 1, bias=False), torch.ones(1, 1)
    with torch.no_grad():
        model.weight.fill_(1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with untouched(model, values=True):
            model.weight.data.fill_(7.0)
            assert model(x).item() == 7.0
        assert model(x).item() == 1.0
