"""What is tried before a study begins: everything that can be wrong shows here, and is named."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from normwise.errors import StudyError
from normwise.tuning.options import Options
from normwise.tuning.preflight import measure_steps
from normwise.tuning.prepare import Plan, default_name, make_plan
from normwise.tuning.reproduce import command, reproduction


def plan(model: Any = "mlp", data: Any = "digits", train: Any = None, **options: Any) -> Plan:
    return make_plan(model, data, train, Options(**{"norms": "batch,none", **options}))


def message(*args: Any, **options: Any) -> str:
    with pytest.raises(StudyError) as caught:
        plan(*args, **options)
    return str(caught.value)


def test_a_plan_knows_its_networks() -> None:
    checks = plan().checks
    assert list(checks) == ["batch", "none"]
    assert checks["batch"].parameters - checks["none"].parameters == 5 * 2 * 64
    assert checks["batch"].described.startswith("BatchNorm(64, eps=1e-05, momentum=0.1")
    assert checks["batch"].samples == (128,) * 5
    assert checks["batch"].step_seconds is not None
    assert 0 < checks["batch"].step_seconds < 10


def test_what_was_fixed_is_said() -> None:
    facts = plan("cnn").facts
    assert facts["batch size"] == "128; a statistic over batch and positions has 512 to 8192 samples (N·H·W)"
    assert facts["loss"] == "cross_entropy; the best constant prediction has 2.301 nats"
    assert facts["steps"] == "40, which is 5.7 epochs; twice as many for winner and runner-up"
    wine = plan("mlp", "wine", optimizer="adamw", schedule="cosine").facts
    assert wine["batch size"].startswith("89 (all training data); ")
    assert wine["optimizer"] == "AdamW, torch's defaults (betas 0.9 and 0.999, weight decay 0.01)"
    assert wine["schedule"] == "cosine from the learning rate to 0, no warm-up"


def test_the_plan_reads_well() -> None:
    text = plan(lrs="0.1:1:3", seeds=2, confirm=4).text(2)
    assert "normalizations    batch, none" in text
    assert "learning rates    3 from 0.1 to 1, fixed" in text
    assert "seeds             2 to select, 4 fresh ones to confirm" in text
    assert "trials            about 28" in text
    assert "with 2 workers" in text


def test_a_norm_that_cannot_work_is_named() -> None:
    assert message(norms="instance").startswith("the model with normalization 'instance' does not run: ")
    assert message(norms="n c [h w]").startswith("the model with normalization 'n c [h w]' does not run: ")


def test_a_factory_that_ignores_its_norm_is_refused() -> None:
    def factory(norm: Any) -> nn.Module:
        return nn.Linear(64, 10)

    assert message(factory).endswith(
        "is_refused.<locals>.factory' takes norm and never calls it: it would be the same with every normalization"
    )


def test_outputs_that_fit_nothing_are_refused() -> None:
    def model(outputs: nn.Module) -> Any:
        return lambda norm: nn.Sequential(nn.Linear(64, 4), norm(4), outputs)

    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x, x

    name = "model 'test_tune_prepare:test_outputs_that_fit_nothing_are_refused.<locals>.model.<locals>.<lambda>'"
    assert message(model(nn.Flatten(0))) == f"{name} puts out (512,); cross_entropy needs (examples, classes)"
    assert "labels are beyond the model's 4 outputs" in message(model(nn.Identity()))
    assert "the model with normalization 'batch' does not run: TypeError" in message(model(Pair()))


def test_lazy_models_are_made_whole() -> None:
    def lazy(norm: Any) -> nn.Module:
        return nn.Sequential(nn.LazyLinear(8), norm(8), nn.LazyLinear(10))

    assert plan(lazy).checks["none"].parameters == 64 * 8 + 8 + 8 * 10 + 10


def test_a_loop_brings_its_data() -> None:
    def train(model: nn.Module, lr: float, seed: int, trial: Any) -> float:
        raise AssertionError("no trial is run before the study")

    own = plan(train=train)
    assert own.problem.data is None
    assert own.checks["batch"].step_seconds is None
    assert measure_steps(own.problem, own.checks) == {"batch": None, "none": None}
    assert own.seconds(2) is None
    assert message(train=train, data="wine") == "train brings its own data: leave data out"
    assert message(train=lambda model: 1.0).startswith("train 'test_tune_prepare:test_a_loop_brings_its_data.<locals>")
    assert "cannot be called as train(model, lr=, seed=, trial=)" in message(train=lambda model: 1.0)


def test_what_the_users_code_prints_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    def factory(norm: Any) -> nn.Module:
        print("a network")  # noqa: T201 - where it goes is the test
        return nn.Sequential(norm(64), nn.Linear(64, 10))

    asked = plan(factory, norms="none")
    assert capsys.readouterr() == ("", "a network\n")
    measure_steps(asked.problem, asked.checks)
    assert capsys.readouterr() == ("", "a network\n")


def test_rates_may_be_an_array() -> None:
    asked = plan(lrs=np.array([0.5, 1.0]))
    assert asked.settings.lrs == (0.5, 1.0)
    assert asked.command == 'nw.tune("mlp", "digits", norms="batch,none", lrs=(0.5, 1.0))'


def test_steps_are_timed_one_by_one() -> None:
    import time

    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.02)
            return x

    def factory(norm: Any) -> nn.Module:
        layer = norm(64)
        slow = Slow() if isinstance(layer, nn.Identity) else nn.Identity()
        return nn.Sequential(layer, slow, nn.Linear(64, 10))

    asked = plan(factory, norms="layer,none")
    times = measure_steps(asked.problem, asked.checks)
    assert times["layer"] is not None
    assert times["none"] is not None
    assert times["none"] > 20
    assert times["none"] - times["layer"] > 10


def test_the_command_says_what_differs_from_the_defaults() -> None:
    asked = Options(norms=("batch", "mine=[n] c"), lrs="0.1:1:3", batch_size=32)
    assert command("cnn", "a:b", None, asked) == (
        "normwise tune cnn --data a:b --norms 'batch,mine=[n] c' --lrs 0.1:1:3 --batch-size 32"
    )
    assert command("mlp", "digits", "a:f", Options()) == "normwise tune mlp --train a:f"
    assert command("mlp", ((), ()), None, Options(lrs=(0.1, 1.0))) == (
        'nw.tune("mlp", (train, validation, test), lrs=(0.1, 1.0))'
    )
    assert command(plan, "digits", None, Options()) == 'nw.tune(test_tune_prepare:plan, "digits")'


def test_a_reproduction_names_versions_and_seeds() -> None:
    parts = reproduction(plan().settings, "normwise tune", 2)
    assert parts["command"] == "normwise tune"
    assert f"torch {torch.__version__}" in parts["versions"]
    assert parts["seeds"] == (
        "batch: 0-2 to select, 1000-1009 to confirm; none: 10000-10002 to select, 11000-11009 to confirm"
    )
    assert parts["where"].endswith("cpu, 2 worker processes of one thread each")


def test_names_are_fit_for_files() -> None:
    assert default_name("mlp", "digits", None) == "mlp-digits"
    assert default_name("a.b:c", "../x y:z", None) == "a.b-c-..-x-y-z"
    assert default_name(plan, ((), ()), None) == "test_tune_prepare-plan-data"
