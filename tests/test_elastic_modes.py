"""A memory along time that is saved, loaded, copied, frozen, held, divided into domains, accumulated and compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import normwise as nw
from normwise import Frozen, Norm
from tests.by_step import LAST, POOLED, ByStep, elastic, grown, sequences, standardized
from tests.tolerances import COMPILED, EXACT, MEMORY, VALUES, check


def test_a_checkpoint_sets_the_length() -> None:
    norm, _ = grown()
    x = sequences(3, 7)
    expected = norm.eval()(x)
    for other in (elastic(), elastic(c=3), elastic(t=8), elastic(t=2, c=3)):
        other.load_state_dict(norm.state_dict(), strict=True)
        assert other.running_mean.shape == other.batch_samples.shape == (5, 3)
        assert torch.equal(other.num_batches_tracked, norm.num_batches_tracked)
        assert torch.equal(other.eval()(x), expected)
    longer = elastic()
    longer(sequences(4, 9))
    longer.load_state_dict(norm.state_dict(), strict=True)
    assert torch.equal(longer.eval()(x), expected)
    longer.train()(sequences(4, 9), lengths={"t": [9, 9, 4, 1]})  # and it grows again
    assert longer.num_batches_tracked.tolist() == [4, 4, 4, 3, 2, 1, 1, 1, 1]
    assert copy.deepcopy(longer).running_mean.shape == (9, 3)


def test_copies_and_precisions() -> None:
    norm, _ = grown()
    x = sequences(3, 7)
    copied = copy.deepcopy(norm)
    copied(sequences(4, 6))
    assert norm.running_mean.shape == (5, 3)
    assert copied.running_mean.shape == (6, 3)
    half = copy.deepcopy(norm).half()
    assert {buffer.dtype for buffer in half.buffers()} == {torch.float32, torch.int64}
    check(half.eval()(x.half()).float(), norm.eval()(x.half().float()).half().float(), VALUES)
    half.train()(sequences(4, 7).half())
    assert half.running_mean.shape == (7, 3)
    assert half.running_mean.dtype is torch.float32


def test_frozen_steps_come_from_a_checkpoint() -> None:
    norm, _ = grown()
    frozen = Norm("[n] t c", memory=Frozen("t c", beyond=LAST))
    frozen.load_state_dict(norm.state_dict())
    x = sequences(3, 7)
    assert torch.equal(frozen(x), norm.eval()(x))
    assert frozen.running_mean.shape == (5, 3)


def test_frozen_and_held_memories_do_not_grow() -> None:
    norm, _ = grown()
    before, x = copy.deepcopy(norm.state_dict()), sequences(4, 9)
    with nw.freeze(norm):
        assert torch.equal(norm(x), copy.deepcopy(norm).eval()(x))
    with nw.no_update(norm):
        check(norm(x).double(), standardized(x), EXACT)
    assert norm.running_mean.shape == (5, 3)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_domains_grow_together_and_remember_apart() -> None:
    norm, day, night = elastic(), ByStep(5), ByStep(5)
    for name, steps, t in (("day", day, 3), ("night", night, 5), ("day", day, 2)):
        x = sequences(6, t)
        with nw.domain(norm, name):
            norm(x)
        steps.see(x)
    loaded = elastic()
    loaded.load_state_dict(norm.state_dict())
    x = sequences(2, 6)
    for name, steps in (("day", day), ("night", night)):
        with nw.domain(loaded, name):
            steps.check(loaded._domains.get_submodule(name))  # type: ignore[arg-type]
            y = loaded.eval()(x)
        check(y[:, 5].double(), steps.apply(x, 5, 2 if name == "day" else 4), MEMORY)


@pytest.mark.parametrize("parts", [(4, 5, 3), (3, 4, 5), (5, 3, 4)], ids=str)
def test_accumulated_steps_are_those_of_the_joined_batches(parts: tuple[int, ...]) -> None:
    norm, steps = elastic(), ByStep(5)
    batch, lengths = sequences(9, 5), [t for t in parts for _ in range(3)]
    with nw.accumulate(norm, 3):
        for t, part in zip(parts, batch.split(3), strict=True):
            norm(part[:, :t])
    steps.see(batch, lengths)
    steps.check(norm)
    assert steps.batches == [1] * 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # the compiler's own
def test_compiled_with_a_declared_length() -> None:
    eager = nn.ModuleList(elastic(beyond, t=4, c=3) for beyond in (LAST, POOLED))
    traced = copy.deepcopy(eager)

    def both(model: nn.ModuleList, x: Tensor, lengths: Tensor) -> Tensor:
        return torch.stack([layer(x, lengths={"t": lengths}) for layer in model])

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for t, training in ((4, True), (3, True), (6, True), (6, False)):
        x, lengths = sequences(6, t), torch.tensor([t, t, 2, 2, 1, 0])
        check(compiled(traced.train(training), x, lengths), both(eager.train(training), x, lengths), COMPILED)
    for name, value in eager.state_dict().items():
        check(traced.state_dict()[name], value, COMPILED)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # the compiler's own
def test_growth_in_compiled_code_is_refused() -> None:
    norm = elastic(c=3)
    norm(sequences(4, 3))
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    with pytest.raises(
        Exception, match="memory of axis 't' cannot grow in compiled code: declare how long it is"
    ) as caught:
        compiled(sequences(4, 5))
    assert "t=5, or run the longest batch once in eager mode" in str(caught.value)
    assert norm.running_mean.shape == (3, 3)
