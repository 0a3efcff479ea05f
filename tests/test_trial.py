"""One trial: outcomes by definition, test data untouched in selection, everything from the seed."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.errors import StudyError
from normwise.tuning.data import Data, Split
from normwise.tuning.models import Architecture
from normwise.tuning.norms import NormChoice
from normwise.tuning.records import Record, Request, Settings
from normwise.tuning.training import Training, batches, find_loss, make_optimizer, predict, squared_error
from normwise.tuning.trial import Problem, Trial, run

SETTINGS = Settings("line", "made up", (("none", "none"),), batch_size=16, steps=40)
REQUEST = Request("select", "none", 0.5, 0, 40)


class Watched(Split):
    """Data that may not be looked at."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("inputs", "targets"):
            raise AssertionError("the test data were touched")
        return super().__getattribute__(name)

    def to(self, device: str) -> Split:
        return self


def split(seed: int, count: int = 64) -> Split:
    inputs = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    return Split(inputs, (inputs[:, 0] > 0).long())


def problem(settings: Settings = SETTINGS, test: Split | None = None, **parts: Any) -> Problem:
    data = Data("made up", split(0), split(1), split(2) if test is None else test, {})
    line = Architecture("line", lambda norm: nn.Sequential(nn.Linear(2, 2), norm(2)), True, {})
    given = {"architecture": line, "data": data, "chance": math.log(2), **parts}
    return Problem(settings, choices={"none": NormChoice("none", "none")}, loss=find_loss(settings.loss), **given)


def own(train: Any, settings: Settings = SETTINGS) -> Record:
    mine = replace(settings, own_loop=True)
    return run(problem(mine, data=None, chance=None, train=train), REQUEST)


def test_a_line_learns_a_line() -> None:
    record = run(problem(), REQUEST)
    assert record.outcome == "trains"
    assert record.score is not None
    assert record.score > 90
    assert record.test_loss is None
    assert record.weights[0][0] == 0
    assert record.weights[-1] == (record.request.steps, record.weight_norm)
    assert [step for step, _ in record.curve] == list(range(1, 41))
    assert record.first_loss == record.curve[0][1]
    assert record.tail_loss == pytest.approx(sum(loss for _, loss in record.curve[-4:]) / 4)


def test_a_trial_depends_on_its_seed_alone() -> None:
    first = replace(run(problem(), REQUEST), seconds=0)
    torch.rand(7)
    assert replace(run(problem(), REQUEST), seconds=0) == first
    assert run(problem(), replace(REQUEST, seed=1)).curve != first.curve


def test_the_callers_random_numbers_are_left_alone() -> None:
    state = torch.get_rng_state()
    run(problem(), REQUEST)
    assert torch.get_rng_state().equal(state)


def test_test_data_are_touched_in_confirmation_only() -> None:
    locked = Watched(*(torch.zeros(0), torch.zeros(0)))
    assert run(problem(test=locked), REQUEST).outcome == "trains"
    with pytest.raises(StudyError, match="the test data were touched"):
        run(problem(test=locked), replace(REQUEST, phase="confirm"))
    confirmed = run(problem(), replace(REQUEST, phase="confirm"))
    assert confirmed.score != run(problem(), REQUEST).score
    assert confirmed.test_loss is not None


def test_non_finite_at_the_end_is_diverged() -> None:
    settings = replace(SETTINGS, loss="mse", metric="loss", direction="min")
    numbers = Split(split(0).inputs, split(0).inputs.sum(dim=1, keepdim=True) * 1e3)
    data = Data("made up", numbers, numbers, numbers, {})
    line = Architecture("line", lambda norm: nn.Linear(2, 1), True, {})
    record = run(problem(settings, data=data, architecture=line), replace(REQUEST, lr=1e6))
    assert record.outcome == "diverged"
    assert record.score is record.val_loss is record.weight_norm is record.tail_loss is None
    assert record.first_loss is not None
    assert 1 < len(record.curve) < 40


def test_a_layer_does_not_warn_of_what_the_record_tells() -> None:
    """In tests a warning is an error."""
    mine = replace(problem(), choices={"none": NormChoice("none", "batch")})
    assert run(mine, replace(REQUEST, lr=1e38)).outcome == "diverged"
    with pytest.warns(UserWarning, match="statistics are not finite"):
        nw.BatchNorm(2)(torch.full((4, 2), torch.nan))


def test_a_spike_that_recovers_is_not_divergence() -> None:
    class Spike(nn.Module):
        """A line whose fifth training step overflows, without touching a parameter."""

        def __init__(self) -> None:
            super().__init__()
            self.line, self.steps = nn.Linear(2, 2), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.steps += self.training
            y: torch.Tensor = self.line(x)
            return y + math.inf if self.training and self.steps == 5 else y

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        finite = outputs.nan_to_num(posinf=0.0)
        value = nn.functional.cross_entropy(finite, targets)
        return value if outputs.isfinite().all() else value + math.inf

    spiking = Architecture("spike", lambda norm: Spike(), True, {})
    record = run(replace(problem(architecture=spiking), loss=loss), REQUEST)
    assert [step for step, _ in record.curve] == [step for step in range(1, 41) if step != 5]
    assert record.outcome == "trains"


