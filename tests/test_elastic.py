"""A memory along time: it grows with the sequences, counts who is alive, and says what stands in beyond its end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch

import normwise as nw
from normwise import RMS, Affine, Average, Moving, Norm, NormwiseError, Renorm
from normwise.memory import Beyond
from tests.by_step import EPS, LAST, POOLED, RAISE, ByStep, elastic, grown, sequences, standardized
from tests.tolerances import DOUBLE, EXACT, MEMORY, VALUES, check


def test_it_grows_with_the_longest_sequence_in_training() -> None:
    norm, steps = elastic(), ByStep(5)
    for t, length in ((3, 3), (5, 5), (4, 5)):
        x = sequences(8, t)
        check(norm(x).double(), standardized(x), EXACT)
        steps.see(x)
        assert norm.running_mean.shape == norm.batch_samples.shape == (length, 3)
    steps.check(norm)
    assert steps.batches == [3, 3, 3, 2, 1]
    assert norm.batch_samples.tolist() == [[8.0] * 3] * 4 + [[0.0] * 3]
    before = copy.deepcopy(norm.state_dict())
    norm.eval()(sequences(8, 9))
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_an_average_counts_the_batches_of_each_step() -> None:
    norm, steps = Norm("[n] t c", memory=Average("t c", beyond=LAST)), ByStep(5, rate=None)
    for t, lengths in ((3, None), (5, [5, 5, 3, 1, 0, 2]), (4, [4, 1, 1, 1, 1, 1])):
        x = sequences(6, t)
        norm(x, lengths=None if lengths is None else {"t": lengths})
        steps.see(x, lengths)
    steps.check(norm)
    assert steps.batches == [3, 2, 2, 1, 1]


def test_a_mean_square_for_each_step() -> None:
    norm = Norm("[n] t c", RMS(EPS), memory=Moving("t c", update_rate=1.0, beyond=POOLED))
    x = sequences(6, 4)
    norm(x, lengths={"t": [4, 3, 2, 2, 1, 0]})
    alive = [x[:5, 0], x[:4, 1], x[:2, 2], x[:1, 3]]
    expected = torch.stack([step.double().square().mean(0) for step in alive])
    check(norm.running_mean_square.double(), expected, MEMORY)
    longer = sequences(2, 6).double()
    y = norm.double().eval()(longer)
    square = torch.cat([expected, expected.mean(0).expand(2, 3)])
    check(y.float(), (longer / (square + EPS).sqrt()).float(), VALUES)


def test_a_declared_length_is_all_that_is_remembered() -> None:
    norm, steps = elastic(t=4, c=3), ByStep(4)
    assert norm.running_mean.shape == (4, 3)
    for t in (2, 6, 4):
        x = sequences(8, t)
        check(norm(x).double(), standardized(x), EXACT)
        steps.see(x)
    steps.check(norm)
    assert steps.batches == [3, 3, 2, 2]
    x = sequences(5, 6)
    check(norm.eval()(x)[:, 5].double(), steps.apply(x, 5, 3), MEMORY)


@pytest.mark.parametrize("t", [1, 3, 5])
def test_shorter_sequences_in_evaluation_use_their_steps(t: int) -> None:
    norm, steps = grown()
    x = sequences(2, t)
    expected = torch.stack([steps.apply(x, step, step) for step in range(t)], 1)
    check(norm.eval()(x).double(), expected, MEMORY)


def test_longer_sequences_use_the_last_step() -> None:
    norm, steps = grown()
    x = sequences(2, 9)
    y = norm.eval()(x)
    for step in range(9):
        check(y[:, step].double(), steps.apply(x, step, min(step, 4)), MEMORY)


def test_pooled_is_the_law_of_total_variance() -> None:
    norm = Norm("[n] t c", memory=Moving("t c", update_rate=1.0, unbiased=False, beyond=POOLED), t=6).double()
    x = sequences(16, 4, torch.double)
    norm(x)
    everything, longer = x.reshape(-1, 3), sequences(3, 9, torch.double)
    expected = (longer[:, 4:] - everything.mean(0)) / (everything.var(0, unbiased=False) + EPS).sqrt()
    y = norm.eval()(longer)
    check(y[:, 4:], expected, DOUBLE)  # steps 4 and 5 have a place, which no batch has entered
    own = (longer[:, :4] - x.mean(0)) / (x.var(0, unbiased=False) + EPS).sqrt()
    check(y[:, :4], own, DOUBLE)


def test_last_is_the_last_step_that_a_batch_has_entered() -> None:
    norm, steps = elastic(t=6), ByStep(6)
    x = sequences(8, 6)
    valid = torch.tensor([False, True, True, False, True, False]).expand(8, 6)
    norm(x, valid=valid)
    steps.see(x)
    y = norm.eval()(x)
    for step, at in enumerate([1, 1, 2, 2, 4, 4]):
        check(y[:, step].double(), steps.apply(x, step, at), MEMORY)


@pytest.mark.parametrize("beyond", [LAST, POOLED], ids=["last", "pooled"])
def test_a_step_counts_the_sequences_alive_at_it(beyond: Mapping[str, Beyond]) -> None:
    norm, steps = elastic(beyond), ByStep(5)
    earlier, x = sequences(8, 5), sequences(6, 5)
    norm(earlier)
    steps.see(earlier)
    y = norm(x, lengths={"t": [5, 4, 4, 3, 1, 0]})
    fallback = steps.apply(x, 4, 4)
    steps.see(x, [5, 4, 4, 3, 1, 0])
    steps.check(norm)
    assert norm.batch_samples[:, 0].tolist() == [5.0, 4.0, 4.0, 3.0, 1.0]
    assert steps.batches == [2, 2, 2, 2, 1]  # the last step is seen by one sequence, and has its own memory
    for step, alive in enumerate([5, 4, 4, 3]):
        check(y[:alive, step].double(), standardized(x[:alive, step]), EXACT)
        assert not y[alive:, step].any()
    check(y[0, 4].double(), fallback[0], MEMORY)
    assert not y[1:, 4].any()


def test_a_step_without_a_memory_yet_falls_back_on_the_last_one_that_has() -> None:
    norm, steps = elastic(), ByStep(5)
    earlier, x = sequences(8, 3), sequences(6, 5)
    norm(earlier)
    steps.see(earlier)
    y = norm(x, lengths={"t": [5, 1, 1, 1, 1, 1]})
    for step in range(1, 5):
        check(y[0, step].double(), steps.apply(x, step, min(step, 2))[0], MEMORY)


def test_without_a_fallback_a_lone_step_is_zero() -> None:
    norm = elastic(RAISE)
    x = sequences(6, 5)
    y = norm(x, lengths={"t": [5, 4, 4, 3, 1, 0]})
    assert not y[:, 4].any()
    assert y[:4, :3].abs().amin((0, 1)).any()
    assert norm.num_batches_tracked.tolist() == [1, 1, 1, 1, 0]


def test_growth_under_a_mask_is_never_refused_in_training() -> None:
    x = sequences(6, 5)
    memory = Moving("t c", decay=0.5, degenerate="memory", beyond=RAISE)
    norm = Norm("[n] t c", memory=memory)
    norm(x[:, :2], lengths={"t": [2, 2, 2, 2, 1, 1]})
    y = norm(x, lengths={"t": [5, 5, 3, 3, 1, 1]})
    check(y[:2, 4].double(), standardized(x[:2, 4]), EXACT)
    assert norm.num_batches_tracked.tolist() == [2, 2, 1, 1, 1]
    fresh = elastic()
    with nw.no_update(fresh):
        y = fresh(x, lengths={"t": [5, 5, 4, 3, 1, 0]})
    check(y[:2, 4].double(), standardized(x[:2, 4]), EXACT)


def test_growth_of_a_corrected_memory() -> None:
    x = sequences(6, 5)
    for beyond in (LAST, RAISE):
        norm = Norm("[n] t c", memory=Moving("t c", decay=0.5, beyond=beyond, renorm=Renorm(warmup=10)))
        norm(x[:, :2])
        check(norm(x).double(), standardized(x), EXACT)
        assert norm.num_batches_tracked.tolist() == [2, 2, 1, 1, 1]


ORDERS: dict[str, tuple[str, str, tuple[int, ...], tuple[int, ...]]] = {
    "[n] c t": ("[n] c t", "c t", (0, 2, 1), (1, 0)),
    "[n] c t, remembered as t c": ("[n] c t", "t c", (0, 2, 1), (0, 1)),
    "[n] t c, remembered as c t": ("[n] t c", "c t", (0, 1, 2), (1, 0)),
    "t [n] c": ("t [n] c", "t c", (1, 0, 2), (0, 1)),
    "c t [n]": ("c t [n]", "c t", (2, 1, 0), (1, 0)),
}


@pytest.mark.parametrize(("text", "over", "order", "kept"), ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("beyond", [LAST, POOLED], ids=["last", "pooled"])
def test_the_axes_stand_in_any_order(
    text: str, over: str, order: tuple[int, ...], kept: tuple[int, ...], beyond: Mapping[str, Beyond]
) -> None:
    plain, other = elastic(beyond), elastic(beyond, text, over)
    for t in (3, 5, 4):
        x, valid = sequences(8, t), torch.rand(8, t) < 0.7
        y = other(x.permute(order), valid=valid, valid_axes="n t")
        check(y, plain(x, valid=valid).permute(order), VALUES)
    check(other.running_mean, plain.running_mean.permute(kept), MEMORY)
    check(other.running_var, plain.running_var.permute(kept), MEMORY)
    assert torch.equal(other.num_batches_tracked, plain.num_batches_tracked)
    assert torch.equal(other.batch_samples, plain.batch_samples.permute(kept))
    x = sequences(3, 7)
    check(other.eval()(x.permute(order)), plain.eval()(x).permute(order), VALUES)


def test_kept_axes_that_are_not_remembered_are_averaged() -> None:
    norm = Norm("n c [h] t", memory=Moving("t", update_rate=1.0, beyond=LAST))
    x = torch.randn(2, 3, 9, 4) * torch.arange(1.0, 5)
    norm(x[..., :2])
    norm(x)
    check(norm.running_mean.double(), x.double().mean((0, 1, 2)), MEMORY)
    check(norm.running_var.double(), x.double().var(2).mean((0, 1)), MEMORY)
    assert norm.batch_samples.tolist() == [2 * 3 * 9] * 4
    assert norm.num_batches_tracked.tolist() == [2, 2, 1, 1]


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "nothing remembered": (
        lambda: elastic().eval()(torch.zeros(2, 3, 3)),
        "nothing is remembered along axis 't' yet: train, or load a checkpoint",
    ),
    "longer": (
        lambda: _trained(RAISE, 3).eval()(torch.zeros(2, 5, 3)),
        "axis 't' has 5 places, 3 are remembered, and beyond={'t': 'raise'} allows none; 'last' and 'pooled' do",
    ),
    "not entered": (
        lambda: _trained(RAISE, 3, t=6).eval()(torch.zeros(2, 5, 3)),
        "axis 't' has places within the first 5 that no batch has entered, "
        "and beyond={'t': 'raise'} allows none; 'last' and 'pooled' do",
    ),
    "an axis that is not remembered": (
        lambda: Norm("[n] t c", memory=Moving("c", decay=0.9, beyond=LAST)),
        "Moving says what is beyond axis 't', but does not remember it\n  [n] t c\n      ^",
    ),
    "an axis with parameters": (
        lambda: Norm("[n] t c", recovery=Affine("t"), memory=Moving("t c", decay=0.9, beyond=LAST)),
        "the length of axis 't' may differ, so it can have no parameters\n  [n] t c\n      ^",
    ),
    "an axis that is not there": (
        lambda: Norm("[n] t c", memory=Average("t c", beyond={"x": "last"})),
        "Average's beyond names axis 'x', which is not in the pattern (it has n, t, c)\n  [n] t c",
    ),
}


def _trained(beyond: Mapping[str, Beyond], steps: int, **sizes: int) -> Norm:
    norm = elastic(beyond, **sizes)
    norm(torch.randn(4, steps, 3))
    return norm


@pytest.mark.parametrize(("provoke", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_word_for_word(provoke: Callable[[], object], message: str) -> None:
    with pytest.raises(NormwiseError) as caught:
        provoke()
    assert str(caught.value) == message


def test_words_and_axes_of_beyond() -> None:
    with pytest.raises(ValueError, match=r"^beyond of axis 't' is one of 'last', 'pooled', 'raise', not 'first'$"):
        elastic({"t": "first"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"^beyond names one axis, not 2: t, c$"):
        elastic({"t": "last", "c": "last"})


def test_a_raise_allows_what_is_remembered() -> None:
    norm = _trained(RAISE, 5)
    x = sequences(2, 5)
    whole = norm.eval()(x)
    assert torch.equal(norm(x[:, :3]), whole[:, :3])


@pytest.mark.parametrize("beyond", [LAST, POOLED, RAISE], ids=["last", "pooled", "raise"])
def test_sequences_of_no_steps_are_empty(beyond: Mapping[str, Beyond]) -> None:
    for norm in (elastic(beyond, c=3), _trained(beyond, 3)):
        assert norm(torch.zeros(2, 0, 3)).shape == norm.eval()(torch.zeros(2, 0, 3)).shape == (2, 0, 3)
