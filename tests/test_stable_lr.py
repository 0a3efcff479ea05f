"""The largest stable learning rate: outcomes, a grid that widens by itself, and edges that are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import normwise as nw
from normwise.diagnose.chance import chance_of
from normwise.diagnose.lattice import rate, rung
from normwise.diagnose.rate_grid import (
    Trial,
    best,
    best_edge,
    declared,
    diverge_edge,
    largest_training,
    next_rates,
    sensitivity,
    train_edge,
)
from normwise.diagnose.stable_lr import RANGES, StableRates, max_stable_lr
from normwise.errors import DiagnosisError

# ---------------------------------------------------------------------------------------------------- the grid alone


def trial(lr: float, seed: int = 0, loss: float | None = 1.0, first: float = 2.0) -> Trial:
    """One that ended at a loss (None: diverged)."""
    outcome = "diverged" if loss is None else "trains" if loss < 1 else "stuck"
    return Trial(lr, seed, outcome, first, loss, loss, 10)


def grown(outcome: Callable[[float, int], float | None], seeds: int = 2, *, low: float = 2**-8, high: float = 4) -> Any:
    """The grid that a network with these final losses by octave and seed ends up with."""
    start = declared(low, high)
    grid: dict[float, list[Trial]] = {}
    while wanted := next_rates(grid, start, (1.0, 1.8)):
        assert not set(wanted) & set(grid)
        grid |= {lr: [trial(lr, seed, outcome(math.log2(lr), seed)) for seed in range(seeds)] for lr in wanted}
        grid = dict(sorted(grid.items()))
    return grid


def bowl(centre: float, edge: float, diverges: float) -> Callable[[float, int], float | None]:
    """Best at an octave, stuck above another, diverging from a third on; the second seed all half an octave higher."""

    def outcome(octave: float, seed: int) -> float | None:
        octave -= seed / 2 - 1e-9
        if octave >= diverges:
            return None
        return 1.9 if octave > edge + 0.1 else min(0.1 + (octave - centre) ** 2 / 100, 1.85)

    return outcome


@pytest.mark.parametrize(("centre", "edge", "diverges"), [(-3, 0, 2), (-12, -9.5, -9), (3, 7, 7.5), (-3, 1, 9)])
def test_every_edge_is_enclosed_to_half_an_octave_wherever_it_is(centre: float, edge: float, diverges: float) -> None:
    grid = grown(bowl(centre, edge, diverges))
    assert best_edge(grid).value == pytest.approx(2 ** (centre + 0.25))
    assert (best_edge(grid).low, best_edge(grid).high) == pytest.approx((2.0**centre, 2 ** (centre + 0.5)))
    trains = train_edge(grid, 1.8)
    assert (trains.low, trains.high, trains.open) == (pytest.approx(2.0**edge), pytest.approx(2 ** (edge + 0.5)), 0)
    stops = diverge_edge(grid)
    assert (stops.low, stops.high) == (pytest.approx(2.0**diverges), pytest.approx(2 ** (diverges + 0.5)))
    assert (stops.seeds, stops.open) == (2, 0)
    assert len(grid) < 35


def test_a_failure_below_the_edge_is_looked_past() -> None:
    base = bowl(-3, 2, 4)
    holed = grown(lambda octave, seed: None if -2 <= octave < -1 else base(octave, seed), seeds=1)
    assert largest_training(holed, 1.0) == (4.0,)
    assert diverge_edge(holed).value == 0.25


def test_what_never_diverges_says_so_at_the_cap() -> None:
    grid = grown(lambda octave, seed: 0.5 + abs(octave + 2) / 1000, seeds=1)
    top = max(grid)
    assert top == 4 * 1024
    assert (diverge_edge(grid).value, diverge_edge(grid).open) == (top, 1)
    assert (train_edge(grid, 1.0).value, train_edge(grid, 1.0).open) == (top, 1)


def test_what_always_diverges_is_looked_for_below_and_has_no_edge() -> None:
    grid = grown(lambda octave, seed: None, seeds=1)
    assert min(grid) == 2**-8 / 65536
    assert best(grid) == (None,)
    assert (train_edge(grid, 1.0).value, train_edge(grid, 1.0).seeds, sensitivity(grid, tuple(grid))) == (None, 0, None)
    assert diverge_edge(grid).value == min(grid)


def test_a_seed_without_an_edge_is_not_counted() -> None:
    grid = grown(lambda octave, seed: 1.5 if seed else bowl(-3, 0, 2)(octave, 0))
    assert (train_edge(grid, 1.0).value, train_edge(grid, 1.0).seeds) == (1.0, 1)


def test_sensitivity_by_hand() -> None:
    losses = {0.25: (0.5, 0.7), 1.0: (0.4, 0.2), 4.0: (None, 3.0), 16.0: (None, None)}
    grid = {lr: [trial(lr, seed, loss) for seed, loss in enumerate(pair)] for lr, pair in losses.items()}
    assert sensitivity(grid, (0.25, 1.0, 4.0)) == pytest.approx((0.6 + 0.3 + 2.0) / 3 - 0.3)


def test_the_lattice() -> None:
    assert [rung(rate(k)) for k in range(-60, 60)] == list(range(-60, 60))
    assert declared(0.01, 1.0) == (0.011048543456039806, 0.04419417382415922, 0.1767766952966369, 0.7071067811865476)


# ------------------------------------------------------------------------------------------------------ real training


def data(rows: int = 32, count: int = 6, *, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows * count, 8, generator=generator)
    y = (x @ torch.eye(8)[:, :3]).argmax(1)
    return list(zip(x.split(rows), y.split(rows), strict=True))


def perceptron(norm: Callable[[int], nn.Module] = nn.BatchNorm1d) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), norm(16), nn.ReLU(), nn.Linear(16, 3))


@pytest.mark.parametrize(("slope", "start"), [(1.0, -1.0), (7.0, 3.0)])
def test_a_quadratic_stops_where_theory_says(slope: float, start: float) -> None:
    """The loss (slope (w - 1))² has curvature 2 slope², and descends up to a rate of 1 / slope²."""
    x = slope * torch.tensor([[1.0], [-1.0]])
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(start)
    found = max_stable_lr(model, (x, x), mse_loss, steps=100, seeds=1)
    exact = 1 / slope**2
    assert exact / math.sqrt(2) <= found.lr_train["0.5"].value < exact
    assert exact < found.lr_diverge.value <= 2 * exact
    assert found.chance == pytest.approx(slope**2)
    assert found.chance_from == "targets' variance"


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
def test_edges_of_a_small_network(name: str) -> None:
    found = max_stable_lr(perceptron, data(), cross_entropy, optimizer=name, seeds=2, steps=40)
    assert found.chance_from == "labels' entropy"
    train, best_lr = found.lr_train["0.5"], found.lr_best
    assert best_lr.value <= train.value
    assert found.lr_train["0.25"].value <= train.value <= found.lr_train["0.9"].value
    assert found.margin == pytest.approx(math.log2(train.value / best_lr.value))
    assert found.declared == declared(*RANGES[name])
    assert (train.seeds, train.open) == (2, 0)
    assert found.sensitivity > 0


def test_outcomes_by_the_definition() -> None:
    found = max_stable_lr(perceptron, data(), cross_entropy, seeds=2, steps=30)
    outcomes = {t.outcome for t in found.trials}
    assert outcomes == {"trains", "stuck", "diverged"}
    for t in found.trials:
        if t.outcome == "diverged":
            assert (t.tail_loss, t.val_loss) == (None, None)
        else:
            assert (t.outcome == "trains") == (max(t.tail_loss, t.val_loss) < 0.5 * found.chance)
            assert t.steps == 30


def test_a_dead_network_is_stuck_at_every_rate() -> None:
    model = perceptron(lambda n: nn.Identity())
    with torch.no_grad():
        model[0].bias.fill_(-1e6)
    for p in model[3].parameters():
        p.requires_grad_(False)
    found = max_stable_lr(model, data(), cross_entropy, seeds=1, steps=5)
    assert {t.outcome for t in found.trials} == {"stuck"}
    assert (found.lr_train["0.5"].value, found.margin) == (None, None)
    assert found.meaning.startswith("trains at no rate up to 4.1e+03 (0.5 of chance, 1.")
    assert ", diverges at none up to 4.1e+03, best at " in found.meaning


def test_a_spike_that_recovers_is_no_divergence() -> None:
    class Spiking(nn.Module):
        """One infinite loss, whose gradient is 0, at the third call of a training."""

        def __init__(self) -> None:
            super().__init__()
            self.w, self.calls = nn.Parameter(torch.tensor(1.0)), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            loss = (self.w * x).square().mean()
            return loss.detach() * 0 + math.inf + 0 * self.w if self.calls == 3 else loss

    found = max_stable_lr(Spiking(), torch.ones(4), seeds=1, steps=30, rates=(0.25, 0.25))
    own = next(t for t in found.trials if t.lr == 0.25)
    assert (own.outcome, own.steps) == ("trains", 30)
    assert (found.chance, found.chance_from) == (1.0, "first loss")


def test_evaluation_has_a_say() -> None:
    """What trains by its training loss, and not by its validation loss, is stuck."""
    elsewhere = [(-x, y) for x, y in data()]
    found = max_stable_lr(perceptron, data(), cross_entropy, validation=elsewhere, seeds=1, steps=40)
    assert min(t.tail_loss for t in found.trials if t.tail_loss is not None) < 0.3
    assert "trains" not in {t.outcome for t in found.trials}


def test_the_same_order_at_every_rate_and_another_for_another_seed() -> None:
    given, orders = data(count=4), {}

    def watching(model: nn.Module, batch: Any) -> Tensor:
        if model.training:
            current.append(next(i for i, (x, _) in enumerate(given) if torch.equal(x, batch[0])))
        return model(batch[0])

    def ended(t: Trial) -> None:
        orders.setdefault(t.seed, set()).add(tuple(current[-t.steps :]))
        current.clear()

    current: list[int] = []
    model = perceptron(nn.LayerNorm)
    max_stable_lr(model, given, cross_entropy, forward=watching, seeds=2, steps=9, rates=(0.25, 1), progress=ended)
    full = {seed: {order for order in found if len(order) == 9} for seed, found in orders.items()}
    (first,), (second,) = full[0], full[1]
    assert first != second
    for order in (first, second):
        assert sorted(order[:4]) == sorted(order[4:8]) == [0, 1, 2, 3]


def test_a_model_starts_every_trial_and_a_factory_draws_new_weights() -> None:
    model, given = perceptron(nn.LayerNorm), data()[:1]
    kept = max_stable_lr(model, given, cross_entropy, seeds=2, steps=3, rates=(0.25, 1))
    assert len({t.first_loss for t in kept.trials}) == 1
    own = cross_entropy(model(given[0][0]), given[0][1]).item()
    assert kept.trials[0].first_loss == pytest.approx(own)
    drawn = max_stable_lr(lambda: perceptron(nn.LayerNorm), given, cross_entropy, seeds=2, steps=3, rates=(0.25, 1))
    assert len({t.first_loss for t in drawn.trials}) == 2


def test_a_factory_leaves_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    max_stable_lr(perceptron, data(), cross_entropy, seeds=1, steps=2, rates=(0.5, 0.5))
    assert torch.equal(torch.rand(3), expected)


def test_an_optimizer_of_ones_own() -> None:
    made = []

    def adam(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        made.append(lr)
        return torch.optim.Adam(parameters, lr, betas=(0.5, 0.9))

    found = max_stable_lr(perceptron, data(), cross_entropy, optimizer=adam, seeds=1, steps=5)
    assert made == [t.lr for t in sorted(found.trials, key=lambda t: made.index(t.lr))]
    assert found.declared[0] == 2**-14
    assert found.declared[-1] == 4.0


def test_a_memory_that_raises_has_diverged() -> None:
    layer = lambda n: nw.BatchNorm(n, nonfinite="raise")  # noqa: E731
    skipping, raising = (
        max_stable_lr(lambda norm=norm: perceptron(norm), data(), cross_entropy, seeds=1, steps=8)
        for norm in (nw.BatchNorm, layer)
    )
    assert [(t.lr, t.outcome) for t in raising.trials] == [(t.lr, t.outcome) for t in skipping.trials]
    assert "diverged" in {t.outcome for t in raising.trials}


def test_ratios_between_two() -> None:
    bn, none = (
        max_stable_lr(lambda norm=norm: perceptron(norm), data(), cross_entropy, seeds=2, steps=30)
        for norm in (nn.BatchNorm1d, lambda n: nn.Identity())
    )
    ratios = bn.ratios(none)
    assert list(ratios) == ["0.5", "0.9", "0.25", "diverge"]
    assert ratios["0.5"] == bn.lr_train["0.5"].value / none.lr_train["0.5"].value
    assert ratios["diverge"] == bn.lr_diverge.value / none.lr_diverge.value > 2
    assert bn.ratios(bn) == dict.fromkeys(ratios, 1.0)


def test_the_figure_and_the_rows() -> None:
    found = max_stable_lr(perceptron, data(), cross_entropy, seeds=2, steps=5)
    assert isinstance(found, StableRates)
    assert len(found.rows()) == len(found.trials) == len({(t.lr, t.seed) for t in found.trials})
    figure = found.plot()
    assert [line.name for line in figure.data] == ["seed 0", "seed 1", "diverged"]
    assert figure.layout.xaxis.type == "log"
    assert len(figure.layout.shapes) == 3


def test_chance() -> None:
    labels = torch.tensor([0, 0, 1, 2])
    entropy = 1.5 * math.log(2)
    parts = [(None, labels[:3]), (None, labels[3:])]
    assert chance_of(parts, cross_entropy) == (pytest.approx(entropy), "labels' entropy")
    padded = torch.tensor([[0, 0, -100], [1, 2, -100]])
    assert chance_of([(None, padded)], nn.CrossEntropyLoss())[0] == pytest.approx(entropy)
    targets = torch.tensor([[0.0, 0.0], [2.0, 6.0]])
    assert chance_of([(None, targets)], mse_loss) == (5.0, "targets' variance")
    for loss in (nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(reduction="sum"), nn.L1Loss(), None):
        assert chance_of([(None, labels)], loss) is None
    assert chance_of([(None, torch.tensor([[0.5, 0.5]]))], cross_entropy) is None


def test_a_given_chance_and_shares() -> None:
    found = max_stable_lr(perceptron, data(), cross_entropy, seeds=1, steps=20, chance=10.0, shares=(0.04, 0.2))
    assert (found.chance, found.chance_from, list(found.lr_train)) == (10.0, "given", ["0.04", "0.2"])
    assert all((t.outcome == "trains") == t.below(0.4) for t in found.trials)


REFUSED = {
    "optimizer": (
        {"optimizer": "adam"},
        "optimizer='adam': it is one of sgd, momentum, adamw, or a function of the parameters and a rate",
    ),
    "made": ({"optimizer": lambda p, lr: None}, "optimizer made a NoneType, not a torch.optim.Optimizer"),
    "instance": (
        {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)},
        "optimizer is a SGD: trials make their own, so give a function of parameters and rate",
    ),
    "frozen": (
        {"model": nn.Linear(8, 3).requires_grad_(False)},
        "no parameter requires a gradient, so there is nothing to train",
    ),
    "steps": ({"steps": 0}, "steps: 0 is not a positive number"),
    "seeds": ({"seeds": -1}, "seeds: -1 is not a positive number"),
    "rates": ({"rates": (0.0, 1.0)}, "low: 0.0 is not a positive number"),
    "order": ({"rates": (1.0, 0.1)}, "rates=(1.0, 0.1): the lowest comes first"),
    "shares": ({"shares": (0.5, math.nan)}, "shares: nan is not a positive number"),
    "no shares": ({"shares": ()}, "shares is empty: give one number or more"),
    "chance": ({"chance": 0.0}, "chance: 0.0 is not a positive number"),
    "constant": (
        {"batches": (torch.randn(4, 8), torch.zeros(4, dtype=torch.long))},
        "chance, the labels' entropy, is 0, which has no share: give chance=",
    ),
    "model": ({"model": 3}, "model is a int: give a torch.nn.Module, or a function that makes one"),
    "factory": ({"model": lambda: 3}, "model made a int, not a torch.nn.Module"),
    "not finite": (
        {"loss": lambda output, target: output.sum() / 0},
        "the loss is inf before the first step: nw.first_nonfinite tells where it begins",
    ),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(given: dict[str, Any], message: str) -> None:
    torch.manual_seed(3)
    arguments = {"model": perceptron(), "batches": data(), "loss": cross_entropy, **given}
    with pytest.raises(DiagnosisError) as caught:
        max_stable_lr(**arguments)
    assert str(caught.value).replace("-inf", "inf") == message
