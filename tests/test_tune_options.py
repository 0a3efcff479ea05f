"""From words to checked settings."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch.nn.functional import l1_loss

from normwise.errors import StudyError
from normwise.tuning.data import BUILT_IN
from normwise.tuning.norms import parse_norms
from normwise.tuning.options import BUILT_IN_STEPS, Options, make_settings, read_metric, read_rates
from normwise.tuning.records import Settings


def settings(loss: str = "cross_entropy", own_loop: bool = False, **options: Any) -> Settings:
    choices = parse_norms("batch,none")
    return make_settings(Options(**options), model="m", data="d", loss=loss, choices=choices, own_loop=own_loop)


def message(**options: Any) -> str:
    with pytest.raises(StudyError) as caught:
        settings(**options)
    return str(caught.value)


def test_the_defaults() -> None:
    assert settings() == Settings("m", "d", (("batch", "batch"), ("none", "none")), steps=200)
    assert settings(own_loop=True) == replace(settings(), own_loop=True, steps=None)


@pytest.mark.parametrize(
    ("lrs", "rates"),
    [
        ("auto", None),
        ("0.001:10:5", (0.001, 0.01, 0.1, 1.0, 10.0)),
        ("0.1:0.4:2", (0.1, 0.4)),
        ([1, 0.1, 1], (0.1, 1.0)),
        (np.array([1, 0.1]), (0.1, 1.0)),
    ],
)
def test_rates(lrs: Any, rates: Any) -> None:
    assert read_rates(lrs) == rates


@pytest.mark.parametrize(
    ("lrs", "text"),
    [
        ("fast", "lrs 'fast' makes no grid: write auto, or LOW:HIGH:COUNT as in 0.001:10:9"),
        ("a:b:3", "lrs 'a:b:3' makes no grid: LOW and HIGH must be numbers, COUNT a whole number"),
        ("0.1:1:2.5", "lrs '0.1:1:2.5' makes no grid: LOW and HIGH must be numbers, COUNT a whole number"),
        ("0:1:3", "lrs '0:1:3' makes no grid: LOW and HIGH must be positive and finite"),
        ("0.1:inf:3", "lrs '0.1:inf:3' makes no grid: LOW and HIGH must be positive and finite"),
        ("nan:1:3", "lrs 'nan:1:3' makes no grid: LOW and HIGH must be positive and finite"),
        ("1:0.1:3", "lrs '1:0.1:3' makes no grid: LOW must be smaller than HIGH"),
        ("0.1:1:1", "lrs '0.1:1:1' makes no grid: COUNT must be 2 or more"),
        ([0.1], "lrs has 1 learning rates; a comparison needs 2 or more"),
        ([0.1, -1], "lrs: -1.0 is no learning rate; each must be positive and finite"),
    ],
)
def test_rates_that_make_no_grid(lrs: Any, text: str) -> None:
    assert message(lrs=lrs) == text


def test_metrics() -> None:
    assert tuple(read_metric(None, "mse", own_loop=False)) == ("loss", "min", "")
    assert tuple(read_metric("loss", "cross_entropy", own_loop=False)) == ("loss", "min", "nats")
    assert tuple(read_metric(None, "any", own_loop=True)) == ("accuracy", "max", "%")
    assert tuple(read_metric("BLEU:max", "any", own_loop=True)) == ("BLEU", "max", "")


def test_metrics_and_margins_that_mean_nothing() -> None:
    assert message(metric="f1") == (
        "no metric named 'f1'; there are accuracy and loss, and name:max or name:min with train"
    )
    assert message(metric="accuracy", loss="mse") == (
        "metric accuracy needs the loss cross_entropy, not mse; use metric loss"
    )
    assert message(metric="bleu", own_loop=True) == (
        "metric 'bleu': with train, say what is better, as in bleu:max or bleu:min"
    )
    assert message(metric="loss") == (
        "metric 'loss' needs a margin, the smallest difference that matters, in its unit; the default of 0.5 is in "
        "points of accuracy"
    )
    assert message(margin=0.0) == "margin=0.0: the smallest difference that matters is a positive number"
    assert settings(metric="loss", margin=0.01).margin == 0.01


def test_what_a_loop_would_not_hear_of_is_refused() -> None:
    rest = "does nothing with train: the loop brings its own"
    assert message(own_loop=True, batch_size=7) == f"batch-size=7 {rest}"
    assert message(own_loop=True, schedule="cosine") == f"schedule=cosine {rest}"
    assert message(own_loop=True, loss="cross_entropy", optimizer="adamw", batch_size=64) == f"batch-size=64 {rest}"
    with pytest.raises(StudyError, match=f"^loss=torch.nn.functional:l1_loss {rest}$"):
        make_settings(Options(loss=l1_loss), model="m", data="d", loss="its own", choices=(), own_loop=True)
    assert settings(own_loop=True, optimizer="adamw").optimizer == "adamw"


def test_numbers_and_names_that_mean_nothing() -> None:
    assert message(seeds=0) == "seeds=0: must be a whole number from 1"
    assert message(confirm=1) == "confirm=1: must be a whole number from 2"
    assert message(steps=0) == "steps=0: must be a whole number from 1"
    assert message(batch_size=1) == "batch-size=1: must be a whole number from 2"
    assert (
        message(optimizer="adam") == "no optimizer named 'adam'; there are sgd, momentum, adamw; did you mean 'adamw'?"
    )
    assert message(schedule="linear") == "no schedule named 'linear'; there are constant, cosine"
    assert message(device="nowhere").startswith("device 'nowhere' cannot be used: Expected one of cpu")


# ---------------------------------------------------------------------------------------------- axes, samplers, lengths


def test_several_values_make_an_axis_and_one_is_fixed() -> None:
    grown = settings(batch_size="8,32", optimizer=("adamw",), start="he", weight_decay=[0, 1e-4], placement="pre,post")
    assert grown.axes == (
        ("batch_size", (8, 32)),
        ("placement", ("pre", "post")),
        ("weight_decay", (0.0, 1e-4)),
    )
    assert (grown.optimizer, grown.start, grown.batch_size) == ("adamw", "he", 8)


def test_epochs_are_counted_in_full_batches() -> None:
    asked = Options(epochs=3, batch_size="30,200")
    grown = make_settings(
        asked, model="m", data="d", loss="cross_entropy", choices=parse_norms("none"), own_loop=False, examples=100
    )
    assert (grown.epochs, grown.steps, grown.at((("batch_size", 200),)).steps) == (3, 9, 3)
    assert settings().examples is None
    assert message(epochs=2, steps=10) == (
        "steps=10 and epochs=2: epochs are as many steps as they take, so give one of the two"
    )


def test_a_sampler_needs_to_know_how_many_and_a_grid_does_not() -> None:
    assert message(sampler="tpe") == (
        "sampler tpe needs trials, the number of points it may draw for each normalization"
    )
    assert message(trials=20) == "trials=20: a grid decides by itself how many; use sampler qmc or tpe"
    assert message(prune=True) == (
        "prune with sampler grid: the edges lr_train and lr_diverge need every rate in full; use qmc or tpe"
    )
    assert message(sampler="qmc", trials=20, control=True) == (
        "control with sampler qmc: it is held against edges, which only a grid has"
    )
    assert message(sampler="random") == "no sampler named 'random'; there are grid, qmc, tpe"
    assert message(sampler="tpe", trials=0) == "trials=0: must be a whole number from 1"
    assert message(sampler="tpe", trials=20, prune=True, own_loop=True) == (
        "prune with train: it cuts trials short by trial.steps, so say with steps how long they are"
    )
    assert settings(sampler="tpe", trials=20, prune=True, own_loop=True, steps=90).prune


def test_a_loop_takes_start_and_placement_alone() -> None:
    rest = "does nothing with train: the loop brings its own"
    assert message(own_loop=True, batch_size=(8, 32)) == f"batch-size=8,32 {rest}"
    assert message(own_loop=True, weight_decay=0.1) == f"weight-decay=0.1 {rest}"
    assert message(own_loop=True, epochs="2,5") == f"epochs=2,5 {rest}"
    assert message(own_loop=True, optimizer="sgd,adamw") == (
        f"optimizer=sgd,adamw {rest}; name the one it uses, whose learning rates are then searched"
    )
    assert message(own_loop=True, control=True) == (
        "control does nothing with train: it freezes part of the network, and the loop trains it"
    )
    grown = settings(own_loop=True, start="default,he", placement="pre")
    assert (grown.axes, grown.placement) == ((("start", ("default", "he")),), "pre")


def test_plain_options_are_as_python_has_them() -> None:
    asked = Options(optimizer="sgd,adamw", weight_decay="0,0.1", lrs=np.array([0.5, 1])).plain()
    assert asked == Options(optimizer=("sgd", "adamw"), weight_decay=(0.0, 0.1), lrs=(0.5, 1.0))


def test_the_bundled_examples_are_short_and_other_data_are_not() -> None:
    def steps(data: str) -> int | None:
        choices = parse_norms("none")
        return make_settings(
            Options(), model="m", data=data, loss="cross_entropy", choices=choices, own_loop=False
        ).steps

    assert [steps(data) for data in ("digits", "wine", "fashion", "my:data")] == [40, 40, 100, 200]


def test_every_built_in_set_has_a_number_of_steps() -> None:
    assert set(BUILT_IN_STEPS) == set(BUILT_IN)
