"""No measure leaves a trace: a training that was measured goes on, bit for bit, as one that was not."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress

import pytest
from torch.nn.functional import cross_entropy

from normwise.diagnose.results import Result
from tests.measures import MEASURES, Loss, Training, raising, training

every_measure = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
Measure = Callable[[Training, Loss], Result]


@pytest.fixture(scope="module")
def undisturbed() -> list[object]:
    return training().future()


@every_measure
def test_no_trace(measure: Measure, undisturbed: list[object]) -> None:
    measured = training()
    before = measured.state()
    result = measure(measured, cross_entropy)
    assert measured.state() == before
    assert measured.future() == undisturbed
    assert result.meaning


@every_measure
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 4, 17])
def test_no_trace_after_an_interruption(
    measure: Measure, error: type[BaseException], at: int, undisturbed: list[object]
) -> None:
    measured = training()
    before = measured.state()
    with pytest.raises(error) if at < 5 else suppress(error):  # not every measure asks for the loss so often
        measure(measured, raising(error, at))
    assert measured.state() == before
    assert measured.future() == undisturbed


@every_measure
def test_two_calls_agree(measure: Measure) -> None:
    """Dropout, a spectral norm and a memory do not make them differ."""
    measured = training()
    assert measure(measured, cross_entropy).to_dict() == measure(measured, cross_entropy).to_dict()


@every_measure
def test_results_are_plain_records(measure: Measure) -> None:
    result = measure(training(), cross_entropy)
    assert repr(result) == f"{type(result).__name__}: {result.meaning}"
    assert "\n" not in repr(result)
    assert json.loads(result.to_json()) == json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert len(result.to_frame()) == len(result.rows())
    assert all(value is None or isinstance(value, float) for value in result.headline().values())
    assert result.plot().data


def test_persistent_workers_in_mid_epoch() -> None:
    """Such a loader hands out one iterator again and again: a measure must not take it."""
    undisturbed = training(workers=1).future()
    measured = training(workers=1)
    MEASURES["smoothness"](measured, cross_entropy)
    assert measured.future() == undisturbed


def test_the_future_tells_a_trace() -> None:
    """One more step, one number drawn, or one batch taken is another future."""
    untouched_future = training().future()
    drawn, stepped = training(), training()
    drawn.model(next(iter(drawn.loader))[0])
    assert drawn.future() != untouched_future
    stepped.step()
    assert stepped.future() != untouched_future
