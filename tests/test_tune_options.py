"""From words to checked settings."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch.nn.functional import l1_loss

from normwise.errors import StudyError
from normwise.tuning.norms import parse_norms
from normwise.tuning.options import Options, make_settings, read_metric, read_rates
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
