"""One trial: a network trained anew from its seed, and what came of it.

*Diverged* means non-finite at the end; a spike that recovers is none. *Trains* means that the training loss, averaged
over the last tenth of the steps, and the validation loss in evaluation mode are both below half of chance (below the
first loss, where the loss is the user's own and chance is unknown). Everything else is *stuck*. Of a training loop of
the user's own only the logged losses are known: it trains if they end below half of the first.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normwise.errors import NormwiseError, StudyError
from normwise.tuning.axes import variant_text
from normwise.tuning.control import Freezer, Kept
from normwise.tuning.data import Data
from normwise.tuning.models import Architecture
from normwise.tuning.norms import NormChoice, NormFactory
from normwise.tuning.records import Outcome, Phase, Record, Request, Settings
from normwise.tuning.seeding import seeded
from normwise.tuning.training import Loss, Training, accuracy, predict, weight_norm
from normwise.tuning.user import blame, one_line

TESTED = ("confirm", "horizon")  # test data decide nothing, and are looked at when nothing is left to decide
TRAINS = 0.5  # of chance, or of the first loss of the user's own loop
_POINTS = 100  # of a stored loss curve
_WEIGHT_POINTS = 20  # of a stored curve of the weights' norm

OwnLoop = Callable[..., Any]


@dataclass(frozen=True)
class Problem:
    """All that a trial needs besides its request; it is sent to each worker once."""

    settings: Settings
    architecture: Architecture
    choices: dict[str, NormChoice]
    loss: Loss
    data: Data | None  # None: the user's own loop brings its own
    chance: float | None
    train: OwnLoop | None = None


class Trial:
    """What a user's own training loop is told of its trial, and where it may log its losses.

    `phase` is what the trial is for: "select", "confirm" (use test data here if you have any) or "horizon". `steps` is
    how many steps the study asks for, None where the loop decides.

    >>> trial = Trial("select", None)
    >>> trial.log(0, 2.3)
    """

    def __init__(self, phase: Phase, steps: int | None) -> None:
        self.phase, self.steps = phase, steps
        self._losses: list[tuple[int, float]] = []

    def log(self, step: int, loss: float | Tensor) -> None:
        """Note the training loss of a step: a number or a tensor of one element."""
        self._losses.append((int(step), _number(loss)))

    @property
    def losses(self) -> tuple[tuple[int, float], ...]:
        """What was logged, in order."""
        return tuple(self._losses)


def run(problem: Problem, request: Request) -> Record:
    """Run one trial from its seed; the caller's random numbers are left alone, and what is printed goes to stderr.

    Raises StudyError when the user's code raises anything, unless it is their own loop and has diverged.
    """
    started = time.perf_counter()
    where = f"trial ({describe(request)}) raised"
    with redirect_stdout(sys.stderr), seeded(request.seed), _divergence_is_recorded(), blame(where):
        fixed = replace(problem, settings=problem.settings.at(request.variant))
        kept = Kept(fixed.choices[request.norm])
        model = build(fixed, kept)
        record = _own_loop(fixed, request, model) if fixed.data is None else _built_in(fixed, request, model, kept)
    return replace(record, seconds=time.perf_counter() - started)


@contextmanager
def _divergence_is_recorded() -> Iterator[None]:
    """A study goes to rates at which training ends in what is not finite: the record tells, and no layer need warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*: the batch's statistics are not finite", UserWarning)
        yield


def build(problem: Problem, norm: NormFactory) -> nn.Module:
    """A new network of the problem, with the start and the placement of its settings, on its device."""
    settings = problem.settings
    model = problem.architecture.build(norm, start=settings.start, placement=settings.placement)
    return model.to(settings.device)


def describe(request: Request) -> str:
    """The trial in a few words.

    >>> describe(Request("select", "batch", 0.1, 3, 200, (("batch_size", 8),)))
    'batch at learning rate 0.1, batch size 8, seed 3, select'
    """
    at = ", ".join(filter(None, [f"learning rate {request.lr:.4g}", variant_text(request.variant)]))
    return f"{request.norm} at {at}, seed {request.seed}, {request.phase}"


# -------------------------------------------------------------------------------------------------- built-in training


def _built_in(problem: Problem, request: Request, model: nn.Module, kept: Kept) -> Record:
    if problem.data is None or request.steps is None:
        raise StudyError("built-in training needs data and a number of steps")
    data = problem.data.to(problem.settings.device)
    training = Training(
        model,
        data.train,
        problem.settings,
        problem.loss,
        lr=request.lr,
        seed=request.seed,
        steps=request.steps,
        freezer=Freezer(model, kept.made) if request.phase == "control" else None,
    )
    losses, weights = _train(training, request.steps)
    record = replace(_logged(request, list(enumerate(losses, start=1))), weights=thin(weights))
    if not (math.isfinite(losses[-1]) and training.finite()):
        return record
    outputs = predict(model, data.validation.inputs)
    val_loss = problem.loss(outputs, data.validation.targets).item()
    score = _score(problem, outputs, data.validation.targets, val_loss)
    record = replace(record, val_loss=_finite(val_loss), weight_norm=_finite(weight_norm(model)))
    if request.phase in TESTED:
        outputs = predict(model, data.test.inputs)
        test_loss = problem.loss(outputs, data.test.targets).item()
        score = _score(problem, outputs, data.test.targets, test_loss)
        record = replace(record, test_loss=_finite(test_loss))
    if not (math.isfinite(val_loss) and math.isfinite(score)):
        return record
    return replace(record, outcome=_outcome(record, problem.chance), score=score)


