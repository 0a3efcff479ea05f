"""A model that was run within `untouched` is the model as it was: values, objects, modes, random numbers."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import normwise as nw
from normwise import Affine, BatchNorm, Moving, Norm
from normwise.untouched import Moment, seed, untouched
from tests.test_memory import bits


def network() -> nn.Sequential:
    """Memories of torch's and normwise's, dropout, a spectral norm, whose buffers move in training; a layer twice."""
    shared = BatchNorm(6)
    linear = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
    return nn.Sequential(nn.Linear(4, 6), shared, nn.Dropout(), linear, nn.BatchNorm1d(6), shared)


def objects(model: nn.Module) -> list[tuple[str, int]]:
    """Which tensors the model's parameters, gradients and buffers are, in order."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    tensors += [(f"{name}.grad", p.grad) for name, p in model.named_parameters() if p.grad is not None]
    return [(name, id(tensor)) for name, tensor in tensors]


def everything(model: nn.Module) -> dict[str, object]:
    """What has to be as before."""
    parameters = dict(model.named_parameters())
    return {
        "values": bits(model),
        "keys": list(model.state_dict()),
        "objects": objects(model),
        "modes": [(path, module.training) for path, module in model.named_modules()],
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "gradients": {name: None if p.grad is None else p.grad.tolist() for name, p in parameters.items()},
        "counts": [
            (path, None if skips is None else (id(skips), skips.tolist()), module.__dict__.get("_fed"))
            for path, module in model.named_modules()
            for skips in [module.__dict__.get("_skips")]
        ],
    }


def step(model: nn.Module, width: int = 4) -> Tensor:
    """A forward and a backward; the output."""
    y = model(torch.randn(8, width) * 3 + 1)
    (y * torch.randn_like(y)).sum().backward()
    return y


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


def lazy_torch() -> nn.Sequential:
    return nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(2))


def lazy_normwise() -> nn.Sequential:
    norm = Norm("[n] c", recovery=Affine("c"), memory=Moving("c", decay=0.9))
    return nn.Sequential(nn.Linear(4, 6), norm, Norm("n (g [k])", recovery=Affine("(g k)"), g=2))


UNSIZED = {"torch": lazy_torch, "normwise": lazy_normwise}
every_unsized = pytest.mark.parametrize("make", UNSIZED.values(), ids=UNSIZED)