def test_stuck_is_finite_and_above_half_of_chance() -> None:
    assert run(problem(), replace(REQUEST, lr=1e-6)).outcome == "stuck"
    known = run(problem(), REQUEST)
    assert known.tail_loss is not None
    assert known.val_loss is not None
    worst = max(known.tail_loss, known.val_loss)
    assert run(problem(chance=2 * worst * 1.01), REQUEST).outcome == "trains"
    assert run(problem(chance=2 * worst * 0.99), REQUEST).outcome == "stuck"


def test_without_chance_training_means_falling() -> None:
    assert run(problem(chance=None), REQUEST).outcome == "trains"


def test_a_failing_model_is_named_with_its_trial() -> None:
    def fail(norm: object) -> nn.Module:
        raise RuntimeError("out of luck")

    broken = Architecture("broken", fail, True, {})
    with pytest.raises(StudyError, match=r"^model 'broken' raised RuntimeError: out of luck \(test_trial.py:\d+\)$"):
        run(problem(architecture=broken), REQUEST)


def test_the_users_loop_returns_the_score() -> None:
    def train(model: nn.Module, *, lr: float, seed: int, trial: Trial) -> torch.Tensor:
        for step in range(20):
            trial.log(step, torch.tensor(20.0 - step))
        assert (lr, seed, trial.phase, trial.steps) == (0.5, 0, "select", 40)
        return torch.tensor(87.5)

    record = own(train)
    assert (record.outcome, record.score, record.first_loss, record.tail_loss) == ("trains", 87.5, 20.0, 1.5)
    assert len(record.curve) == 20


@pytest.mark.parametrize("returned", [math.nan, -math.inf, FloatingPointError("overflow")])
def test_a_loop_that_overflows_diverged(returned: Any) -> None:
    def train(model: nn.Module, *, lr: float, seed: int, trial: Trial) -> float:
        if isinstance(returned, Exception):
            raise returned
        return float(returned)

    record = own(train)
    assert (record.outcome, record.score) == ("diverged", None)


def test_a_loop_that_raises_after_it_has_diverged_diverged() -> None:
    def lost(model: nn.Module, *, trial: Trial, **_: Any) -> float:
        trial.log(0, 2.0)
        trial.log(1, math.inf)
        raise ValueError("probabilities contain NaN")

    def overflown(model: nn.Module, **_: Any) -> float:
        nn.init.constant_(next(model.parameters()), math.nan)
        raise ValueError("probabilities contain NaN")

    record = own(lost)
    assert (record.outcome, record.score, record.first_loss, record.curve) == ("diverged", None, 2.0, ((0, 2.0),))
    assert own(overflown).outcome == "diverged"


@pytest.mark.parametrize(
    ("losses", "outcome"),
    [
        ([4.0, 1.9], "trains"),
        ([4.0, 2.0], "stuck"),
        ([4.0, 400.0], "stuck"),
        ([math.inf, 1.0], "stuck"),
        ([4.0, math.inf, 1.0], "trains"),
        ([4.0], "trains"),
        ([], "trains"),
    ],
)
def test_a_loop_trains_if_its_losses_end_below_half_of_the_first(losses: list[float], outcome: str) -> None:
    def train(model: nn.Module, *, trial: Trial, **_: Any) -> float:
        for step, loss in enumerate(losses):
            trial.log(step, loss)
        return 60.0

    record = own(train)
    assert (record.outcome, record.score) == (outcome, 60.0)


def test_what_a_loop_prints_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    def train(model: nn.Module, **_: Any) -> float:
        print("epoch 1")  # noqa: T201 - where it goes is the test
        return 60.0

    own(train)
    assert capsys.readouterr() == ("", "epoch 1\n")


def test_a_loop_that_fails_stops_the_study() -> None:
    def failure(train: Any, settings: Settings = SETTINGS) -> str:
        with pytest.raises(StudyError) as caught:
            own(train, settings)
        return str(caught.value)

    def broken(model: nn.Module, **_: Any) -> float:
        raise KeyError("labels")

    trial = "trial (none at learning rate 0.5, seed 0, select)"
    assert failure(broken).startswith(f"{trial} raised KeyError: 'labels' (test_trial.py:")
    assert failure(broken).endswith("); a loop may raise FloatingPointError to say that it diverged")
    assert failure(lambda model, **_: None) == "train returned None, a NoneType, not a number"
    assert failure(lambda model, **_: 250) == (
        "train returned 250, which is no accuracy in percent; say what it is with metric 'name:max' or 'name:min'"
    )
    assert own(lambda model, **_: 250, replace(SETTINGS, metric="frames", direction="max")).score == 250


def test_batches_visit_everything_once_an_epoch() -> None:
    data = Split(torch.arange(10), torch.arange(10))
    stream = batches(data, 4, seed=0)
    epochs = [torch.cat([next(stream)[0], next(stream)[0]]) for _ in range(50)]
    assert all(len(epoch.unique()) == 8 for epoch in epochs)
    assert torch.cat(epochs).unique().numel() == 10
    assert len(next(batches(data, 100, seed=0))[0]) == 10