def _train(training: Training, steps: int) -> tuple[list[float], list[tuple[int, float]]]:
    """The loss of every step, and the norm of the weights before the first and at about 20 steps on the way."""
    losses: list[float] = []
    weights = [(0, weight_norm(training.model))]
    every = max(1, steps // _WEIGHT_POINTS)
    for step in range(1, steps + 1):
        losses.append(training.step())
        if not math.isfinite(losses[-1]) and not training.finite():
            break
        if step % every == 0 or step == steps:
            weights.append((step, weight_norm(training.model)))
    return losses, weights


def _score(problem: Problem, outputs: Tensor, targets: Tensor, loss: float) -> float:
    return accuracy(outputs, targets) if problem.settings.metric == "accuracy" else loss


def _outcome(record: Record, chance: float | None) -> Outcome:
    threshold = record.first_loss if chance is None else TRAINS * chance
    if record.tail_loss is None or record.val_loss is None or threshold is None:
        return "stuck"
    return "trains" if max(record.tail_loss, record.val_loss) < threshold else "stuck"


# ------------------------------------------------------------------------------------------------------ the user's own


def _own_loop(problem: Problem, request: Request, model: nn.Module) -> Record:
    if problem.train is None:
        raise StudyError("a study without data needs a training loop, train=")
    trial = Trial(request.phase, request.steps)
    returned = _returned(problem.train, request, model, trial)
    try:
        score = _number(returned)
    except (TypeError, ValueError, RuntimeError) as error:
        raise StudyError(f"train returned {returned!r}, a {type(returned).__name__}, not a number") from error
    record = _logged(request, trial.losses)
    # A network of NaNs still has an accuracy: argmax answers something.
    if not math.isfinite(score) or _non_finite(model, trial.losses[-1:]):
        return record
    if problem.settings.metric == "accuracy" and not 0 <= score <= 100:
        raise StudyError(
            f"train returned {score:.6g}, which is no accuracy in percent; "
            "say what it is with metric 'name:max' or 'name:min'"
        )
    outcome = _own_outcome(record, trial.losses)
    return replace(record, outcome=outcome, score=score, weight_norm=_finite(weight_norm(model)))


def _returned(train: OwnLoop, request: Request, model: nn.Module, trial: Trial) -> Any:
    """What the loop returns; NaN where it raised because it had diverged."""
    try:
        return train(model, lr=request.lr, seed=request.seed, trial=trial)
    except FloatingPointError:
        return math.nan
    except Exception as error:
        if _non_finite(model, trial.losses):
            return math.nan
        if isinstance(error, NormwiseError):
            raise
        raise StudyError(
            f"trial ({describe(request)}) raised {one_line(error)}; "
            "a loop may raise FloatingPointError to say that it diverged"
        ) from error


def _non_finite(model: nn.Module, losses: Sequence[tuple[int, float]]) -> bool:
    """Whether one of the losses or of the parameters is not finite."""
    if not all(math.isfinite(loss) for _, loss in losses):
        return True
    known = (parameter for parameter in model.parameters() if not is_lazy(parameter))
    return not all(bool(parameter.isfinite().all()) for parameter in known)


def _own_outcome(record: Record, losses: Sequence[tuple[int, float]]) -> Outcome:
    """Chance is unknown here: below half of this trial's first loss. Fewer than two losses tell nothing of training."""
    if len(losses) < 2:
        return "trains"
    if record.first_loss is None or record.tail_loss is None:
        return "stuck"
    return "trains" if record.tail_loss < TRAINS * record.first_loss else "stuck"


def _number(value: Any) -> float:
    """A number, or a tensor of one element, whether or not it requires gradients."""
    return float(value.item() if isinstance(value, Tensor) else value)


# ---------------------------------------------------------------------------------------------------------- the losses


def _logged(request: Request, losses: Sequence[tuple[int, float]]) -> Record:
    """A record of the losses alone; it stands as diverged until the end of the training says otherwise."""
    if not losses:
        return Record(request, "diverged")
    tail = [loss for _, loss in losses[-max(1, len(losses) // 10) :]]
    return Record(
        request,
        "diverged",
        first_loss=_finite(losses[0][1]),
        tail_loss=_finite(sum(tail) / len(tail)),
        curve=thin(losses),
    )


def thin(losses: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """At most 100 finite points of a loss curve, evenly spread, first and last among them.

    >>> thin([(1, 2.0), (2, float("nan")), (3, 1.0)])
    ((1, 2.0), (3, 1.0))
    >>> points = thin([(step, 1.0) for step in range(1000)])
    >>> len(points), points[0][0], points[-1][0]
    (100, 0, 999)
    """
    finite = [(step, loss) for step, loss in losses if math.isfinite(loss)]
    if len(finite) <= _POINTS:
        return tuple(finite)
    gap = (len(finite) - 1) / (_POINTS - 1)
    return tuple(finite[round(point * gap)] for point in range(_POINTS))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