@every_unsized
def test_a_layer_that_found_its_sizes_waits_for_them_again(make: Callable[[], nn.Sequential]) -> None:
    """And then finds others, with the first weights that it would have had without."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    twin, shown, identities = make(), repr(model), objects(model)
    with untouched(model):
        step(model)
        assert repr(model) != shown
        assert not any(map(nn.parameter.is_lazy, (*model.parameters(), *model.buffers())))
    assert (repr(model), objects(model)) == (shown, identities)
    assert [type(t) for t in (*model.parameters(), *model.buffers())] == [
        type(t) for t in (*twin.parameters(), *twin.buffers())
    ]
    if make is lazy_normwise:
        model[0], twin[0] = nn.Identity(), nn.Identity()
    width = 10
    torch.manual_seed(1)
    y = step(model, width)
    torch.manual_seed(1)
    assert torch.equal(step(twin, width), y)
    assert bits(model) == bits(twin)
    assert repr(model) == repr(twin)
    optimizer.step()
    assert bits(model) != bits(twin)


@every_unsized
def test_a_checkpoint_gives_sizes_after_a_probe_did(make: Callable[[], nn.Sequential]) -> None:
    model, trained = make(), make()
    step(trained)
    with untouched(model):
        step(model)
    model.load_state_dict(trained.state_dict(), strict=True)
    assert bits(model) == bits(trained)
    x = torch.randn(8, 4)
    assert torch.equal(model.eval()(x), trained.eval()(x))


def test_hooks_of_a_lazy_layer_stay_and_their_handles_work() -> None:
    model, calls = nn.LazyLinear(3), []
    handle = model.register_forward_hook(lambda *_: calls.append("mine"))
    with untouched(model):
        model(torch.randn(2, 4))
        model.register_forward_hook(lambda *_: calls.append("a probe's"))
    model(torch.randn(2, 5))
    assert (calls, model.in_features, type(model)) == (["mine", "mine"], 5, nn.Linear)
    handle.remove()
    model(torch.randn(2, 5))
    assert calls == ["mine", "mine"]


def test_a_layer_that_a_probe_does_not_reach_still_waits() -> None:
    model = nn.ModuleList([nn.LazyLinear(3), Norm("[n] c", recovery=Affine("c"))])
    shown = repr(model)
    with untouched(model):
        pass
    assert repr(model) == shown
    assert [p.requires_grad for p in model.parameters()] == [True] * 4


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


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), 0.1),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), 0.01, amsgrad=True),
    "a tensor's rate": lambda model: torch.optim.Adam(model.parameters(), torch.tensor(0.01)),
    "L-BFGS": lambda model: torch.optim.LBFGS(model.parameters(), 0.1, max_iter=2),
}


def optimized(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 2])
def test_training_within_is_taken_back_with_its_optimizer(
    make: Callable[[nn.Module], torch.optim.Optimizer], steps: int
) -> None:
    """The rest of the training is, bit for bit, that of a twin that was left alone."""

    def trained(within: Callable[[nn.Module, torch.optim.Optimizer], None]) -> tuple[object, object]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 6), BatchNorm(6), nn.Dropout(), nn.Linear(6, 2))
        optimizer = make(model)
        for _ in range(steps):
            optimized(model, optimizer)
        before = everything(model), [id(p) for p in optimizer.state]
        within(model, optimizer)
        assert (everything(model), [id(p) for p in optimizer.state]) == before
        for _ in range(2):
            optimized(model, optimizer)
        return bits(model), repr(optimizer)

    def measured(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        weight = model[0].weight.detach().clone()
        with untouched(model, values=True, optimizer=optimizer):
            for group in optimizer.param_groups:
                group["lr"] = 3.0
                group["new"] = 1
            for _ in range(2):
                optimized(model, optimizer)
            assert not torch.equal(model[0].weight, weight)

    assert trained(measured) == trained(lambda model, optimizer: None)


def test_values_of_parameters_only_when_asked_for() -> None:
    model = network()
    before = bits(model)
    for values in (True, False):
        with untouched(model, values=values), torch.no_grad():
            model[0].weight.add_(1.0)
        assert (bits(model) == before) is values


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_loader_gives_the_batches_it_would_have_given(shuffle: bool) -> None:
    def drawn(looked_at: bool) -> list[object]:
        order = torch.Generator().manual_seed(3)
        loader = DataLoader(torch.arange(20), 4, shuffle=shuffle, generator=order)
        coming = iter(loader)
        seen = [next(coming).tolist()]
        if looked_at:
            with untouched(network(), batches=loader):
                [batch.tolist() for batch in loader]
        seen += [batch.tolist() for batch in coming]
        return [*seen, *(batch.tolist() for batch in loader), order.initial_seed(), order.get_state().tolist()]

    assert drawn(True) == drawn(False)


def test_a_sampler_with_a_generator_of_its_own() -> None:
    own = torch.Generator().manual_seed(3)
    sampler = torch.utils.data.RandomSampler(range(12), generator=own)
    loaders = [
        DataLoader(torch.arange(12), 4, sampler=sampler),
        DataLoader(torch.arange(12), batch_sampler=torch.utils.data.BatchSampler(sampler, 4, drop_last=False)),
    ]
    for loader in loaders:
        before = own.get_state()
        with untouched(network(), batches=loader):
            list(loader)
            assert not torch.equal(own.get_state(), before)
        assert torch.equal(own.get_state(), before)


def test_a_moment_can_be_gone_back_to_any_number_of_times() -> None:
    model, x = network(), torch.randn(8, 4)
    moment = Moment(model)
    first, memory = model(x), bits(model)
    for _ in range(3):
        seed(9)
        step(model)
        model.eval()
        moment.back()
        assert torch.equal(model(x), first)
        assert bits(model) == memory


def test_a_moment_leaves_weights_and_gradients() -> None:
    model = network()
    moment = Moment(model)
    step(model)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    weight, grad = model[0].weight.detach().clone(), model[0].weight.grad.clone()
    moment.back()
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(model[0].weight.grad, grad)
