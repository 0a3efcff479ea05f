"""A forward that is computed again: one commit, the plain run's buffers bit for bit, the plain run's gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import normwise as nw
from normwise import Average, BatchNorm, InstanceNorm, Moving, Norm, RecomputeError, Renorm
from tests.test_memory import bits
from tests.tolerances import COMPILED, GRADIENTS, check

Call = Callable[[nn.Module, Tensor], Tensor]

both_modes = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
OPEN = Renorm(warmup=0, r_ramp=0, d_ramp=0)


def block() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 4),
        BatchNorm(4),
        nn.Tanh(),
        nn.Linear(4, 4),
        Norm("[n] c", memory=Average("c"), c=4),
        nn.Unflatten(1, (2, 2)),
        InstanceNorm(2, track_running_stats=True),
        nn.Flatten(),
    )


def run(model: nn.Module, call: Call, *batches: Tensor) -> list[Tensor]:
    """The gradients of all inputs and parameters, after one backward over all batches."""
    torch.manual_seed(5)
    leaves = [batch.clone().requires_grad_() for batch in batches]
    outputs = [call(model, leaf) for leaf in leaves]
    loss = sum((y * torch.randn_like(y)).sum() for y in outputs)
    model.zero_grad()
    loss.backward()
    return [leaf.grad for leaf in leaves] + [parameter.grad for parameter in model.parameters()]


def checkpointed(reentrant: bool) -> Call:
    return partial(_checkpointed, reentrant=reentrant)


def _checkpointed(model: nn.Module, x: Tensor, *, reentrant: bool) -> Tensor:
    return checkpoint(model, x, use_reentrant=reentrant)


def _nested(model: nn.Module, x: Tensor, *, reentrant: bool) -> Tensor:
    def inner(x: Tensor) -> Tensor:
        return checkpoint(
            model[3:], checkpoint(model[1:3], model[0](x), use_reentrant=reentrant), use_reentrant=reentrant
        )

    return checkpoint(inner, x, use_reentrant=reentrant)


def _in_segments(model: nn.Module, x: Tensor, *, reentrant: bool) -> Tensor:
    return checkpoint_sequential(model, 3, x, use_reentrant=reentrant)


def _layer_by_layer(model: nn.Module, x: Tensor, *, reentrant: bool) -> Tensor:
    for layer in model:
        x = checkpoint(layer, x, use_reentrant=reentrant)
    return x


SCHEMES: dict[str, Callable[..., Tensor]] = {
    "one block": _checkpointed,
    "nested": _nested,
    "segments": _in_segments,
    "layer by layer": _layer_by_layer,
}


def _plainly(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


@both_modes
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of the inner reentrant one
def test_a_checkpointed_forward_commits_once(scheme: Callable[..., Tensor], reentrant: bool) -> None:
    plain = block()
    recomputed = copy.deepcopy(plain)
    for _ in range(2):
        x = torch.randn(8, 3)
        expected = run(plain, _plainly, x)
        found = run(recomputed, partial(scheme, reentrant=reentrant), x)
        assert bits(recomputed) == bits(plain)
        for grad, wanted in zip(found, expected, strict=True):
            assert torch.equal(grad, wanted)
    assert recomputed[1].num_batches_tracked.item() == 2


@both_modes
def test_a_block_called_twice_before_one_backward(reentrant: bool) -> None:
    plain = block()
    recomputed = copy.deepcopy(plain)
    x = torch.randn(8, 3)
    for batches in ((torch.randn(8, 3), torch.randn(5, 3)), (x, x)):
        expected = run(plain, _plainly, *batches)
        found = run(recomputed, checkpointed(reentrant), *batches)
        assert bits(recomputed) == bits(plain)
        for grad, wanted in zip(found, expected, strict=True):
            check(grad, wanted, GRADIENTS)
    assert recomputed[1].num_batches_tracked.item() == 4


def test_a_backward_over_a_kept_graph_commits_nothing_more() -> None:
    layer = BatchNorm(3)
    x = torch.randn(8, 3, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=False)
    for _ in range(2):
        y.backward(torch.randn_like(y), retain_graph=True)
    layer(x)
    assert layer.num_batches_tracked.item() == 2


@both_modes
@pytest.mark.filterwarnings("ignore:.*statistics are not finite")
def test_a_skipped_batch_is_counted_once(reentrant: bool) -> None:
    layer = BatchNorm(3)
    x = torch.randn(8, 3)
    x[0, 0] = torch.inf
    leaf = x.requires_grad_()
    checkpoint(layer, leaf, use_reentrant=reentrant).nan_to_num(0.0).sum().backward()
    assert (layer.num_batches_tracked.item(), layer.skipped_batches.item()) == (0, 1)


@both_modes
def test_a_recomputed_micro_batch_enters_its_window_once(reentrant: bool) -> None:
    plain = block()[:5]
    recomputed = copy.deepcopy(plain)
    parts = torch.randn(4, 8, 3)
    with nw.accumulate(plain, 4):
        for part in parts:
            run(plain, _plainly, part)
    with nw.accumulate(recomputed, 4):
        for part in parts:
            run(recomputed, checkpointed(reentrant), part)
    assert bits(recomputed) == bits(plain)
    assert recomputed[1].num_batches_tracked.item() == 1


def _still(model: nn.Module) -> nn.Module:
    nw.freeze(model, parameters=False)
    return model


@both_modes
@pytest.mark.parametrize("still", [nn.Module.eval, _still], ids=["evaluation", "frozen"])
def test_still_layers_in_a_domain_are_computed_again_with_its_memory(
    still: Callable[[nn.Module], nn.Module], reentrant: bool
) -> None:
    plain = block()
    plain(torch.randn(8, 3))
    with nw.domain(plain, "night"):
        plain(torch.randn(8, 3) * 4 + 2)
    still(plain)
    recomputed, x = copy.deepcopy(plain), torch.randn(8, 3)
    with nw.domain(plain, "night"):
        expected = run(plain, _plainly, x)
    with nw.domain(recomputed, "night"):
        found = run(recomputed, checkpointed(reentrant), x)
    for grad, wanted in zip(found, expected, strict=True):
        assert torch.equal(grad, wanted)
    assert bits(recomputed) == bits(plain)
    outside = run(plain, _plainly, x)
    assert not torch.equal(outside[0], expected[0])


READERS: dict[str, Callable[[], Norm]] = {
    "renormalized": lambda: Norm("[n] c", memory=Moving("c", update_rate=0.5, renorm=OPEN), c=4),
    "renormalized, kept axes averaged": lambda: Norm(
        "n (c [k])", memory=Moving("c", update_rate=0.5, renorm=OPEN), c=2, k=2
    ),
    "masked": lambda: Norm("[n] c", memory=Moving("c", update_rate=0.5, degenerate="memory"), c=4),
}
every_reader = pytest.mark.parametrize("make", READERS.values(), ids=READERS)


def reader(make: Callable[[], Norm]) -> nn.Module:
    """A block whose norm reads its memory in training."""
    return nn.ModuleList([nn.Linear(3, 4), make(), nn.Linear(4, 4)])


def _read(model: nn.ModuleList, x: Tensor) -> Tensor:
    first, norm, last = model
    valid = None
    if norm.spec.memory.renorm is None:  # one row in the first channel: the memory is what there is
        valid = torch.ones(x.shape[0], 4, dtype=torch.bool)
        valid[1:, 0] = False
    return last(torch.tanh(norm(first(x), valid=valid, valid_axes=None if valid is None else "n c")))


def _read_again(model: nn.ModuleList, x: Tensor, *, reentrant: bool) -> Tensor:
    return checkpoint(_read, model, x, use_reentrant=reentrant)


@both_modes
@every_reader
def test_a_layer_that_reads_its_memory_is_computed_again_as_it_was(make: Callable[[], Norm], reentrant: bool) -> None:
    plain = reader(make)
    recomputed, x = copy.deepcopy(plain), torch.randn(8, 3)
    for batch in (torch.randn(8, 3), x, x):  # one batch may come again, after its backward
        expected = run(plain, _read, batch)
        found = run(recomputed, partial(_read_again, reentrant=reentrant), batch)
        assert bits(recomputed) == bits(plain)
        for grad, wanted in zip(found, expected, strict=True):
            assert torch.equal(grad, wanted)
    assert plain[1].num_batches_tracked.item() == 3


def check_right_or_refused(model: nn.Module, call: Call, *batches: Tensor) -> None:
    """Gradients are those of the plain run, or there are none."""
    plain = copy.deepcopy(model)
    expected = run(plain, _read, *batches)
    try:
        found = run(model, call, *batches)
    except RecomputeError:
        return
    for grad, wanted in zip(found, expected, strict=True):
        check(grad, wanted, GRADIENTS)


@both_modes
@every_reader
def test_another_batch_seen_between_forward_and_backward_is_refused(make: Callable[[], Norm], reentrant: bool) -> None:
    model = reader(make)
    call = partial(_read_again, reentrant=reentrant)
    with pytest.raises(RecomputeError) as caught:
        run(model, call, torch.randn(8, 3), torch.randn(8, 3))
    assert str(caught.value) == (
        "Norm: a checkpointed forward is computed again, but its memory has seen another batch since: this layer reads "
        "its memory in training, so run each backward before the next forward, or do not checkpoint it"
    )
    assert model[1].num_batches_tracked.item() == 2


@both_modes
@every_reader
@pytest.mark.parametrize("between", [lambda x: x, lambda x: x.flip(0)], ids=["same", "reordered"])
def test_the_same_batch_seen_between_forward_and_backward_is_right_or_refused(
    make: Callable[[], Norm], between: Callable[[Tensor], Tensor], reentrant: bool
) -> None:
    """Its sums are those of the first, its memory is not."""
    x = torch.randint(-8, 8, (8, 3)).float()
    check_right_or_refused(reader(make), partial(_read_again, reentrant=reentrant), x, between(x))


@both_modes
def test_a_probe_between_forward_and_backward_is_right_or_refused(reentrant: bool) -> None:
    model = reader(READERS["renormalized"])
    probe = torch.randn(8, 3)

    def call(model: nn.Module, x: Tensor) -> Tensor:
        y = _read_again(model, x, reentrant=reentrant)
        with nw.no_update(model):
            _read(model, probe)
        return y

    check_right_or_refused(model, call, torch.randn(8, 3))


@both_modes
def test_one_sample_that_memory_stands_in_for_is_computed_again_with_the_memory_it_saw(reentrant: bool) -> None:
    """Batches that do not read the memory, but move it, may come between."""
    plain = reader(lambda: Norm("[n] c", memory=Moving("c", update_rate=0.5, degenerate="memory"), c=4))

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        return model[2](torch.tanh(model[1](model[0](x))))

    def again(model: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(forward, model, x, use_reentrant=reentrant)

    forward(plain, torch.randn(8, 3))
    recomputed = copy.deepcopy(plain)
    batches = torch.randn(1, 3), torch.randn(8, 3)
    expected = run(plain, forward, *batches)
    for grad, wanted in zip(run(recomputed, again, *batches), expected, strict=True):
        check(grad, wanted, GRADIENTS)
    assert bits(recomputed) == bits(plain)
    assert plain[1].num_batches_tracked.item() == 2


COMPILED_BLOCKS = {
    "checkpoint(compile(block))": (True, "aot_eager", True),
    "checkpoint(compile(block)), not reentrant": (True, "aot_eager", False),
    "compile(checkpoint(block))": (False, "aot_eager", True),
    "compile(checkpoint(block)), not reentrant": (False, "inductor", False),
}


@pytest.mark.slow
@pytest.mark.parametrize(("inside", "backend", "reentrant"), COMPILED_BLOCKS.values(), ids=COMPILED_BLOCKS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_one_commit_with_a_compiler_inside_or_outside(inside: bool, backend: str, reentrant: bool) -> None:
    torch._dynamo.reset()
    plain = nn.Sequential(*block()[:5], Norm("[n] c", memory=Moving("c", update_rate=0.5, renorm=OPEN), c=4))
    model = copy.deepcopy(plain)
    compiling = partial(torch.compile, fullgraph=True, backend=backend)
    call = checkpointed(reentrant)
    if inside:
        compiled = compiling(model)
    else:
        compiled, call = compiling(partial(call, model)), _plainly
    for _ in range(2):
        x = torch.randn(8, 3)
        expected = run(plain, _plainly, x)
        found = run(model, lambda _, leaf: call(compiled, leaf), x)
        for grad, wanted in zip(found, expected, strict=True):
            check(grad, wanted, COMPILED)
        for name, value in plain.state_dict().items():
            check(model.state_dict()[name], value, COMPILED)
    assert model[1].num_batches_tracked.item() == model[4].num_batches_tracked.item() == 2