def test_optimizers_and_schedules_do_what_they_say() -> None:
    def path(optimizer: str, schedule: str = "constant") -> torch.Tensor:
        """The weight of a model whose gradient is always 1."""
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        data, settings = (
            Split(torch.ones(4, 1), torch.zeros(4)),
            replace(SETTINGS, optimizer=optimizer, schedule=schedule),
        )
        training = Training(model, data, settings, lambda y, _: y.mean(), lr=0.1, seed=0, steps=4)
        return torch.tensor([(training.step(), model.weight.item())[1] for _ in range(4)])

    torch.testing.assert_close(path("sgd"), torch.tensor([-0.1, -0.2, -0.3, -0.4]))
    torch.testing.assert_close(path("momentum"), torch.tensor([-0.1, -0.29, -0.561, -0.9049]))
    rates = torch.tensor([0.05 * (1 + math.cos(math.pi * t / 4)) for t in range(4)])
    torch.testing.assert_close(path("sgd", "cosine"), -rates.cumsum(dim=0))
    assert isinstance(make_optimizer("adamw", nn.Linear(1, 1), 0.1), torch.optim.AdamW)


def test_prediction_is_in_evaluation_mode_and_puts_the_mode_back() -> None:
    model = nn.Dropout(0.5)
    assert predict(model, torch.ones(3000, 2)).eq(1).all()
    assert model.training
    model.eval()
    predict(model, torch.ones(3, 2))
    assert not model.training


def test_losses_are_found_and_shapes_are_not_broadcast() -> None:
    assert find_loss("mse") is squared_error
    with pytest.raises(StudyError, match=r"^mse: the model's outputs are \(3,\), the targets \(3, 1\)$"):
        squared_error(torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(StudyError, match=r"^no loss named 'hinge'; there are cross_entropy, mse, or module:function"):
        find_loss("hinge")


@pytest.mark.parametrize("where", ["loss", "weights"])
def test_a_network_of_nans_has_diverged_though_it_has_an_accuracy(where: str) -> None:
    def train(model: nn.Module, lr: float, seed: int, trial: Trial) -> float:
        trial.log(0, 2.0)
        trial.log(1, math.nan if where == "loss" else 1.0)
        with torch.no_grad():
            for parameter in model.parameters() if where == "weights" else ():
                parameter.fill_(math.nan)
        return 60.0

    record = own(train)
    assert record.outcome == "diverged"
    assert record.score is None


def test_a_spike_that_recovers_is_no_divergence() -> None:
    def train(model: nn.Module, lr: float, seed: int, trial: Trial) -> float:
        for step, loss in enumerate((2.0, math.inf, 0.5)):
            trial.log(step, loss)
        return 60.0

    assert own(train).score == 60.0


def test_a_trial_has_the_settings_of_its_combination() -> None:
    asked: list[Any] = []

    class Placed(Architecture):
        def build(self, norm: Any, start: str | None = None, placement: str | None = None) -> nn.Module:
            asked.append((start, placement))
            return nn.Sequential(nn.Linear(2, 2), norm(2))

    settings = replace(SETTINGS, axes=(("batch_size", (4, 16)), ("start", ("he", "default"))), placement="pre")
    own = problem(settings, architecture=Placed("line", nn.Identity, True, {}))
    record = run(own, replace(REQUEST, variant=(("batch_size", 4), ("start", "he"))))
    assert asked == [("he", "pre")]
    small = run(problem(replace(SETTINGS, batch_size=4)), REQUEST)
    assert replace(record, request=REQUEST, seconds=0.0) == replace(small, seconds=0.0)
    assert record.curve != run(problem(), REQUEST).curve


def test_weight_decay_is_the_optimizers_own_unless_said() -> None:
    line = nn.Linear(1, 1)
    assert [make_optimizer(name, line, 0.1).defaults["weight_decay"] for name in ("sgd", "momentum", "adamw")] == [
        0.0,
        0.0,
        0.01,
    ]
    assert make_optimizer("adamw", line, 0.1, 0.0).defaults["weight_decay"] == 0.0
    decayed = run(problem(replace(SETTINGS, weight_decay=0.5)), REQUEST)
    free = run(problem(), REQUEST)
    assert decayed.weight_norm is not None
    assert free.weight_norm is not None
    assert decayed.weight_norm < 0.5 * free.weight_norm


def test_control_trials_see_no_test_data() -> None:
    locked = Watched(*(torch.zeros(0), torch.zeros(0)))
    two = Architecture(
        "two", lambda norm: nn.Sequential(nn.Linear(2, 8), norm(8), nn.ReLU(), nn.Linear(8, 2)), True, {}
    )
    record = run(problem(test=locked, architecture=two), replace(REQUEST, phase="control"))
    assert record.score is not None
    assert record.score > 60
    assert record.test_loss is None
