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


# ------------------------------------------------------------------------------------------------ axes and samplers


def test_every_value_of_every_axis_is_tried_before_the_study() -> None:
    def factory(norm: Any) -> nn.Module:
        class Few(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                if len(x) == 64:
                    raise RuntimeError("no batch of 64")
                return x

        return nn.Sequential(Few(), norm(64), nn.Linear(64, 10))

    assert message(factory, batch_size=(32, 64), optimizer=("sgd", "adamw")).startswith(
        "the model with normalization 'batch' at batch size 64, optimizer sgd does not run: RuntimeError: no batch of "
    )
    assert plan(factory, batch_size=(32, 16), optimizer=("sgd", "adamw")).settings.axes


def test_a_step_of_another_batch_size_has_a_time_of_its_own() -> None:
    import time

    def factory(norm: Any) -> nn.Module:
        class Slow(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                time.sleep(len(x) / 1000)
                return x

        return nn.Sequential(Slow(), norm(64), nn.Linear(64, 10))

    asked = plan(factory, batch_size=(10, 100), optimizer=("sgd", "adamw"), norms="none")
    small, large = (asked.checks["none"].seconds((("batch_size", size),)) for size in (10, 100))
    assert small is not None
    assert large is not None
    assert small >= 0.01
    assert large >= 0.1
    assert small + 0.03 < large  # of 0.09, on a machine that is busy
    times = measure_steps(asked.problem, asked.checks, {"none": (("batch_size", 100), ("optimizer", "sgd"))})
    assert times["none"] is not None
    assert times["none"] > 100


def test_what_varies_is_said() -> None:
    facts = plan(batch_size=(8, 32), optimizer=("sgd", "adamw"), weight_decay=0.1, epochs=2).facts
    assert facts["batch size"] == "8, 32: each normalization at its own best"
    assert facts["optimizer"] == "sgd, adamw: each normalization at its own best"
    assert facts["weight decay"] == "0.1"
    assert facts["steps"] == "56 to 224, 2 epochs by batch size; twice as many for the two leaders"
    assert plan(optimizer="momentum", weight_decay=0.1).facts["optimizer"] == (
        "SGD with momentum 0.9, weight decay 0.1"
    )
    assert plan(epochs=(1, 2)).facts["steps"] == (
        "those of 1, 2 epochs, each normalization at its own best; twice for the leaders"
    )


def test_the_plan_says_axes_sampler_and_cost() -> None:
    text = plan(batch_size=(32, 128), optimizer=("sgd", "adamw"), sampler="tpe", trials=18, prune=True).text(2)
    assert "learning rates    from 0.00391 to 4 (sgd), from 6.1e-05 to 0.0625 (adamw), drawn by logarithm" in text
    assert "axes              2 batch-size x 2 optimizer = 4 combinations, each normalization at its own best" in text
    assert "sampler           tpe, 18 points a normalization, cut short by successive halving within a norm" in text
    assert f"trials            about {2 * (26 * 3 + 10) + 20}" in text
    assert "warning" not in text
    control = plan(control=True).text(2)
    assert "control           the same rates once more, with gamma, beta and the output layer frozen" in control


def test_a_product_of_many_values_is_warned_of() -> None:
    text = plan(batch_size=(8, 16, 32, 64), optimizer=("sgd", "adamw", "momentum"), weight_decay=(0, 0.1, 1)).text(2)
    assert "warning" not in text
    text = plan(batch_size=tuple(range(8, 32)), optimizer=("sgd", "adamw"), norms="batch,none").text(2)
    count = 2 * (24 * 2 * 18 * 3 + 10) + 20
    assert text.splitlines()[-1] == (
        f"warning           {count} trials are many; fewer values, or --sampler tpe --trials 60, make the study shorter"
    )


def test_the_command_says_the_axes() -> None:
    asked = Options(batch_size="8,32", optimizer="adamw", weight_decay=(0, 1e-4), sampler="tpe", trials=9, prune=True)
    assert command("mlp", "digits", None, asked.plain()) == (
        "normwise tune mlp --data digits --batch-size 8,32 --optimizer adamw --weight-decay 0.0,0.0001 --sampler tpe "
        "--trials 9 --prune"
    )
    assert command(plan, "digits", None, asked.plain()) == (
        'nw.tune(test_tune_prepare:plan, "digits", batch_size=(8, 32), optimizer="adamw", '
        'weight_decay=(0.0, 0.0001), sampler="tpe", trials=9, prune=True)'
    )


def test_a_control_that_cannot_run_is_named_before_the_study() -> None:
    def factory(norm: Any) -> nn.Module:
        return nn.Sequential(norm(64), nn.Linear(64, 10))

    assert message(factory, control=True).startswith("the control has nothing to train: the network has no parameters")
